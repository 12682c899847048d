"""BitFit: only the bias terms are trained.

Ben Zaken, Ravfogel and Goldberg 2021, "BitFit: Simple Parameter-efficient Fine-tuning for
Transformer-based Masked Language-models". Left out: a fresh task head, and the variants of a few biases.
"""

from __future__ import annotations

from torch import nn

from planner.errors import SetupError

__all__ = ["attach_bitfit", "bias_parameters"]


def bias_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter whose last name part is `bias`, by name; a tied one once."""
    return {
        name: parameter for name, parameter in model.named_parameters() if name.rpartition(".")[2] == "bias"
    }


def attach_bitfit(model: nn.Module) -> None:
    """Train the biases; all else is left as it is. Raises SetupError on a model without any."""
    biases = bias_parameters(model)
    if not biases:
        raise SetupError(
            f"BitFit trains bias terms, and {type(model).__name__} has none; choose lora or adapter."
        )
    for bias in biases.values():
        bias.requires_grad_(True)
