"""Which of two gradients takes the sum: torch/csrc/autograd/input_buffer.cpp, `accumulate`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from planner.simulate.accumulation import ADDITION, added_in_place, unshared_count


class _Sums(TorchDispatchMode):
    """For each sum of gradients, whether it is made in place."""

    def __init__(self) -> None:
        super().__init__()
        self.in_place: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is ADDITION and not torch.is_grad_enabled():
            self.in_place.append(added_in_place(args) is not None)
        return func(*args, **(kwargs or {}))


def _sums(loss: Callable[[torch.Tensor], torch.Tensor]) -> list[bool]:
    unshared_count()
    x = torch.ones(4, 4, device="meta", requires_grad=True)
    with _Sums() as sums:
        loss(x * 2).backward()
    return sums.in_place


def test_two_fresh_gradients_are_added_in_place() -> None:
    weight = torch.ones(4, 4, device="meta")
    assert _sums(lambda y: (y @ weight + (y @ weight).relu()).sum()) == [True]


def test_a_residual_connection_takes_the_gradient_of_its_branch() -> None:
    weight = torch.ones(4, 4, device="meta")
    assert _sums(lambda y: ((y + y @ weight) * 3).sum()) == [True]


def test_one_gradient_that_arrives_twice_is_added_into_a_new_tensor() -> None:
    # an addition hands its gradient on as it is, so both arms hand down the same tensor
    assert _sums(lambda y: (((y + 1) + (y + 2)) * 3).sum()) == [False]
