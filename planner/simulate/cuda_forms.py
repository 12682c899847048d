"""Steers operations on `meta` to the form they take on CUDA.

Composite operations ask for the device and take a shorter path off CUDA; a function mode answers for
CUDA. Each steering names the source that decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from planner.simulate.attention import AttentionRules

__all__ = ["CudaForms", "cuda_optimizers"]

_SOFTMAXES: dict[Any, Callable[..., torch.Tensor]] = {
    F.softmax: torch._softmax,
    torch.softmax: torch._softmax,
    torch.Tensor.softmax: torch._softmax,
    F.log_softmax: torch._log_softmax,
    torch.log_softmax: torch._log_softmax,
    torch.Tensor.log_softmax: torch._log_softmax,
}
_DROPOUTS = (F.dropout, torch.dropout)
_SDPA = F.scaled_dot_product_attention


class CudaForms(TorchFunctionMode):
    """Dropout, softmax and attention on `meta` as CUDA runs them."""

    def __init__(self, rules: AttentionRules) -> None:
        """`rules` choose the attention kernel."""
        super().__init__()
        self.rules = rules

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the CUDA form where there is one."""
        kwargs = kwargs or {}
        if func is _SDPA and _on_meta(args, kwargs, "query"):
            return self.rules.attention(*args, **kwargs)
        if func in _DROPOUTS and _on_meta(args, kwargs, "input"):
            return _dropout(*args, **kwargs)
        if func in _SOFTMAXES and _on_meta(args, kwargs, "input"):
            fused = _half_to_float(_SOFTMAXES[func], *args, **kwargs)
            if fused is not None:
                return fused
        return func(*args, **kwargs)


def _on_meta(args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> bool:
    tensor = args[0] if args else kwargs.get(name)
    return isinstance(tensor, torch.Tensor) and tensor.device.type == "meta"


def _dropout(
    input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> torch.Tensor:
    """aten/src/ATen/native/Dropout.cpp: on CUDA the fused native_dropout with a bool mask."""
    if not training or p == 0.0 or inplace or p == 1.0:
        return torch.dropout(input, p, training) if training and p else input
    return torch.native_dropout(input, p, training)[0]


def _half_to_float(
    softmax: Callable[..., torch.Tensor],
    input: torch.Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
    **_other: Any,
) -> torch.Tensor | None:
    """SoftMax.cpp: softmax of float16 to float32 is one operation on CUDA; bfloat16 is copied first."""
    if isinstance(_stacklevel, torch.dtype):
        dtype = _stacklevel  # torch.softmax(input, dim, dtype)
    if input.dtype != torch.float16 or dtype != torch.float32 or dim is None:
        return None
    return softmax(input, dim, True)


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
        for module in (optimizer, _foreach_utils):
            for name, devices in (
                ("_get_foreach_kernels_supported_devices", foreach),
                ("_get_fused_kernels_supported_devices", fused),
            ):
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, lambda devices=devices: list(devices)))
        yield
