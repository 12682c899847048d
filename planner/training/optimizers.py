"""The optimizers, with torch's own defaults."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from planner.errors import SetupError

__all__ = ["optimizer_for"]

_LEARNING_RATE = 1e-4


def optimizer_for(name: str, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer over the trained parameters. `adamw` is torch's default on CUDA: foreach."""
    trained = list(parameters)
    if name == "adamw":
        return torch.optim.AdamW(trained, lr=_LEARNING_RATE)
    if name == "adamw-fused":
        return torch.optim.AdamW(trained, lr=_LEARNING_RATE, fused=True)
    if name == "sgd":
        return torch.optim.SGD(trained, lr=_LEARNING_RATE)
    raise SetupError(f"optimizer {name} is not known to the training step; allowed: adamw, adamw-fused, sgd.")
