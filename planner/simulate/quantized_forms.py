"""bitsandbytes' operations on `meta` as its CUDA backend runs them: bitsandbytes/backends/cuda/ops.py (0.50).

Left out: between 5 and 1,536 tokens in a micro batch some cards take a fused kernel that needs no
dequantized weight in the forward pass (the backward pass dequantizes on all of them); the few columns of
outliers that int8 multiplies apart depend on the values and count as none.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

__all__ = ["quantized_forms"]

_FUSED_ROWS = 4  # _GEMM_4BIT_CUSTOM_FLOOR_M: up to so many rows the fused kernel always runs


@contextmanager
def quantized_forms() -> Iterator[None]:
    """Replace bitsandbytes' operations for the time of the context, where it has been imported."""
    if "bitsandbytes" not in sys.modules:
        yield
        return
    ops = torch.ops.bitsandbytes
    with ExitStack() as stack:
        for owner, name, form in (
            (ops.gemm_4bit, "default", _gemm_4bit),
            (ops.int8_vectorwise_quant, "default", _row_quantized),
            (ops, "int8_mixed_scaled_mm", _int8_product),
        ):
            original = getattr(owner, name)
            stack.enter_context(mock.patch.object(owner, name, _on_meta(form, original)))
        logger = logging.getLogger("bitsandbytes.autograd._functions")  # warns of each cast to fp16
        stack.enter_context(mock.patch.object(logger, "disabled", True))
        yield


def _on_meta(form: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    def chosen(first: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return (form if first.device.type == "meta" else original)(first, *args, **kwargs)

    return chosen


def _gemm_4bit(
    rows: torch.Tensor,
    packed: torch.Tensor,
    shape: Any,
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    bias: torch.Tensor | None = None,
    absmax_8bit: torch.Tensor | None = None,
    absmax_code: torch.Tensor | None = None,
    absmax_offset: torch.Tensor | None = None,
) -> torch.Tensor:
    """gemm_4bit: fused for a few rows, else the whole weight dequantized for the product."""
    width = rows.shape[-1]
    if rows.numel() // width <= _FUSED_ROWS and width % blocksize == 0:
        return torch.empty((*rows.shape[:-1], shape[0]), dtype=rows.dtype, device=rows.device)
    held = []  # _dequant_linear_fallback: the scales first, alive until the product is there
    if absmax_8bit is not None and absmax_offset is not None:
        held.append(torch.empty_like(absmax_8bit, dtype=torch.float32))
        held.append(held[0] + absmax_offset)
    weight = torch.empty(tuple(shape), dtype=rows.dtype, device=rows.device)
    return F.linear(rows, weight, bias)


def _row_quantized(
    rows: torch.Tensor, threshold: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """int8_vectorwise_quant: a scale for each row, int8 numbers; the search for outliers takes copies."""
    scales = torch.empty(rows.numel() // rows.shape[-1], dtype=torch.float32, device=rows.device)
    codes = torch.empty(rows.shape, dtype=torch.int8, device=rows.device)
    if threshold == 0.0:
        return codes, scales, None
    outliers = rows.abs() >= threshold
    del outliers
    return codes, scales, torch.empty(0, dtype=torch.int64, device=rows.device)


def _int8_product(
    rows: torch.Tensor,
    codes: torch.Tensor,
    weight: torch.Tensor,
    row_scales: torch.Tensor,
    weight_scales: torch.Tensor,
    outlier_columns: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """int8_mixed_scaled_mm: products as int32, then fp16, then the input's type (int8_mm_dequant)."""
    none = torch.empty(0, dtype=rows.dtype, device=rows.device)
    shape = (*codes.shape[:-1], weight.shape[0])
    sums = torch.empty(shape, dtype=torch.int32, device=rows.device)
    out = torch.empty_like(sums, dtype=torch.float16)
    if bias is not None and bias.dtype != torch.float16:
        out.add_(bias)
    return out.to(rows.dtype), none
