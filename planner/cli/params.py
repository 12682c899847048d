"""`planner params`: how many parameters a model has, and which of them the method trains."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from planner.cli.flags import add_setup_flags, setup_from
from planner.cli.reply import Reply
from planner.estimate.parameters import TrainedTensor, parameters, trained_tensors
from planner.model import Model
from planner.spec import LoRA
from planner.targets import LoRATarget, lora_targets

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["HELP", "answer", "flags"]

HELP = "parameters of a model, exactly: in total, trained by the method, and for each matrix that LoRA adapts"


def flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    add_setup_flags(parser)


def answer(args: argparse.Namespace) -> Reply:
    """Numbers of parameters of the setup, by role, by adapted matrix and by trained tensor."""
    setup = setup_from(args)
    found = {
        "setup": setup.to_dict(),
        "parameters": parameters(setup).to_dict(),
        "base_by_role": _by_role(setup.model),
        "adapted": [
            _adapted(t, setup.method.lora_rank)
            for t in lora_targets(setup.model, setup.method.target_modules)
        ]
        if isinstance(setup.method, LoRA)
        else [],
        "trained": [_trained(t) for t in trained_tensors(setup)],
    }

    def show(console: Console) -> None:
        from planner.cli.tables import show_parameters

        show_parameters(console, found)

    return Reply(answer=found, show=show)


def _by_role(model: Model) -> dict[str, int]:
    """Parameters of the base model by role, tied weights where their storage is."""
    by_role: dict[str, int] = {}
    for tensor in model.tensors:
        if tensor.parameters:
            by_role[tensor.role] = by_role.get(tensor.role, 0) + tensor.parameters
    return by_role


def _adapted(target: LoRATarget, rank: int) -> dict[str, Any]:
    """One adapted matrix: what full fine-tuning would train of it, and what LoRA does, r (in + out).

    A layer's fused experts are one entry with all their matrices.
    """
    weight = target.weight
    full = weight.numel
    trainable = sum(rows * columns for rows, columns in target.shapes(rank))
    return {
        "module": weight.name if target.by_parameter else weight.module,
        "shape": list(weight.shape),
        "count": weight.count,
        "full": full,
        "trainable": trainable,
        "reduction": 1 - trainable / full,
    }


def _trained(tensor: TrainedTensor) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "shape": list(tensor.shape),
        "count": tensor.count,
        "parameters": tensor.numel * tensor.count,
        "added": tensor.added,
    }
