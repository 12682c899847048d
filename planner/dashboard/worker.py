"""The server's side of the simulating process: started, asked, listened to, ended with all it started."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from planner.dashboard.lines import public_line
from planner.errors import PlannerError
from planner.process import Ended, Served

__all__ = ["IdledOut", "Worker"]

_POLL_SECONDS = 0.1
_START_LIMIT_S = 120.0  # importing torch takes 2 to 10 s; a cold disk on a busy machine far more
_LARGEST_SETUP_BYTES = 2 << 20


class IdledOut(Exception):
    """The process had ended by itself, having had nothing to do, before it saw the job."""


class Worker(Served):
    """One process of `planner.simulate.worker`, in a process group of its own.

    `answers` sends a job and yields what it says; `close` ends the process. Not for two jobs at a time.
    Libraries' warnings, and paths that are nobody's business, are not kept.
    """

    def __init__(self, command: list[str] | None = None) -> None:
        """Start it. Raises PlannerError where it cannot be started."""
        self._ready = False
        super().__init__(
            command or [sys.executable, "-P", "-m", "planner.simulate.worker"],
            name="the simulation",
            environment={
                "CUDA_VISIBLE_DEVICES": "",
                "OMP_NUM_THREADS": "1",  # nothing is calculated on tensors without storage
                "MALLOC_ARENA_MAX": "2",
            },
        )

    def answers(
        self, number: int, setup: Mapping[str, Any], *, time_limit_s: float, cancelled: Callable[[], bool]
    ) -> Iterator[dict[str, Any]]:
        """Its "phase" events of job `number`, then "report" or "failed"; nothing more when cancelled.

        Raises IdledOut, and PlannerError after `time_limit_s` and where the process dies. It is ended then.
        """
        job = {"id": number, "setup": dict(setup)}
        if len(json.dumps(job)) > _LARGEST_SETUP_BYTES:
            raise PlannerError("the model's config.json is too large to simulate.")
        self.send(job)
        ends_at = time.monotonic() + time_limit_s + (0 if self._ready else _START_LIMIT_S)
        answered = False
        while not cancelled():
            if time.monotonic() > ends_at:
                self.close()
                raise PlannerError(
                    f"the simulation took longer than {time_limit_s:g} s and was ended; "
                    "choose a smaller setup."
                )
            try:
                event = self.heard(_POLL_SECONDS)
            except Ended as end:
                self.close()
                if end.code == 0 and not answered:
                    raise IdledOut from None
                raise _death(end) from None
            if event.get("event") == "ready":
                self._ready = True
            elif event.get("event") == "missing":
                package = public_line(str(event.get("package")))
                raise PlannerError(
                    f"simulating needs {package}, which this server does not have; "
                    "run pip install 'vram-planner[simulate]' there."
                )
            elif event.get("id") == number:
                answered = True
                yield event
                if event.get("event") in ("report", "failed"):
                    return
        self.close()


def _death(end: Ended) -> PlannerError:
    if end.signal_name:
        hint = "; the machine may have run out of main memory" if end.starved else ""
        return PlannerError(f"the simulating process was killed ({end.signal_name}){hint}. Try again.")
    return PlannerError(f"the simulating process ended with exit code {end.code}. Try again.")
