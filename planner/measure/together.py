"""A run of several ranks on one machine: one record a rank, the largest and the slowest named.

Never imports torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from planner.errors import PlannerError
from planner.measure.answer import Rehearsal, readings, rehearsal
from planner.measure.probe import STEPS, TIME_LIMIT_S, OnEvent, recorded, simulated
from planner.measure.process import Child
from planner.measure.ranks import Ranks
from planner.record import Record
from planner.report import MemoryReport
from planner.spec import Setup

__all__ = ["RankResult", "Together", "largest_report", "measure_together", "rehearse_together"]


@dataclass(frozen=True, kw_only=True)
class RankResult:
    """What one rank did: a record where a GPU was measured, a rehearsal where none was."""

    rank: int
    seconds: float
    record: Record | None = None
    rehearsal: Rehearsal | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values; bytes only where they were measured."""
        values: dict[str, Any] = {"rank": self.rank, "seconds": round(self.seconds, 3)}
        if self.record is not None:
            report = self.record.report
            values |= {
                "peak_allocated_bytes": report.peak_allocated_bytes,
                "peak_reserved_bytes": report.peak_reserved_bytes,
                "peak_phase": report.peak_phase,
                "out_of_memory": report.out_of_memory is not None,
            }
        return values


@dataclass(frozen=True, kw_only=True)
class Together:
    """All ranks of one run that came to an end of their own, in order."""

    setup: Setup
    ranks: tuple[RankResult, ...]

    @property
    def slowest(self) -> RankResult:
        """The rank that took longest; the first of equals."""
        return max(self.ranks, key=lambda result: result.seconds)

    @property
    def largest(self) -> RankResult:
        """The rank with the highest peak of allocated memory. Raises PlannerError where none was measured."""
        measured = [(result.record, result) for result in self.ranks if result.record is not None]
        if not measured:
            raise PlannerError("a rehearsal measures no memory; only a CUDA device does.")
        return max(measured, key=lambda pair: pair[0].report.peak_allocated_bytes)[1]


def measure_together(
    setup: Setup,
    *,
    launcher: str = "torchrun",
    time_limit_s: float = TIME_LIMIT_S,
    on_event: OnEvent | None = None,
    python: str | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Together:
    """The memory of two optimizer steps on each of the setup's GPUs, all in this machine; one record a rank.

    Where a rank runs out of memory the others cannot go on: the records are those of ranks that came to an
    end. The simulation beside them is rank 0's. Raises what `measure` raises; a rank that dies ends them all.
    """
    events = _events(setup, "measure", launcher, time_limit_s, on_event, python, cancelled, cpu_only=False)
    found = {rank: readings(heard) for rank, heard in events.items()}
    first = found[min(found)]
    with Child(python=python, cpu_only=True) as child:
        simulation = simulated(child, setup, time_limit_s, device=first.device, cancelled=cancelled)
    results = []
    for rank, each in sorted(found.items()):
        record = recorded(setup, each, simulation)
        note = f"Rank {rank} of {setup.sharding.num_gpus:,}, started by {launcher}."
        report = dataclasses.replace(
            record.report,
            notes=(note, *record.report.notes),
            provenance={**record.report.provenance, "rank": rank, "launcher": launcher},
        )
        record = dataclasses.replace(record, report=report)
        results.append(RankResult(rank=rank, seconds=_seconds(each.phases), record=record))
    return Together(setup=setup, ranks=tuple(results))


def largest_report(setup: Setup, **options: Any) -> MemoryReport:
    """The report of the rank with the highest peak; the options and errors of `measure_together`."""
    record = measure_together(setup, **options).largest.record
    assert record is not None
    return record.report


def rehearse_together(
    setup: Setup,
    *,
    launcher: str = "torchrun",
    time_limit_s: float = TIME_LIMIT_S,
    on_event: OnEvent | None = None,
    python: str | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Together:
    """The same processes and step on the CPU, over gloo. Not a measurement: it tells phases and seconds."""
    events = _events(setup, "rehearse", launcher, time_limit_s, on_event, python, cancelled, cpu_only=True)
    results = []
    for rank, heard in sorted(events.items()):
        found = readings(heard)
        done = rehearsal(setup, found)
        results.append(RankResult(rank=rank, seconds=_seconds(found.phases), rehearsal=done))
    return Together(setup=setup, ranks=tuple(results))


def _events(
    setup: Setup,
    job: str,
    launcher: str,
    time_limit_s: float,
    on_event: OnEvent | None,
    python: str | None,
    cancelled: Callable[[], bool] | None,
    *,
    cpu_only: bool,
) -> dict[int, list[dict[str, Any]]]:
    """Each rank's events; of ranks that could not go on because another one stopped, none.

    Raises the error of a rank that refused.
    """
    heard: dict[int, list[dict[str, Any]]] = {rank: [] for rank in range(setup.sharding.num_gpus)}
    with Ranks(setup.sharding.num_gpus, launcher=launcher, python=python, cpu_only=cpu_only) as ranks:
        ranks.ask(job, setup.to_dict(), steps=STEPS)
        for rank, event in ranks.events(time_limit_s=time_limit_s, cancelled=cancelled):
            heard[rank].append(event)
            if on_event is not None:
                on_event({**event, "rank": rank})
    ended = {rank: events for rank, events in heard.items() if _kinds(events) & {"done", "refused"}}
    refused = [events for events in ended.values() if "refused" in _kinds(events)]
    for events in refused:
        readings(events)  # raises what it says
    return ended


def _kinds(events: list[dict[str, Any]]) -> set[str]:
    return {str(event.get("event")) for event in events}


def _seconds(phases: tuple[Mapping[str, Any], ...]) -> float:
    return sum(float(phase["seconds"]) for phase in phases)
