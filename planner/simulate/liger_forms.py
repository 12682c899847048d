"""Liger's kernels as a card runs them: what they write in place, and how many partial sums they make.

Source: liger_kernel 0.8.5, ops/fused_linear_cross_entropy.py, rms_norm.py and fused_moe_kernels.py. Its
Triton kernels allocate nothing, but for those that are tried in several forms at first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

from planner.catalog.gpus import Gpu, multiprocessors
from planner.simulate.trace import Modules

__all__ = ["liger_forms"]

_HALF = (torch.float16, torch.bfloat16)
_FORWARD = ("rms_norm", "gated", "rotated", "fused_experts")
_TUNING_BYTES = 256 * 2**20  # triton 3, backends/nvidia/driver.py: get_empty_cache_for_benchmark


@contextmanager
def liger_forms(modules: Modules, gpu: Gpu | None) -> Iterator[None]:
    """Replace what the training step asks of the device, where Liger's forms have been imported.

    From capability 8.0 on (taken where none is known) the weight's gradient is summed in place.
    """
    names = ("liger", "liger_kernels", "liger_experts")
    loss, kernels, experts = (sys.modules.get(f"planner.training.{name}") for name in names)
    if loss is None or kernels is None or experts is None:
        yield
        return
    forms: list[tuple[Any, str, Callable[..., Any]]] = [
        (loss, "has_buffer", _has_buffer),
        (loss, "fused_loss", _marked(loss.fused_loss, modules)),
        *[(kernels, name, _made_again(getattr(kernels, name), modules)) for name in _FORWARD],
        (kernels, "multiprocessors", lambda _device: multiprocessors(gpu)),
        (experts, "tuned", _tuned()),
    ]
    capability = gpu.capability if gpu else None
    if capability is None or capability >= (8, 0):
        forms.append((loss, "add_product", _added_in_place(loss.add_product)))
    with ExitStack() as stack:
        for module, name, form in forms:
            stack.enter_context(mock.patch.object(module, name, form))
        yield


def _made_again(original: Callable[..., Any], modules: Modules) -> Callable[..., Any]:
    """A forward pass within a checkpoint's recomputation, where autograd's functions turn gradients off."""

    def form(*args: Any, **kwargs: Any) -> Any:
        before, modules.made_again = modules.made_again, torch.is_grad_enabled()
        try:
            return original(*args, **kwargs)
        finally:
            modules.made_again = before

    return form


def _tuned() -> Callable[[str, torch.device], None]:
    """A tensor that is cleared between trials, each kernel's first time (triton/testing.py, do_bench)."""
    known: set[str] = set()

    def tuned(kernel: str, device: torch.device) -> None:
        if kernel not in known:
            known.add(kernel)
            torch.empty(_TUNING_BYTES // 4, dtype=torch.int32, device=device)

    return tuned


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
