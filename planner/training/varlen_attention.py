"""FlashAttention-2 by samples' lengths: torch's own kernels, told where each sample begins.

What transformers calls `flash_attention_2` asks the flash-attn package for its variable-length function;
torch carries the same kernels (aten/src/ATen/native/transformers/cuda/flash_attn), so no package is needed.
Registered with transformers under a name of its own, with the mask of `flash_attention_2`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    masking_utils,
    modeling_flash_attention_utils as by_lengths,
)

__all__ = ["VARLEN_ATTENTION", "varlen_attention"]

VARLEN_ATTENTION = "torch_varlen"  # a name with "flash" in it makes transformers load the flash-attn package


def varlen_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    *,
    is_causal: bool | None = None,
    **lengths: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of each sample to itself: `[b, heads, s, d]` in, `[b, s, heads, d]` out.

    Samples are those of a packed row, whose `lengths` the batch brings, or of rows that `attention_mask`
    `[b, s]` says the padding of, which is taken out before the kernel and put back as zeros behind it. As
    transformers 5.23 does it (integrations/flash_attention.py, modeling_flash_attention_utils.py): keys and
    values keep their own heads, fp32 is cast to what autocast computes in, a window counts the token itself.
    """
    if query.dtype == torch.float32 and torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    rows = [t.transpose(1, 2) for t in (query, key, value)]
    batch, length = rows[0].shape[:2]
    windowed = sliding_window is not None and rows[1].shape[1] > sliding_window
    places = None
    if attention_mask is None:
        starts = [lengths[f"cu_seq_lens_{name}"] for name in "qk"]
        longest = [lengths[f"max_length_{name}"] for name in "qk"]
        rows = [t.reshape(-1, *t.shape[2:]) for t in rows]
    else:
        taken: Any = by_lengths._upad_input(rows[0], rows[1], rows[2], attention_mask, length, _never)
        *rows, places, starts, longest = taken
    out = torch.ops.aten._flash_attention_forward(
        *rows,
        *starts,
        *longest,
        dropout,
        module.is_causal if is_causal is None else is_causal,
        False,
        scale=scaling,
        window_size_left=sliding_window - 1 if windowed and sliding_window is not None else None,
    )[0]
    if places is None:
        return out.view(batch, -1, *out.shape[1:]), None
    return by_lengths._pad_input(out, places, batch, length), None


def _never(*_arguments: Any) -> None:
    """transformers asks for this where queries are fewer than keys, as in generation."""
    raise AssertionError("a training step has as many queries as keys")


def _mask(**arguments: Any) -> torch.Tensor | None:
    """The padding [b, s] as the batch gives it, None where there is none."""
    mask: torch.Tensor | None = masking_utils.flash_attention_mask(**arguments)
    return mask


AttentionInterface.register(VARLEN_ATTENTION, varlen_attention)
AttentionMaskInterface.register(VARLEN_ATTENTION, _mask)
