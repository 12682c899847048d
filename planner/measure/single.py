"""One setup measured for the record: the run, and both predictions of the same moment."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from planner.measure.probe import TIME_LIMIT_S, OnEvent, measured, recorded, simulated
from planner.measure.process import Child
from planner.record import Prediction, Record
from planner.spec import Setup

__all__ = ["record_of"]


def record_of(
    setup: Setup,
    *,
    time_limit_s: float = TIME_LIMIT_S,
    on_event: OnEvent | None = None,
    trace: str | Path | None = None,
    python: str | None = None,
    cancelled: Callable[[], bool] | None = None,
    alone: int | None = None,
) -> Record:
    """Measure `setup` as `planner.measure.probe.measure` does, and simulate it beside for the same device.

    `alone`: measure this rank of a setup of several GPUs on one, among ranks that torch's fake process group
    imagines: its own memory is real, collectives carry nothing and NCCL is not there.
    The record is returned, not kept. Raises what `measure` raises; where the simulation fails, its
    Prediction says why.
    """
    with ExitStack() as stack:
        measuring = stack.enter_context(Child(python=python))
        pool = stack.enter_context(ThreadPoolExecutor(max_workers=1))
        started: list[Future[Prediction]] = []

        def hear(event: Mapping[str, Any]) -> None:
            if event["event"] == "device":
                simulating = stack.enter_context(Child(python=python, cpu_only=True))
                options: dict[str, Any] = {"device": event, "rank": alone}
                started.append(pool.submit(simulated, simulating, setup, time_limit_s, **options))
            if on_event is not None:
                on_event(event)

        found = measured(
            measuring,
            setup,
            time_limit_s,
            on_event=hear,
            trace=trace,
            cancelled=cancelled,
            alone=alone,
        )
        record = recorded(setup, found, started[0].result())
        return record if alone is None else _of_rank(record, alone)


def _of_rank(record: Record, rank: int) -> Record:
    note = f"Rank {rank} measured alone on one GPU: the other ranks and NCCL were not there."
    provenance = {**record.report.provenance, "rank": rank, "alone": True}
    notes = (note, *record.report.notes)
    return replace(record, report=replace(record.report, notes=notes, provenance=provenance))
