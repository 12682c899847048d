"""A warm process that answers a sweep's jobs, started again where it is lost; measuring needs fresh ones."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from planner.errors import PlannerError
from planner.measure.probe import device_event
from planner.measure.process import Child
from planner.measure.single import record_of
from planner.process import Ended, Served
from planner.report import MemoryReport
from planner.spec import Setup
from planner.sweep.jobs import Job
from planner.sweep.locks import one_at_a_time
from planner.sweep.rows import answered, failed_row

__all__ = ["MOST_TRIES", "Answering"]

MOST_TRIES = 3  # of a job whose process is lost
_POLL_SECONDS = 0.2
_START_LIMIT_S = 120.0  # importing torch takes 2 to 10 s; a cold disk on a busy machine far more
_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",  # nothing is calculated on tensors without storage
    "MALLOC_ARENA_MAX": "2",
}


class Answering:
    """Answers jobs one after the other, in a process of `planner.sweep.worker` started with the first.

    Not for two threads at a time; `close` may come from any.
    """

    def __init__(self, verb: str, *, time_limit_s: float, command: list[str] | None = None) -> None:
        """No process yet. `time_limit_s` is for one job; `command` another program with the same manners."""
        self._verb, self._time_limit_s = verb, time_limit_s
        self._command = command or [sys.executable, "-P", "-m", "planner.sweep.worker"]
        self._process: Served | None = None
        self._over = threading.Event()
        self._has_device = False

    def rows(self, jobs: Sequence[Job]) -> Iterator[dict[str, Any]]:
        """A row for each job, in order, as they come; fewer once closed. Raises DeviceError when measuring
        where no device can be used, PlannerError where no process can be started.
        """
        if self._verb == "measure":
            yield from self._measured(jobs)
            return
        todo, tries = list(jobs), 0
        while todo and not self._over.is_set():
            try:
                for found in self._said(tuple(todo)):
                    del todo[0]
                    tries = 0
                    yield found
            except _Lost as lost:
                self._forget()
                tries += 1
                if lost.final or tries >= MOST_TRIES:
                    yield failed_row(todo.pop(0), self._verb, str(lost))
                    tries = 0

    def close(self) -> None:
        """End the process at once."""
        self._over.set()
        self._forget()

    def _forget(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.close()

    def _said(self, jobs: Sequence[Job]) -> Iterator[dict[str, Any]]:
        """The process's rows. Raises _Lost where it dies or takes too long with one of them."""
        starting = self._process is None
        process = self._process = self._process or Served(
            self._command, name="the sweep's process", environment=_ENVIRONMENT
        )
        process.send({"verb": self._verb, "jobs": [{"key": j.key, "setup": dict(j.setup)} for j in jobs]})
        for job in jobs:
            ends_at = time.monotonic() + self._time_limit_s + (_START_LIMIT_S if starting else 0.0)
            starting = False
            while True:
                if self._over.is_set():
                    return
                if time.monotonic() > ends_at:
                    limit = f"{self._time_limit_s:g} s"
                    raise _Lost(f"it took longer than {limit}; allow more with --time-limit-s.", final=True)
                try:
                    event = process.heard(_POLL_SECONDS)
                except Ended as end:
                    raise _Lost(_death(end)) from None
                if event.get("event") == "row" and event["row"]["key"] == job.key:
                    yield event["row"]
                    break

    def _measured(self, jobs: Sequence[Job]) -> Iterator[dict[str, Any]]:
        """Each in fresh processes of `planner.measure`, one at a time on the machine."""
        records: list[dict[str, Any]] = []
        if not self._has_device:
            _check_device()
            self._has_device = True

        def measure(setup: Setup) -> MemoryReport:
            record = record_of(setup, time_limit_s=self._time_limit_s, cancelled=self._over.is_set)
            records.append(record.to_dict())
            return record.report

        for job in jobs:
            records.clear()
            with one_at_a_time():
                found = answered(job, self._verb, measure)
            if self._over.is_set() and found["state"] != "done":
                return
            yield found | ({"record": records[0]} if records else {})


def _check_device() -> None:
    """Raises DeviceError where no setup at all could be measured."""
    with Child() as child:
        device_event(child, _START_LIMIT_S)


class _Lost(PlannerError):
    """The process died or was ended; `final` where another try would end the same."""

    def __init__(self, reason: str, *, final: bool = False) -> None:
        super().__init__(reason)
        self.final = final


def _death(end: Ended) -> str:
    if end.signal_name:
        hint = "; the machine may have run out of main memory" if end.starved else ""
        return f"its process was killed {MOST_TRIES} times ({end.signal_name}){hint}."
    return f"its process ended {MOST_TRIES} times with exit code {end.code}."
