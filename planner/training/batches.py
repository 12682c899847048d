"""What a micro batch holds, and how many of its tokens are asked for."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from planner.batching import sample_lengths, takes_lengths
from planner.model import Task
from planner.spec import Training

__all__ = ["samples", "tokens_asked_for"]


def samples(training: Training, ids: torch.Tensor) -> dict[str, Any]:
    """What a collator makes of token ids `[b, s]` (packed `[1, b s]`), all int64 but the lengths (int32).

    Full: the ids alone. Padded: shorter samples filled up with token 0, which their labels and mask leave
    out, as transformers' collators pad on the right. Packed: what its DataCollatorWithFlattening returns, for
    flash attention with `return_flash_attn_kwargs`; no token is predicted from the sample before it.
    """
    s = training.seq_len
    if training.batching == "full":
        return {"input_ids": ids}
    if training.batching == "padded":
        lengths = torch.tensor(sample_lengths(training))
        there = torch.arange(s) < lengths[:, None]
        return {
            "input_ids": ids * there,
            "attention_mask": there.long(),
            "labels": ids.masked_fill(~there, -100),
        }
    positions = (torch.arange(ids.shape[1]) % s).view(1, -1)
    batch: dict[str, Any] = {
        "input_ids": ids,
        "labels": ids.masked_fill(positions == 0, -100),
        "position_ids": positions,
    }
    if takes_lengths(training):
        for name in ("q", "k"):
            batch[f"cu_seq_lens_{name}"] = torch.arange(0, ids.shape[1] + 1, s, dtype=torch.int32)
            batch[f"max_length_{name}"] = s
    return batch


def tokens_asked_for(batches: Sequence[dict[str, Any]], net: nn.Module, task: Task) -> Any:
    """The labels of a step that are asked for, which HF Trainer divides the sum of the losses by.

    A tensor without dimensions; None where the model takes no such number. Source: transformers 5.23,
    trainer.py, `_get_num_items_in_batch` and `model_accepts_loss_kwargs`.
    """
    model: Any = net.get_base_model() if isinstance(net, PeftModel) else net
    kinds = {parameter.kind for parameter in inspect.signature(model.forward).parameters.values()}
    if not getattr(model, "accepts_loss_kwargs", inspect.Parameter.VAR_KEYWORD in kinds):
        return None
    shifted = slice(1, None) if task == "causal-lm" else slice(None)  # a causal model's first is not
    asked = [batch["labels"][..., shifted].ne(-100).sum() for batch in batches]
    return torch.stack(asked).sum() / 1
