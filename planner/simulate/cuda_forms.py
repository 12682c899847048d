"""Steers operations on `meta` to the form they take on CUDA.

Composite operations ask for the device and take another path off CUDA. Each steering names the source
that decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from planner.simulate.attention import AttentionRules

__all__ = ["STEERED", "cuda_forms", "cuda_optimizers"]

STEERED = (
    (F, "scaled_dot_product_attention"),
    (F, "dropout"),
    (torch, "dropout"),
    *((owner, name) for owner in (F, torch, torch.Tensor) for name in ("softmax", "log_softmax")),
)


@contextmanager
def cuda_forms(rules: AttentionRules) -> Iterator[None]:
    """Dropout, softmax and attention on `meta` as CUDA runs them; other devices are left alone.

    The functions themselves are replaced for the time of the context: a function mode would not reach
    the recomputation of a checkpoint, which autograd runs with modes of its own.
    """
    forms: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
        "scaled_dot_product_attention": lambda _original: rules.attention,
        "dropout": lambda _original: _dropout,
        "softmax": lambda original: _softmax(original, torch._softmax),
        "log_softmax": lambda original: _softmax(original, torch._log_softmax),
    }
    with ExitStack() as stack:
        for owner, name in STEERED:
            original = getattr(owner, name)
            stack.enter_context(mock.patch.object(owner, name, _on_meta(forms[name](original), original)))
        yield


def _on_meta(form: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """`form` where the first tensor is on `meta`, the original elsewhere."""

    def chosen(*args: Any, **kwargs: Any) -> Any:
        tensor = args[0] if args else kwargs.get("input", kwargs.get("query"))
        if isinstance(tensor, torch.Tensor) and tensor.device.type == "meta":
            return form(*args, **kwargs)
        return original(*args, **kwargs)

    return chosen


def _softmax(original: Callable[..., Any], fused: Callable[..., Any]) -> Callable[..., Any]:
    """SoftMax.cpp: softmax of float16 to float32 is one operation on CUDA; bfloat16 is copied first."""

    def softmax(input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        dtype = kwargs.get("dtype") or next((a for a in args if isinstance(a, torch.dtype)), None)
        dim = kwargs.get("dim", args[0] if args and isinstance(args[0], int) else None)
        if input.dtype == torch.float16 and dtype == torch.float32 and dim is not None:
            return fused(input, dim, True)
        return original(input, *args, **kwargs)

    return softmax


def _dropout(
    input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> torch.Tensor:
    """aten/src/ATen/native/Dropout.cpp: on CUDA the fused native_dropout with a bool mask."""
    if not training or p == 0.0:
        return input
    return torch.native_dropout(input, p, training)[0]


def _foreach_norm(original: Callable[..., Any]) -> Callable[..., Any]:
    """ForeachReduceOp.cu: a partial sum for each 65,536 numbers (kChunkSize) of the largest tensor, of all.

    They are made before the norms and given back after them; in fp32 for 16-bit tensors.
    """

    def norms(tensors: Sequence[torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        chunks = max(-(-tensor.numel() // 65536) for tensor in tensors)
        dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
        partial = torch.empty(len(tensors) * chunks, dtype=dtype, device=tensors[0].device)
        found = original(tensors, *args, **kwargs)
        del partial
        return found

    return norms


def _on_first_of_meta(form: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """`form` where the first tensor of a list is on `meta`, the original elsewhere."""

    def chosen(tensors: Sequence[torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        chosen_form = form if tensors and tensors[0].device.type == "meta" else original
        return chosen_form(tensors, *args, **kwargs)

    return chosen


@contextmanager
def cuda_optimizers() -> Iterator[None]:
    """Let optimizers and gradient clipping take `meta` tensors for CUDA's: foreach by default, fused.

    torch/utils/_foreach_utils.py lists the devices whose tensors get these forms.
    """
    from torch.optim import optimizer
    from torch.utils import _foreach_utils

    foreach = [*_foreach_utils._get_foreach_kernels_supported_devices(), "meta"]
    fused = [*_foreach_utils._get_fused_kernels_supported_devices(), "meta"]
    with ExitStack() as stack:
        # torch/amp/grad_scaler.py switches itself off where CUDA is not there
        stack.enter_context(
            mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", return_value=False)
        )
        norms = _on_first_of_meta(_foreach_norm(torch._foreach_norm), torch._foreach_norm)
        stack.enter_context(mock.patch.object(torch, "_foreach_norm", norms))
        for module in (optimizer, _foreach_utils):
            for name, devices in (
                ("_get_foreach_kernels_supported_devices", foreach),
                ("_get_fused_kernels_supported_devices", fused),
            ):
                if hasattr(module, name):
                    stack.enter_context(
                        mock.patch.object(module, name, lambda devices=devices: list(devices))
                    )
        yield
