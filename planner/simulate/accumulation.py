"""What autograd writes in place on CUDA, and out of place under a dispatch mode.

A dispatch mode makes every tensor count as a subclass (ATen/TensorSubclassLikeUtils.h), and of those autograd
makes copies; the tracer has to answer for CUDA. Gradients that meet: torch/csrc/autograd/input_buffer.cpp,
`accumulate`, in place where gradients are not recorded and one of the two tensors is dense and held by nobody
else. Gradients of indexing: torch/csrc/autograd/FunctionsManual.cpp, written into fresh zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["ADDITION", "IN_PLACE", "added_in_place", "made_in_place", "unshared_count"]

aten = torch.ops.aten

ADDITION = aten.add.Tensor
_SELECTIONS = ("TopkBackward0", "SortBackward0", "SortBackward1", "MaxBackward0", "MinBackward0")
_INTO_ZEROS = {  # by operation: the nodes that write into zeros of their own making
    aten.index_put.default: ("IndexBackward0", "UnsafeIndexBackward0"),  # index_backward
    aten.scatter_add.default: ("GatherBackward0",),  # gather_backward
    aten.index_add.default: ("IndexSelectBackward0",),  # index_select_backward_symint
    aten.scatter.src: _SELECTIONS,  # value_selecting_reduction_backward_symint
}
IN_PLACE = frozenset({ADDITION, *_INTO_ZEROS})


def made_in_place(func: Any, args: Sequence[Any]) -> torch.Tensor | None:
    """The argument that holds the result of one of `IN_PLACE` on CUDA; None where a new tensor does.

    To be asked in the backward pass, from inside a dispatch mode.
    """
    if func is ADDITION:
        return added_in_place(args)
    node = torch._C._current_autograd_node()
    if torch.is_grad_enabled() or node is None or node.name() not in _INTO_ZEROS[func]:
        return None
    zeros: torch.Tensor = args[0]
    return zeros


def added_in_place(args: Sequence[Any]) -> torch.Tensor | None:
    """Of two gradients that meet, the one that takes the sum; None where neither may.

    To be asked in the backward pass, from inside a dispatch mode.
    """
    if len(args) != 2 or torch.is_grad_enabled() or torch._C._current_autograd_node() is None:
        return None
    old, new = args
    if not (isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor)):
        return None
    if old.shape != new.shape or old.dtype != new.dtype:
        return None
    for tensor in (old, new):
        if tensor._use_count() <= unshared_count() and _dense(tensor):  # type: ignore[attr-defined]
            return tensor
    return None


def _dense(tensor: torch.Tensor) -> bool:
    return all(stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)


@cache
def unshared_count() -> int:
    """References that a gradient has here when only the engine's buffer holds it, in this torch.

    Runs a small backward pass, so ask once before the one that is watched.
    """
    counts: list[int] = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            if func is ADDITION and not torch.is_grad_enabled():
                counts.extend(tensor._use_count() for tensor in args)
            return func(*args, **(kwargs or {}))

    with torch.enable_grad(), Counting():  # type: ignore[no-untyped-call]
        x = torch.ones(2, 2, requires_grad=True)
        y = x * 2
        (y @ x.detach() + y @ x.detach().t()).sum().backward()
    return min(counts)
