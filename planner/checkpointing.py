"""Activation checkpointing: which layers, and where their inputs wait."""

from __future__ import annotations

from typing import TYPE_CHECKING

from planner.checks import whole
from planner.errors import SetupError
from planner.units import gib

if TYPE_CHECKING:
    from planner.spec import Training

__all__ = ["check_checkpointing", "checkpoints_some", "offloaded_note"]


def check_checkpointing(training: Training) -> None:
    """Refuse values that no run takes, and a choice among checkpoints where there are none.

    Raises SetupError.
    """
    for name in ("activation_checkpointing", "checkpoint_offload"):
        if not isinstance(getattr(training, name), bool):
            raise SetupError(f"{name} must be true or false, got {getattr(training, name)!r}.")
    whole("checkpoint_every", training.checkpoint_every)
    if training.activation_checkpointing or not checkpoints_some(training):
        return
    name = "checkpoint_offload" if training.checkpoint_offload else "checkpoint_every"
    raise SetupError(
        f"{name} chooses among the checkpoints of activation_checkpointing, which is off; turn that on, or "
        f"leave {name} out."
    )


def checkpoints_some(training: Training) -> bool:
    """Whether checkpoints are other than the usual ones: of every layer, its input on the GPU."""
    return training.checkpoint_offload or training.checkpoint_every != 1


def offloaded_note(size_bytes: int) -> str:
    """What a report says of layers' inputs in the host's memory."""
    return (
        f"{gib(size_bytes)} of layers' inputs ({size_bytes:,} bytes) wait in pinned memory of the host, "
        "where torch may round each up to a power of two. It is no memory of the GPU, so no number here "
        "holds it; the host must have room for it."
    )
