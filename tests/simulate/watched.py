"""What a piece of code takes on the simulated device, block by block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from planner.catalog.gpus import gpu as gpu_named
from planner.simulate.simulation import Simulation


class Taken(NamedTuple):
    """A block: who asked for it, and for how many bytes (before rounding)."""

    op: str
    size_bytes: int


class Watched(NamedTuple):
    """Every block in order, and what was alive at most (in whole blocks of 512 bytes)."""

    taken: list[Taken]
    peak_bytes: int

    def by(self, op: str) -> list[int]:
        """The sizes that one operation asked for, its own scratch included."""
        return [each.size_bytes for each in self.taken if each.op == f"aten.{op}"]


def watched(
    run: Callable[[], Any], *, gpu: str | None = None, phase: str = "forward", backward: bool = False
) -> Watched:
    """Runs `run` as one phase; with `backward`, then the backward pass of what it returns."""
    simulation = Simulation(gpu=gpu_named(gpu) if gpu else None)
    simulation.ledger.trail = []
    with simulation.device():
        with simulation.phase(phase, 1):
            out = run()
        if backward:
            with simulation.phase("backward", 1):
                out.backward()
    taken = [Taken(str(e[4]), e[1]) for e in simulation.ledger.trail if e[0] > 0]
    return Watched(taken, max(simulation.ledger.events, default=0))


def meta(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> torch.Tensor:
    """A tensor of the simulated device that was there before."""
    return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=grad)
