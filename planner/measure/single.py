"""One setup measured for the record: the run, and both predictions of the same moment."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
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
) -> Record:
    """Measure `setup` as `planner.measure.probe.measure` does, and simulate it beside for the same device.

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
                started.append(pool.submit(simulated, simulating, setup, time_limit_s, device=event))
            if on_event is not None:
                on_event(event)

        found = measured(
            measuring, setup, time_limit_s, on_event=hear, trace=trace, cancelled=cancelled
        )
        return recorded(setup, found, started[0].result())
