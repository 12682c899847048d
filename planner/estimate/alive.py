"""What is alive at one moment of a step, beside weights and states."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Alive"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Alive:
    """Bytes alive at one moment beside weights (or shards) and states, by what they are for."""

    phase: str
    gradients: int = 0
    activations: int = 0
    logits_and_loss: int = 0
    temporaries: int = 0
    workspace: int = 0

    @property
    def total_bytes(self) -> int:
        """Their sum."""
        return self.gradients + self.activations + self.logits_and_loss + self.temporaries + self.workspace
