"""Scaled-dot-product attention as CUDA chooses and runs it, on `meta` tensors.

Source: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp (the choice) and attention.cpp (what each
choice does before its kernel). The switches of `torch.nn.attention.sdpa_kernel` are respected.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from planner.errors import TraceError

__all__ = ["AttentionRules"]

aten = torch.ops.aten

_FLASH_HEAD_LIMIT = 256  # check_head_dim_size_flash
_CUDNN_HEAD_LIMIT = 128  # check_cudnn_tensor_shapes
_CUDNN_HEAD_LIMIT_HOPPER = 256  # the same, with the cuDNN 9.10 and newer that torch 2.11 to 2.13 bring
_BIAS_MULTIPLE = 16  # attention.cpp: the mask's last dimension is padded to 16 for the efficient kernel
_DEFAULT_CAPABILITY = (8, 0)  # where no GPU is named: Ampere, the oldest with bf16


@dataclass(frozen=True, kw_only=True)
class AttentionRules:
    """torch's choice of kernel for one device. `capability` None is taken as 8.0."""

    capability: tuple[int, int] | None = None
    torch_version: tuple[int, int] = (2, 13)

    def attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """`[b, heads, s, d]` in, `[b, heads, s, d]` out, by the kernel that CUDA would run."""
        out: torch.Tensor
        kernel = self._kernel(query, key, value, attn_mask, dropout_p, enable_gqa=enable_gqa)
        if kernel == "math":
            out = _math(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
            return out
        mask = _float_mask(attn_mask, query)
        if kernel == "flash":
            return _flash(query, key, value, dropout_p, is_causal, scale)
        if kernel == "cudnn":
            out = aten._scaled_dot_product_cudnn_attention(
                query, key, value, mask, True, dropout_p, is_causal, False, scale=scale
            )[0]
            return out
        out = aten._scaled_dot_product_efficient_attention(
            query, key, value, _padded(mask, query, key), True, dropout_p, is_causal, scale=scale
        )[0]
        return out

    def _kernel(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        dropout_p: float,
        *,
        enable_gqa: bool,
    ) -> str:
        capability = self.capability or _DEFAULT_CAPABILITY
        half = query.dtype in (torch.float16, torch.bfloat16)
        unequal = query.shape[1] != key.shape[1]  # check_batch_size_and_num_heads_dense
        grouped, broadcast = unequal and enable_gqa, unequal and not enable_gqa
        same_head = query.shape[-1] == key.shape[-1] == value.shape[-1]
        head = query.shape[-1]
        trained = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        usable = {
            "cudnn": half
            and capability >= (8, 0)
            and same_head
            and head % 8 == 0
            and head <= (_CUDNN_HEAD_LIMIT_HOPPER if capability == (9, 0) else _CUDNN_HEAD_LIMIT)
            and key.shape[-2] > 1
            and not (mask is not None and mask.requires_grad),  # check_attn_mask_shape
            "flash": half
            and mask is None
            and same_head
            and head <= _FLASH_HEAD_LIMIT
            and not (trained and _flash_backward_fails(capability, head, dropout_p))
            and not broadcast
            and capability >= (8, 0)
            and query.dim() == 4,
            "efficient": not (grouped or broadcast)
            and (query.dtype != torch.bfloat16 or capability >= (8, 0))
            and query.shape[-1] == key.shape[-1]  # check_head_dim_size_mem_efficient
            and head % self._alignment(query.dtype) == 0
            and value.shape[-1] % self._alignment(query.dtype) == 0
            and query.dim() == 4,
            "math": True,
        }
        enabled = {
            "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
            "flash": torch.backends.cuda.flash_sdp_enabled(),
            "efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
            "math": torch.backends.cuda.math_sdp_enabled(),
        }
        for kernel in self._order():
            if usable[kernel] and enabled[kernel]:
                return kernel
        raise TraceError(
            f"no attention kernel takes {str(query.dtype).removeprefix('torch.')} heads of {head} on "
            f"capability {capability[0]}.{capability[1]} with this choice; use attention sdpa or eager."
        )

    def _order(self) -> tuple[str, ...]:
        """check_prefer_cudnn_attention: cuDNN comes first on Hopper and data-centre Blackwell."""
        if (self.capability or _DEFAULT_CAPABILITY) in ((9, 0), (10, 0), (10, 3)):
            return ("cudnn", "flash", "efficient", "math")
        return ("flash", "efficient", "math", "cudnn")

    def _alignment(self, dtype: torch.dtype) -> int:
        """minimum_gemm_alignment: elements that a head must be a multiple of."""
        major = (self.capability or _DEFAULT_CAPABILITY)[0]
        half = dtype in (torch.float16, torch.bfloat16)
        tensor_cores = major >= 8 or (major == 7 and half)
        alignment = 4 if major >= 8 else 1
        return max(alignment, 128 // (16 if half else 32)) if tensor_cores else alignment


def _flash_backward_fails(capability: tuple[int, int], head: int, dropout_p: float) -> bool:
    """check_requires_grad_and_head_dim_gt192_constraints_on_sm86_89_or_120."""
    small_sm = (8, 6) <= capability <= (8, 9) or capability in ((12, 0), (12, 1))
    return small_sm and (192 < head <= 224 or (head > 224 and dropout_p > 0.0))


def _flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """attention.cpp pads the head to a multiple of 8 for flash and cuts the output back."""
    head = query.shape[-1]
    missing = -head % 8
    scale = 1.0 / math.sqrt(head) if scale is None else scale
    if missing:
        query, key, value = (F.pad(t, (0, missing)) for t in (query, key, value))
    out: torch.Tensor = aten._scaled_dot_product_flash_attention(
        query, key, value, dropout, causal, False, scale=scale
    )[0]
    return out[..., :head] if missing else out


def _float_mask(mask: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor | None:
    """convert_boolean_attn_mask: a bool mask becomes 0 and -inf in the query's dtype."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    lowest = torch.full((), -math.inf, dtype=query.dtype, device=mask.device)
    zero = torch.zeros((), dtype=query.dtype, device=mask.device)
    return torch.where(mask, zero, lowest)


def _padded(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """preprocess_mask: the last dimension padded to 16, then expanded to all heads."""
    if mask is None:
        return None
    missing = -mask.shape[-1] % _BIAS_MULTIPLE
    if missing:
        width = mask.shape[-1]
        mask = F.pad(mask, (0, missing))[..., :width]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])


def _math(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
    grouped: bool,
) -> Any:
    """_scaled_dot_product_attention_math (transformers/attention.cpp), which saves `[b, heads, s, s]`.

    Written out: in torch's own the mask is added in place where no dispatch mode looks on, and dropout is
    fused on CUDA alone. 16-bit inputs are converted to fp32 first.
    """
    kind = query.dtype
    if kind in (torch.float16, torch.bfloat16):
        query, key, value = query.float(), key.float(), value.float()
    factor = math.sqrt(1.0 / math.sqrt(query.shape[-1]) if scale is None else scale)
    rows, columns = query.shape[-2], key.shape[-2]
    if causal:
        mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril()
    query = query * factor
    if grouped and query.shape[1] != key.shape[1]:
        times = query.shape[1] // key.shape[1]
        key, value = (aten.repeat_interleave.self_int(t, times, 1) for t in (key, value))
    scores = aten.matmul.default(query, key.transpose(-2, -1) * factor)
    if (added := _float_mask(mask, query)) is not None:
        scores.add_(added)
    scores = torch._safe_softmax(scores, -1)
    if dropout:
        scores = torch.native_dropout(scores, dropout, True)[0]
    return aten.matmul.default(scores, value).to(kind)
