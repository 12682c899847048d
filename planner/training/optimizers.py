"""The optimizers as users build them: torch's own defaults, and the others as HF Trainer sets them up."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import nn

from planner.errors import SetupError
from planner.optimizers import EIGHT_BIT, FROM_BITSANDBYTES

__all__ = ["optimizer_for", "require_library"]

_LEARNING_RATE = 1e-4
_MOMENTUM = 0.9  # torch.optim.SGD has no default other than 0; 0.9 is that of its own documentation's example


def require_library(name: str) -> None:
    """Import what the optimizer needs beside torch. Raises SetupError where it is not installed."""
    if name not in FROM_BITSANDBYTES:
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise SetupError(
            f"optimizer {name} needs bitsandbytes, which is not installed; "
            "install it with: pip install -r requirements-qlora.txt"
        )
    importlib.import_module("bitsandbytes")


def optimizer_for(name: str, net: nn.Module) -> torch.optim.Optimizer:
    """The optimizer over the net's trained parameters. `adamw` is torch's default on CUDA: foreach.

    `adafactor` is transformers' with a fixed learning rate (trainer_optimizer.py, _get_adafactor).
    """
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    if name in FROM_BITSANDBYTES:
        return _of_bitsandbytes(name, net, trained)
    if name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(trained, lr=_LEARNING_RATE, scale_parameter=False, relative_step=False)
    if name == "adamw":
        return torch.optim.AdamW(trained, lr=_LEARNING_RATE)
    if name == "adamw-fused":
        return torch.optim.AdamW(trained, lr=_LEARNING_RATE, fused=True)
    if name == "adamw-single":
        return torch.optim.AdamW(trained, lr=_LEARNING_RATE, foreach=False, fused=False)
    if name == "sgd":
        return torch.optim.SGD(trained, lr=_LEARNING_RATE)
    if name == "sgd-momentum":
        return torch.optim.SGD(trained, lr=_LEARNING_RATE, momentum=_MOMENTUM)
    raise SetupError(f"optimizer {name} is not known to the training step.")


def _of_bitsandbytes(name: str, net: nn.Module, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
    """bitsandbytes' optimizer; in 8 bits with fp32 states of embeddings, as HF Trainer asks for (trainer.py).

    The overrides stand in a manager of this optimizer's own: bitsandbytes' is one for the whole process and
    knows parameters by their addresses, which a later run may hold again.
    """
    from bitsandbytes import optim

    kinds: dict[str, Any] = {
        "adamw-8bit": optim.AdamW8bit,
        "paged-adamw-8bit": optim.PagedAdamW8bit,
        "paged-adamw-32bit": optim.PagedAdamW32bit,
        "lion-8bit": optim.Lion8bit,
        "lion-32bit": optim.Lion32bit,
        "paged-lion-8bit": optim.PagedLion8bit,
        "paged-lion-32bit": optim.PagedLion32bit,
    }
    optimizer = kinds[name](trained, lr=_LEARNING_RATE)
    if name not in EIGHT_BIT:
        return optimizer  # type: ignore[no-any-return]
    overrides = optim.GlobalOptimManager.__new__(optim.GlobalOptimManager)
    overrides.initialize()
    for module in net.modules():
        if isinstance(module, nn.Embedding):
            overrides.register_module_override(module, "weight", {"optim_bits": 32})
    optimizer.mng = overrides
    return optimizer  # type: ignore[no-any-return]
