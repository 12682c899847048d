"""FlashAttention-2 over packed samples: torch's own kernels, told where each sample begins.

What transformers calls `flash_attention_2` asks the flash-attn package for its variable-length function;
torch carries the same kernels (aten/src/ATen/native/transformers/cuda/flash_attn), so no package is needed.
Registered with transformers under a name of its own, for which no mask is made.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

__all__ = ["PACKED_ATTENTION", "packed_attention"]

PACKED_ATTENTION = "torch_varlen"  # a name with "flash" in it makes transformers load the flash-attn package


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    *,
    cu_seq_lens_q: torch.Tensor,
    cu_seq_lens_k: torch.Tensor,
    max_length_q: int,
    max_length_k: int,
    **_more: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of each sample to itself: `[1, heads, b s, d]` in, `[1, b s, heads, d]` out.

    As transformers 5.23 does it (modeling_flash_attention_utils.py, `_flash_attention_forward`): keys and
    values keep their own heads, fp32 is cast to what autocast computes in, a window counts the token itself.
    """
    if query.dtype == torch.float32 and torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    rows = [t.transpose(1, 2).reshape(-1, t.shape[1], t.shape[3]) for t in (query, key, value)]
    windowed = sliding_window is not None and rows[1].shape[0] > sliding_window
    out = torch.ops.aten._flash_attention_forward(
        *rows,
        cu_seq_lens_q,
        cu_seq_lens_k,
        max_length_q,
        max_length_k,
        dropout,
        True,
        False,
        scale=scaling,
        window_size_left=sliding_window - 1 if windowed and sliding_window is not None else None,
    )[0]
    return out.unsqueeze(0), None


def _no_mask(**_arguments: Any) -> None:
    """Of lengths no mask is needed, as of transformers' flash_attention_mask without padding."""


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, _no_mask)
