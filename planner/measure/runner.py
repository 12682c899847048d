"""Run a matrix of setups on the device: each in a fresh process, recorded at once, within a budget of time.

A process waits with its libraries imported while the one before measures, so that isolation costs no time;
simulations run ahead on the other cores.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from planner.errors import DeviceError, PlannerError
from planner.measure.ahead import simulations
from planner.measure.matrix import Matrix
from planner.measure.probe import device_event, estimated, measured, now, recorded, rehearsed
from planner.measure.process import Child
from planner.measure.records import append, append_line, json_lines, read
from planner.record import Prediction, Record, setup_key
from planner.spec import Setup
from planner.units import gib

__all__ = ["MatrixRun", "Outcome", "run_matrix"]

State = Literal["recorded", "rehearsed", "skipped", "failed"]
_DEVICE_TIME_LIMIT_S = 180.0
_CPU_SHARE = 0.5  # of free main memory: what a rehearsal may take


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one setup; `words` says it in one line."""

    setup: Setup
    state: State
    words: str
    record: Record | None = None


@dataclass(frozen=True, kw_only=True)
class MatrixRun:
    """One call of the runner. `present` setups had a record before, `left` are for the next call."""

    outcomes: tuple[Outcome, ...]
    present: int
    left: int
    records: tuple[Record, ...]

    def count(self, state: State) -> int:
        """How many setups ended so."""
        return sum(outcome.state == state for outcome in self.outcomes)


def run_matrix(
    matrix: Matrix,
    out: Path,
    *,
    budget_s: float,
    rehearse: bool = False,
    time_limit_s: float = 600.0,
    try_all: bool = False,
    on_outcome: Callable[[Outcome], None] | None = None,
    python: str | None = None,
) -> MatrixRun:
    """Run what `out` has no record of, until `budget_s` seconds are over; call again to go on.

    Records go to `out/records.jsonl`, each as soon as it is there; failures, tried again last, to
    `out/failures.jsonl`. What the device cannot hold by simulation is skipped unless `try_all`. With
    `rehearse` everything runs on the CPU, and `out/rehearsals.jsonl` takes what is no measurement. Raises
    DeviceError where no device can be used, PlannerError where `out` cannot be written.
    """
    ends_at = time.monotonic() + budget_s
    with ExitStack() as stack:
        children = stack.enter_context(_children(python, cpu_only=rehearse))
        device = None if rehearse else _device(children)
        todo = _todo(matrix, out, device, rehearse=rehearse)
        jobs = [(setup, device) for setup in todo]
        predict = stack.enter_context(simulations(jobs, time_limit_s=time_limit_s, python=python))
        outcomes: list[Outcome] = []
        context_bytes = 0 if device is None else int(device["context_bytes"] or 0)
        for number, setup in enumerate(todo):
            if time.monotonic() >= ends_at:
                break
            prediction = predict(number, ends_at - time.monotonic())
            outcome = None
            if prediction is not None:
                outcome = _too_large(setup, prediction, device, context_bytes, try_all=try_all)
            limit = min(time_limit_s, ends_at - time.monotonic())
            if outcome is None and prediction is not None and limit > 0:
                outcome = _run(setup, prediction, children(), limit, out, matrix.name, rehearse=rehearse)
            if outcome is None or (outcome.state == "failed" and time.monotonic() >= ends_at):
                break  # cut by the budget: for the next call
            if outcome.state == "failed":
                _note_failure(out, outcome)
            if outcome.record is not None:
                context = outcome.record.report.provenance.get("context_bytes", 0)
                context_bytes = max(context_bytes, int(context))
            outcomes.append(outcome)
            if on_outcome is not None:
                on_outcome(outcome)
    kept = out / "records.jsonl"
    return MatrixRun(
        outcomes=tuple(outcomes),
        present=len(matrix.setups) - len(todo),
        left=len(todo) - len(outcomes),
        records=read([kept]).records if kept.exists() else (),
    )


@contextmanager
def _children(python: str | None, *, cpu_only: bool) -> Iterator[Callable[[], Child]]:
    """A function that gives a fresh process, imported and idle, and ends the one before."""
    ahead = 1 if cpu_only else max(1, min(5, (os.cpu_count() or 1) // 3))
    waiting: deque[Child] = deque()
    used: list[Child] = []

    def fresh() -> Child:
        while used:
            used.pop().close()
        while len(waiting) <= ahead:
            waiting.append(Child(python=python, cpu_only=cpu_only))
        used.append(waiting.popleft())
        return used[-1]

    try:
        yield fresh
    finally:
        for child in (*used, *waiting):
            child.close()


def _device(children: Callable[[], Child]) -> Mapping[str, Any]:
    return device_event(children(), _DEVICE_TIME_LIMIT_S)


def _todo(matrix: Matrix, out: Path, device: Mapping[str, Any] | None, *, rehearse: bool) -> list[Setup]:
    """The setups without a record on this device, those that failed before at the end."""
    done: set[str] = set()
    if rehearse:
        done = {setup_key(line["setup"]) for line in json_lines(out / "rehearsals.jsonl")}
    elif (out / "records.jsonl").exists():
        name = device["name"] if device else ""
        records = read([out / "records.jsonl"]).records
        done = {record.key for record in records if record.device.name == name}
    failed = {setup_key(line["setup"]) for line in json_lines(out / "failures.jsonl")}
    todo = [setup for setup in matrix.setups if setup_key(setup.to_dict()) not in done]
    return sorted(todo, key=lambda setup: setup_key(setup.to_dict()) in failed)


def _too_large(
    setup: Setup,
    prediction: Prediction,
    device: Mapping[str, Any] | None,
    context_bytes: int,
    *,
    try_all: bool,
) -> Outcome | None:
    """The outcome of a setup that the device cannot hold by simulation."""
    report = prediction.report
    if report is None or try_all:
        return None
    needed = (report.peak_reserved_bytes or report.peak_allocated_bytes) + context_bytes
    if device is None:
        free, place = int(_free_main_memory_bytes() * _CPU_SHARE), "of free main memory"
    else:
        free = int(device["total_bytes"]) - int(device["others_bytes"] or 0)
        place = f"free on {device['name']}"
    if needed <= free:
        return None
    return Outcome(
        setup=setup, state="skipped", words=f"skipped: needs {gib(needed)}, and there is {gib(free)} {place}"
    )


def _free_main_memory_bytes() -> int:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 8 << 30  # GUESS: where the system does not say


def _run(
    setup: Setup,
    prediction: Prediction,
    child: Child,
    limit_s: float,
    out: Path,
    set_name: str,
    *,
    rehearse: bool,
) -> Outcome:
    """One setup in one fresh process, kept at once."""
    try:
        if rehearse:
            found = rehearsed(child, setup, limit_s)
            line = {"schema": 1, "date": now(), "set": set_name, **found.to_dict()}
            line |= {"estimate": estimated(setup).to_dict(), "simulation": prediction.to_dict()}
            append_line(json.dumps(line, allow_nan=False), out / "rehearsals.jsonl")
            seconds = sum(phase.seconds for phase in found.phases)
            return Outcome(setup=setup, state="rehearsed", words=f"rehearsed on the CPU in {seconds:.1f} s")
        record = recorded(setup, measured(child, setup, limit_s), prediction, set_name=set_name)
    except DeviceError as error:
        return Outcome(setup=setup, state="skipped", words=f"skipped: {error}")
    except PlannerError as error:
        return Outcome(setup=setup, state="failed", words=f"failed: {error}")
    append(record, out / "records.jsonl")
    return Outcome(setup=setup, state="recorded", words=_found(record), record=record)


def _found(record: Record) -> str:
    report = record.report
    if report.out_of_memory is not None:
        phase = report.out_of_memory.phase.replace("_", " ")
        return f"out of memory in {phase} at {gib(report.peak_allocated_bytes)}"
    words = [f"measured {gib(report.peak_allocated_bytes)}"]
    for name, prediction in (("simulated", record.simulation), ("estimated", record.estimate)):
        if prediction.report is not None:
            error = prediction.report.peak_allocated_bytes / report.peak_allocated_bytes - 1
            words.append(f"{name} {100 * error:+.3f} %")
    return ", ".join(words)


def _note_failure(out: Path, outcome: Outcome) -> None:
    line = {"date": now(), "setup": outcome.setup.to_dict(), "reason": outcome.words}
    append_line(json.dumps(line), out / "failures.jsonl")
