"""Head and loss on some tokens at a time: the logits of a whole batch are never there."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutput

from planner.losses import LOSS_CHUNK_TOKENS

__all__ = ["chunked", "chunked_loss"]


def chunked(net: nn.Module) -> nn.Module:
    """The causal language model with a forward pass that gives the chunked loss alone, changed in place."""
    net.forward = MethodType(_forward, net)
    return net


def _forward(self: Any, labels: torch.Tensor, num_items_in_batch: Any = None, **inputs: Any) -> Any:
    """The decoder, then head and loss in chunks; the output holds no logits."""
    hidden = self.base_model(**inputs).last_hidden_state
    head = self.get_output_embeddings()
    return CausalLMOutput(loss=chunked_loss(hidden, head, labels, num_items_in_batch))


def chunked_loss(hidden: torch.Tensor, head: nn.Module, labels: torch.Tensor, items: Any) -> torch.Tensor:
    """The mean cross-entropy of each next token, or its sum over `items`; logits of 1,024 tokens at a time.

    `hidden` [b, s, h], `labels` [b, s] with -100 for what is not asked for. A checkpoint around head and loss
    of each chunk makes its logits again in the backward pass, as `torch.utils.checkpoint` does for layers.
    Equal to transformers' ForCausalLMLoss (loss/loss_utils.py) but for the order of the sum.
    """
    targets = F.pad(labels, (0, 1), value=-100)[..., 1:].reshape(-1)
    count = targets.ne(-100).sum() if items is None else items
    flat = hidden.reshape(-1, hidden.shape[-1])
    losses = [
        checkpoint(_summed, head, some, asked, use_reentrant=False)
        for some, asked in zip(flat.split(LOSS_CHUNK_TOKENS), targets.split(LOSS_CHUNK_TOKENS), strict=True)
    ]
    return torch.stack(losses).sum() / count


def _summed(head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(head(hidden).float(), targets, ignore_index=-100, reduction="sum")
