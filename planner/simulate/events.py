"""The simulated device's memory as a list of events: every block taken and given back, in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planner.catalog.gpus import Gpu
    from planner.simulate.simulation import Simulation
    from planner.spec import Setup

__all__ = ["Event", "simulated_events"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """A block taken, or given back where `freed`. `block` names the block between the two.

    `size_bytes` is what was asked for, before the allocator rounds. `site` says who asked: the operation and
    the module in a simulation, lines of Python in a real trace.
    """

    block: int
    size_bytes: int
    freed: bool
    phase: str = ""
    step: int | None = None
    site: str = ""


def simulated_events(setup: Setup, *, gpu: Gpu | str | None = None, **options: Any) -> tuple[Event, ...]:
    """Every event of the simulated run; the same options and errors as `simulate`."""
    from planner.simulate.run import simulate

    watched: list[Simulation] = []

    def watch(simulation: Simulation) -> None:
        simulation.ledger.trail = []
        watched.append(simulation)

    simulate(setup, gpu=gpu, watch=watch, **options)
    (simulation,) = watched
    return _events(simulation, simulation.ledger.trail or [])


def _events(simulation: Simulation, trail: list[tuple[Any, ...]]) -> tuple[Event, ...]:
    taken: dict[int, Event] = {}
    found: list[Event] = []
    for entry in trail:
        handle = entry[0]
        if not handle:  # torch takes no block for an empty tensor
            continue
        if handle < 0:
            begun = taken.pop(-handle)
            found.append(Event(block=begun.block, size_bytes=begun.size_bytes, freed=True))
            continue
        _, size_bytes, phase, step, op, place = entry
        module = simulation.modules.place(place) if isinstance(place, int) else place
        taken[handle] = Event(
            block=handle,
            size_bytes=size_bytes,
            freed=False,
            phase=phase,
            step=step,
            site=f"{op} in {module}" if module else str(op),
        )
        found.append(taken[handle])
    return tuple(found)
