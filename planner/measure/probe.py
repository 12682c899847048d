"""Measure a setup: the training step in a process of its own, and what it reports. Never imports torch."""

from __future__ import annotations

import datetime
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from planner.errors import DeviceError, PlannerError
from planner.estimate import estimate
from planner.measure.answer import Readings, Rehearsal, measured_report, readings, rehearsal, reraise
from planner.measure.process import Child
from planner.record import Prediction, Record
from planner.report import MemoryReport
from planner.spec import Setup

__all__ = [
    "OnEvent",
    "device_event",
    "estimated",
    "measure",
    "measured",
    "recorded",
    "rehearse",
    "rehearsed",
    "simulated",
]

OnEvent = Callable[[Mapping[str, Any]], None]
STEPS = 2  # optimizer states appear at the end of the first step; the second is the steady one
TIME_LIMIT_S = 600.0


def measure(
    setup: Setup,
    *,
    time_limit_s: float = TIME_LIMIT_S,
    on_event: OnEvent | None = None,
    trace: str | Path | None = None,
    python: str | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> MemoryReport:
    """The memory of two optimizer steps of `setup` on cuda:0, with random weights; nothing is downloaded.

    Runs in a process group of its own, ended after `time_limit_s` or when `cancelled()` is true. `on_event`
    sees every event; `trace` is a file for the allocator's history; `python` another interpreter. Running out
    of memory is a result (`out_of_memory`). Of several GPUs the report is the largest rank's. Raises
    DeviceError where no CUDA device can be used, PlannerError where the run was ended or failed.
    """
    if setup.sharding.is_distributed:
        from planner.measure.together import largest_report

        return largest_report(
            setup, time_limit_s=time_limit_s, on_event=on_event, python=python, cancelled=cancelled
        )
    with Child(python=python) as child:
        found = measured(child, setup, time_limit_s, on_event=on_event, trace=trace, cancelled=cancelled)
    return measured_report(setup, found, date=now(), command=command_line())


def rehearse(
    setup: Setup,
    *,
    time_limit_s: float = TIME_LIMIT_S,
    on_event: OnEvent | None = None,
    python: str | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Rehearsal:
    """The same process and step on the CPU. Not a measurement: it tells phases and seconds, no memory."""
    with Child(python=python, cpu_only=True) as child:
        return rehearsed(child, setup, time_limit_s, on_event=on_event, cancelled=cancelled)


def measured(
    child: Child,
    setup: Setup,
    time_limit_s: float,
    *,
    on_event: OnEvent | None = None,
    trace: str | Path | None = None,
    cancelled: Callable[[], bool] | None = None,
    alone: int | None = None,
) -> Readings:
    """What a fresh child reads on cuda:0; `alone`: as this rank of several, of which no other is there."""
    path = str(Path(trace).absolute()) if trace is not None else None
    child.ask("measure", setup.to_dict(), steps=STEPS, trace=path, alone=alone)
    return readings(_heard(child, time_limit_s, on_event, cancelled))


def rehearsed(
    child: Child,
    setup: Setup,
    time_limit_s: float,
    *,
    on_event: OnEvent | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Rehearsal:
    """What a fresh child does on the CPU."""
    child.ask("rehearse", setup.to_dict(), steps=STEPS)
    return rehearsal(setup, readings(_heard(child, time_limit_s, on_event, cancelled)))


def device_event(child: Child, time_limit_s: float) -> Mapping[str, Any]:
    """The CUDA device as a child finds it, and what others and its empty context hold. Raises DeviceError."""
    child.ask("device", {})
    for event in _heard(child, time_limit_s, None, None):
        if event["event"] == "refused":
            reraise(event)
        if event["event"] == "device":
            return event
    raise DeviceError("the CUDA device did not answer; nvidia-smi shows whether the driver works.")


def simulated(
    child: Child,
    setup: Setup,
    time_limit_s: float,
    *,
    device: Mapping[str, Any] | None = None,
    cancelled: Callable[[], bool] | None = None,
    rank: int | None = None,
) -> Prediction:
    """The simulation by a child, with its libraries; where there is none, the Prediction says why."""
    child.ask("simulate", setup.to_dict(), device=dict(device) if device else None, rank=rank)
    try:
        for event in _heard(child, time_limit_s, None, cancelled):
            if event["event"] == "refused":
                reraise(event)
            if event["event"] == "report":
                return Prediction(report=MemoryReport.from_dict(event["report"]))
    except PlannerError as error:
        return Prediction(reason=str(error))
    return Prediction(reason="the simulation gave no report.")


def estimated(setup: Setup) -> Prediction:
    """The estimate, or why there is none."""
    try:
        return Prediction(report=estimate(setup))
    except PlannerError as error:
        return Prediction(reason=str(error))


def recorded(
    setup: Setup, found: Readings, simulation: Prediction, *, set_name: str = "", command: str | None = None
) -> Record:
    """The record of a measured run beside both predictions."""
    date, command = now(), command_line() if command is None else command
    return Record(
        setup=setup.to_dict(),
        report=measured_report(setup, found, date=date, command=command),
        device=found.found_device,
        versions=found.versions,
        date=date,
        seed=int(found.started["seed"]),
        command=command,
        estimate=estimated(setup),
        simulation=simulation,
        set=set_name,
        environment={str(k): str(v) for k, v in found.started["environment"].items()},
    )


def now() -> str:
    """The present moment in UTC, to the second, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def command_line() -> str:
    """The command of this process, its program by name alone."""
    return shlex.join(["planner", *sys.argv[1:]])


def _heard(
    child: Child,
    time_limit_s: float,
    on_event: OnEvent | None,
    cancelled: Callable[[], bool] | None,
) -> Iterator[dict[str, Any]]:
    for event in child.events(time_limit_s=time_limit_s, cancelled=cancelled):
        if on_event is not None:
            on_event(event)
        yield event
