"""What a micro batch holds, and how many of its tokens are asked for."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from planner.model import Task

__all__ = ["tokens_asked_for"]


def tokens_asked_for(batches: Sequence[dict[str, torch.Tensor]], net: nn.Module, task: Task) -> Any:
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
