"""What the optimizer step needs beside weights, gradients and states."""

from __future__ import annotations

from planner.estimate.parameters import TrainedTensor
from planner.estimate.recipes import Recipe
from planner.estimate.resident import block_bytes
from planner.spec import Optimizer

__all__ = ["step_temporaries_bytes"]


def step_temporaries_bytes(tensors: tuple[TrainedTensor, ...], recipe: Recipe, optimizer: Optimizer) -> int:
    """Temporaries of one optimizer step.

    `adamw` (torch's foreach form) holds the square roots of the second moments, as large as one state of
    all trained parameters (torch/optim/adam.py, `_multi_tensor_adam`: exp_avg_sq_sqrt). `adamw-fused` and
    `sgd` without momentum work in place.
    """
    if optimizer != "adamw":
        return 0
    return sum([block_bytes(t.numel * (recipe.state or t.element_bytes)) * t.count for t in tensors])
