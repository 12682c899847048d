"""Liger's fused loss as a card runs it: which products it writes in place, and what its tensors are for.

Source: liger_kernel 0.8.5, ops/fused_linear_cross_entropy.py. Its Triton kernels allocate nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

from planner.simulate.trace import Modules

__all__ = ["liger_forms"]

_HALF = (torch.float16, torch.bfloat16)


@contextmanager
def liger_forms(modules: Modules, capability: tuple[int, int] | None) -> Iterator[None]:
    """Replace what the training step asks of the device, where that loss has been imported.

    From capability 8.0 on (taken where none is known) the weight's gradient is summed in place.
    """
    module = sys.modules.get("planner.training.liger")
    if module is None:
        yield
        return
    forms: dict[str, Callable[..., Any]] = {
        "has_buffer": _has_buffer,
        "fused_loss": _marked(module.fused_loss, modules),
    }
    if capability is None or capability >= (8, 0):
        forms["add_product"] = _added_in_place(module.add_product)
    with ExitStack() as stack:
        for name, form in forms.items():
            stack.enter_context(mock.patch.object(module, name, form))
        yield


def _marked(original: Callable[..., Any], modules: Modules) -> Callable[..., Any]:
    """The head's module is not entered, its weight alone is read: here is where it begins."""

    def fused_loss(*args: Any, **kwargs: Any) -> Any:
        modules.begin_head()
        return original(*args, **kwargs)

    return fused_loss


def _has_buffer(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    """`_can_use_mm_out`: only where autocast would cast neither of the two."""
    if rows.dtype != weight.dtype:
        return False
    return not torch.is_autocast_enabled("cuda") or rows.dtype == torch.get_autocast_dtype("cuda")


def _added_in_place(original: Callable[..., Any]) -> Callable[..., Any]:
    """addmm into the sum itself, for 16-bit logits over a sum in fp32 or in their type."""

    def add_product(summed: torch.Tensor, logits: torch.Tensor, rows: torch.Tensor) -> None:
        if logits.dtype not in _HALF or summed.dtype not in (torch.float32, logits.dtype):
            original(summed, logits, rows)
        else:
            rows.to(logits.dtype)  # under autocast a copy, for as long as the product runs

    return add_product
