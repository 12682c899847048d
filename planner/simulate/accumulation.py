"""Gradients that meet in autograd's engine are added in place on CUDA, out of place under a dispatch mode.

Source: torch/csrc/autograd/input_buffer.cpp, `accumulate`: in place where gradients are not recorded and
one of the two tensors is dense and held by nobody else. A dispatch mode makes every tensor count as a
subclass there (ATen/TensorSubclassLikeUtils.h), so the tracer has to answer for CUDA.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["ADDITION", "added_in_place", "unshared_count"]

ADDITION = torch.ops.aten.add.Tensor


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
