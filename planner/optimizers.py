"""The optimizers by name, and which library brings each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from planner.errors import SetupError
from planner.units import gib

if TYPE_CHECKING:
    from planner.spec import Training

__all__ = [
    "EIGHT_BIT",
    "FROM_BITSANDBYTES",
    "PAGED",
    "Optimizer",
    "ZeroGrad",
    "check_optimizer",
    "paged_note",
]

Optimizer = Literal[
    "adamw",
    "adamw-fused",
    "adamw-single",
    "adamw-8bit",
    "paged-adamw-8bit",
    "paged-adamw-32bit",
    "adafactor",
    "sgd",
    "sgd-momentum",
    "lion-8bit",
    "lion-32bit",
    "paged-lion-8bit",
    "paged-lion-32bit",
]
ZeroGrad = Literal["none", "zero"]

EIGHT_BIT = ("adamw-8bit", "paged-adamw-8bit", "lion-8bit", "paged-lion-8bit")
"""bitsandbytes' optimizers as HF Trainer sets them up: states in 8 bits, those of embeddings in fp32."""

FROM_BITSANDBYTES = (*EIGHT_BIT, "paged-adamw-32bit", "lion-32bit", "paged-lion-32bit")
"""All of bitsandbytes'; states in 32 bits are fp32 whatever the weights are."""

PAGED = tuple(name for name in FROM_BITSANDBYTES if name.startswith("paged-"))
"""Those whose states are managed memory, 100,000 numbers and more of them."""


def check_optimizer(training: Training) -> None:
    """Refuse an optimizer that the precision contradicts. Raises SetupError."""
    if training.optimizer in EIGHT_BIT and training.precision == "textbook":
        raise SetupError(
            f"precision textbook counts optimizer states in fp32, optimizer {training.optimizer} keeps them "
            "in 8 bits; choose precision bf16, or optimizer adamw."
        )


def paged_note(paged_bytes: int) -> str:
    """What a report says of states in paged memory."""
    return (
        f"{gib(paged_bytes)} of optimizer states ({paged_bytes:,} bytes) are paged by bitsandbytes: managed "
        "memory that moves between the GPU and the host. torch does not count it, so no number here holds "
        "it; the host must have room for it."
    )
