"""Which of two gradients takes the sum: torch/csrc/autograd/input_buffer.cpp, `accumulate`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from planner.simulate.accumulation import ADDITION, added_in_place, unshared_count
from tests.simulate.watched import meta, watched


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


@pytest.mark.parametrize(
    "function, op",
    [
        (lambda x, i: x[i], "index_put"),
        (lambda x, i: x.index_select(0, i), "index_add"),
        (lambda x, i: x.gather(1, i[:, None]), "scatter_add"),
        (lambda x, i: x.topk(2)[0], "scatter"),
        (lambda x, i: x.max(1)[0], "scatter"),
    ],
    ids=["index", "index_select", "gather", "topk", "max"],
)
def test_the_gradient_of_indexing_is_written_into_its_zeros(function: Any, op: str) -> None:
    # FunctionsManual.cpp: out of place for tensor subclasses alone
    x, indices = meta(64, 64, grad=True), meta(32, dtype=torch.int64)
    seen = watched(lambda: function(x, indices).sum(), backward=True)
    made = [each for each in seen.taken if each.op.startswith(f"aten.{op}.")]
    assert seen.by("new_zeros.default") == [64 * 64 * 4]
    assert 64 * 64 * 4 not in [each.size_bytes for each in made]


def test_what_a_user_writes_out_of_place_stays_so() -> None:
    x, indices = meta(64, 64, grad=True), meta(64, dtype=torch.int64)
    seen = watched(lambda: x.index_add(0, indices, x).sum(), backward=True)
    assert seen.by("index_add.default") == [64 * 64 * 4]
