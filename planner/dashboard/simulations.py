"""Simulations for all sessions of the server: one warm process, one job at a time, results kept.

No streamlit in here: threads and a queue. Nothing imports torch; the process does.
"""

from __future__ import annotations

import atexit
import dataclasses
import json
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from planner.dashboard.lines import public_line
from planner.dashboard.worker import IdledOut, Worker
from planner.errors import PlannerError
from planner.report import MemoryReport
from planner.spec import Setup

__all__ = ["Simulated", "Simulations", "State"]

State = Literal["waiting", "running", "done", "failed"]
_STEP = ("forward", "backward", "optimizer_step")
_STAGES = ("load", "attach", *(f"{name} {step}" for step in (1, 2) for name in _STEP))


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """One simulation as it stands. `ahead` others come first; `phase` is "" until torch is imported.

    Where it is done, `report`, and `begins`: (phase, step, number of the timeline's event at which it
    begins). Where it failed, `reason` in one line.
    """

    setup: Setup
    state: State
    ahead: int = 0
    phase: str = ""
    step: int | None = None
    report: MemoryReport | None = None
    begins: tuple[tuple[str, int | None, int], ...] = ()
    reason: str = ""

    @property
    def active(self) -> bool:
        """Whether something is still to come."""
        return self.state in ("waiting", "running")

    @property
    def share(self) -> float:
        """How far it is, 0 to 1, by phases."""
        stage = self.phase if self.step is None else f"{self.phase} {self.step}"
        return (_STAGES.index(stage) + 1) / (len(_STAGES) + 1) if stage in _STAGES else 0.0


class Simulations:
    """The queue before the one process, and its results, the latest `most_kept` of them.

    A visitor is any hashable name of a session. Everything may be called from any thread; `ask` returns at
    once. The process is started with the first job and ended when the last visitor has left.
    """

    def __init__(
        self,
        start: Callable[[], Worker] = Worker,
        *,
        time_limit_s: float = 300.0,
        most_kept: int = 128,
        most_waiting: int = 24,
    ) -> None:
        """No process yet. `time_limit_s` is for one simulation."""
        self._start = start
        self._time_limit_s, self._most_kept, self._most_waiting = time_limit_s, most_kept, most_waiting
        self._turn = threading.Condition()
        self._waiting: OrderedDict[str, Setup] = OrderedDict()
        self._wanted_by: dict[str, set[str]] = {}
        self._running: tuple[str, Simulated] | None = None
        self._ended: OrderedDict[str, Simulated] = OrderedDict()
        self._visitors: set[str] = set()
        self._worker: Worker | None = None
        self._thread: threading.Thread | None = None
        self._number = 0
        self._closed = False
        atexit.register(self.close)

    @property
    def pid(self) -> int | None:
        """The process id of the simulating process, None where none runs."""
        worker = self._worker
        return worker.pid if worker is not None and worker.alive else None

    def ask(self, setup: Setup, visitor: str) -> Simulated:
        """Queue a simulation, or join the one of the same setup; a failed one is tried again.

        Raises PlannerError where too many are waiting.
        """
        key = key_of(setup)
        with self._turn:
            self._visitors.add(visitor)
            done = self._ended.get(key)
            if done is not None and done.state == "done":
                return self._shown(key, setup)
            running = self._running is not None and self._running[0] == key
            if not running and key not in self._waiting:
                if len(self._waiting) >= self._most_waiting:
                    raise PlannerError(
                        f"{len(self._waiting)} simulations are waiting already; try again in a minute."
                    )
                self._ended.pop(key, None)
                self._waiting[key] = setup
            self._wanted_by.setdefault(key, set()).add(visitor)
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._work, name="simulations", daemon=True)
                self._thread.start()
            self._turn.notify_all()
            return self._shown(key, setup)

    def of(self, setup: Setup) -> Simulated | None:
        """The simulation of this setup as it stands, None where nobody asked for it."""
        key = key_of(setup)
        with self._turn:
            known = key in self._ended or key in self._waiting
            if known or (self._running is not None and self._running[0] == key):
                return self._shown(key, setup)
        return None

    def forget_waiting(self, visitor: str) -> None:
        """This visitor asks for something else now: what of theirs has not begun is dropped."""
        with self._turn:
            for key in tuple(self._waiting):
                self._drop(key, visitor)

    def cancel(self, setup: Setup, visitor: str) -> None:
        """This visitor wants it no longer; where nobody else does, it is dropped or its process ended."""
        with self._turn:
            self._drop(key_of(setup), visitor)
            self._turn.notify_all()

    def leave(self, visitor: str) -> None:
        """A visitor's session is over: cancel what only they wanted; with the last one the process ends."""
        with self._turn:
            for key in tuple(self._wanted_by):
                self._drop(key, visitor)
            self._visitors.discard(visitor)
            if not self._visitors and self._running is None and self._worker is not None:
                self._worker.close()
                self._worker = None
            self._turn.notify_all()

    def close(self) -> None:
        """End the process and forget everything: the server ends, or its caches were cleared."""
        atexit.unregister(self.close)
        with self._turn:
            self._closed = True
            self._waiting.clear()
            self._wanted_by.clear()
            if self._worker is not None:
                self._worker.close()
            self._turn.notify_all()

    def _drop(self, key: str, visitor: str) -> None:
        """With the lock held: one wish less. A running job notices by itself that nobody wants it."""
        wanted = self._wanted_by.get(key)
        if wanted is None:
            return
        wanted.discard(visitor)
        if not wanted:
            del self._wanted_by[key]
            self._waiting.pop(key, None)

    def _shown(self, key: str, setup: Setup) -> Simulated:
        """With the lock held: a known simulation, under the setup that was asked for."""
        if key in self._ended:
            self._ended.move_to_end(key)
            return _under(self._ended[key], setup)
        if self._running is not None and self._running[0] == key:
            return _under(self._running[1], setup)
        ahead = list(self._waiting).index(key) + (self._running is not None)
        return Simulated(setup=setup, state="waiting", ahead=ahead)

    def _work(self) -> None:
        """The thread's life: take the next job, run it, keep its end."""
        while True:
            with self._turn:
                while not self._waiting and not self._closed:
                    self._turn.wait()
                if self._closed:
                    return
                key, setup = self._waiting.popitem(last=False)
                self._running = key, Simulated(setup=setup, state="running")
            found = self._outcome(key, setup)
            with self._turn:
                self._running = None
                self._wanted_by.pop(key, None)
                if found is not None:
                    self._ended[key] = found
                while len(self._ended) > self._most_kept:
                    self._ended.popitem(last=False)
                if not self._visitors and self._worker is not None:
                    self._worker.close()
                    self._worker = None

    def _outcome(self, key: str, setup: Setup) -> Simulated | None:
        """The end of one job, None where nobody wants it any more."""
        flat = setup.to_dict()

        def unwanted() -> bool:
            return self._closed or key not in self._wanted_by

        def answered() -> Simulated | None:
            self._number += 1
            number = self._number
            for event in self._warm().answers(
                number, flat, time_limit_s=self._time_limit_s, cancelled=unwanted
            ):
                if event["event"] == "phase":
                    with self._turn:
                        self._running = key, _in_phase(setup, event)
                elif event["event"] == "report":
                    report = MemoryReport.from_dict(event["report"])
                    begins = tuple((name, step, at) for name, step, at in event["begins"])
                    return Simulated(setup=setup, state="done", report=report, begins=begins)
                else:
                    return _failed(setup, str(event.get("message")))
            return None

        try:
            try:
                return answered()
            except IdledOut:
                return answered()
        except IdledOut:
            return _failed(setup, "the simulating process ended. Try again.")
        except PlannerError as error:
            return _failed(setup, str(error))
        except Exception as error:  # a thread that dies would leave every page waiting
            return _failed(setup, f"the simulation failed ({type(error).__name__}). Try again.")

    def _warm(self) -> Worker:
        if self._worker is None or not self._worker.alive:
            started = self._start()
            with self._turn:
                self._worker = started
                if self._closed:
                    started.close()
        return self._worker


def key_of(setup: Setup) -> str:
    """One line for all setups whose simulation is the same: of a GPU only the capability counts."""
    flat = setup.to_dict()
    flat["gpu"] = list(setup.gpu.capability) if setup.gpu and setup.gpu.capability else None
    return json.dumps(flat, sort_keys=True, separators=(",", ":"))


def _under(found: Simulated, setup: Setup) -> Simulated:
    """The same for a setup with another GPU of the same capability."""
    changes: dict[str, Any] = {"setup": setup}
    if found.report is not None:
        changes["report"] = dataclasses.replace(found.report, setup=setup.to_dict())
    return dataclasses.replace(found, **changes)


def _in_phase(setup: Setup, event: dict[str, Any]) -> Simulated:
    step = event.get("step")
    return Simulated(
        setup=setup,
        state="running",
        phase=str(event.get("phase", "")),
        step=step if isinstance(step, int) else None,
    )


def _failed(setup: Setup, reason: str) -> Simulated:
    return Simulated(setup=setup, state="failed", reason=public_line(reason))
