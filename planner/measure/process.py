"""The parent's side of a measuring process: started, asked, listened to, ended with all it started."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from planner.errors import PlannerError
from planner.process import Ended, Served

__all__ = ["Child"]

_POLL_SECONDS = 0.2


class Child(Served):
    """A process that serves jobs, in a session and process group of its own.

    `ask` sends a job, `events` yields what it says until the job ends, `close` ends it. Use it as a
    context: however the block is left, no process stays behind. `python` is the interpreter to use.
    """

    def __init__(self, *, python: str | None = None, cpu_only: bool = False) -> None:
        """Start it; `cpu_only` hides every GPU from it. Raises PlannerError where it cannot be started."""
        self.phase = ""
        self._started: dict[str, Any] | None = None
        self._asked = self._ended = 0
        command = [python or sys.executable, "-P", "-m", "planner.measure.child"]
        if not cpu_only:
            command.append("--cuda")  # a torch without CUDA is then refused before all other imports
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if cpu_only else {}
        super().__init__(command, keep_words=True, environment=hidden)

    def __enter__(self) -> Child:
        """The child itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self.close()

    def ask(self, job: str, setup: Mapping[str, Any], **options: Any) -> None:
        """Send one job. A process that has died is noticed when its events are read."""
        self._asked += 1
        self.send({"job": job, "setup": dict(setup), **options})

    def events(
        self, *, time_limit_s: float, cancelled: Callable[[], bool] | None = None
    ) -> Iterator[dict[str, Any]]:
        """The events of the job asked for last, until it ends; the first says what the process is.

        Raises PlannerError, with the process group killed, after `time_limit_s`, when `cancelled()` says so,
        and when the process dies. An unfinished last line is dropped.
        """
        ends_at = time.monotonic() + time_limit_s
        self.phase = ""
        if self._started:
            yield self._started
        while True:
            if cancelled is not None and cancelled():
                self.kill()
                raise PlannerError("the run was cancelled; nothing was recorded.")
            wait = min(_POLL_SECONDS, ends_at - time.monotonic())
            if wait <= 0:
                self.kill()
                raise PlannerError(
                    f"the run took longer than {time_limit_s:g} s{self._where()} and was ended; allow more "
                    "with --time-limit-s, or choose a smaller setup."
                )
            try:
                event = self.heard(wait)
            except Ended as end:
                raise PlannerError(self._death(end)) from None
            if not event:
                continue
            if event.get("event") == "enter":
                self.phase = event["name"]
            if event.get("event") == "started":
                self._started = event
                yield event
                continue
            if event.get("event") == "end":
                self._ended += 1
                if self._ended >= self._asked:
                    return
            if self._ended < self._asked - 1:  # what nobody wanted to hear of an earlier job
                continue
            yield event

    def _where(self) -> str:
        return f" (in {self.phase.replace('_', ' ')})" if self.phase else ""

    def _death(self, end: Ended) -> str:
        """One line for a process that ended before its job did."""
        if end.signal_name:
            hint = " The machine may have run out of main memory." if end.starved else ""
            return (
                f"the measuring process was killed by {end.signal_name}{self._where()}; "
                f"nothing was recorded.{hint}"
            )
        words = self.last_words()
        said = f": {words}" if words else "."
        return f"the measuring process ended with exit code {end.code}{self._where()}{said}"
