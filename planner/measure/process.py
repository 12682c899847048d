"""The parent's side of a measuring process: started, asked, listened to, ended with all it started."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from planner.errors import PlannerError

__all__ = ["Child"]

_DROPPED = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "PYTHONSTARTUP", "PYTHONPATH")
_POLL_SECONDS = 0.2
_LAST_WORDS_BYTES = 4096
_SHOWN_CHARACTERS = 300


class Child:
    """A process that serves jobs, in a session and process group of its own.

    `ask` sends a job, `events` yields what it says until the job ends, `close` ends it. Use it as a
    context: however the block is left, no process stays behind. `python` is the interpreter to use.
    """

    def __init__(self, *, python: str | None = None, cpu_only: bool = False) -> None:
        """Start it; `cpu_only` hides every GPU from it. Raises PlannerError where it cannot be started."""
        self._words = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self.phase = ""
        self._started: dict[str, Any] | None = None
        self._asked = self._ended = 0
        command = [python or sys.executable, "-P", "-m", "planner.measure.child"]
        if not cpu_only:
            command.append("--cuda")  # a torch without CUDA is then refused before all other imports
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._words,
                env=_environment(cpu_only=cpu_only),
                start_new_session=True,
            )
        except OSError as error:
            self._words.close()
            raise PlannerError(f"{command[0]} cannot be started ({error.strerror}).") from None
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def __enter__(self) -> Child:
        """The child itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self.close()

    @property
    def pid(self) -> int:
        """Its process id, and that of its group."""
        return self._process.pid

    def ask(self, job: str, setup: Mapping[str, Any], **options: Any) -> None:
        """Send one job. A process that has died is noticed when its events are read."""
        line = json.dumps({"job": job, "setup": dict(setup), **options}) + "\n"
        assert self._process.stdin is not None
        self._asked += 1
        with contextlib.suppress(OSError):
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()

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
                line = self._lines.get(timeout=wait)
            except queue.Empty:
                continue
            if line is None:
                raise PlannerError(self._death())
            try:
                event = json.loads(line)
            except ValueError:
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

    def kill(self) -> None:
        """End the whole process group at once."""
        if self._process.poll() is None:
            with contextlib.suppress(OSError):
                if os.name == "posix":
                    os.killpg(self._process.pid, signal.SIGKILL)
                else:
                    self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """End the process and forget it; safe to call twice."""
        self.kill()
        self._listener.join(timeout=_POLL_SECONDS)
        heard = None if self._listener.is_alive() else self._process.stdout  # closing would wait for it
        for stream in (self._process.stdin, heard, self._words):
            if stream is not None:
                with contextlib.suppress(OSError, ValueError):
                    stream.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(OSError, ValueError):
            for line in self._process.stdout:
                if line.endswith(b"\n"):
                    self._lines.put(line)
        self._lines.put(None)

    def _where(self) -> str:
        return f" (in {self.phase.replace('_', ' ')})" if self.phase else ""

    def _death(self) -> str:
        """One line for a process that ended before its job did."""
        code = self._process.wait()
        if code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
            hint = " The machine may have run out of main memory." if -code == signal.SIGKILL else ""
            return f"the measuring process was killed by {name}{self._where()}; nothing was recorded.{hint}"
        words = self._last_words()
        said = f": {words}" if words else "."
        return f"the measuring process ended with exit code {code}{self._where()}{said}"

    def _last_words(self) -> str:
        """The last line on standard error."""
        with contextlib.suppress(OSError, ValueError):
            size = os.fstat(self._words.fileno()).st_size
            self._words.seek(max(0, size - _LAST_WORDS_BYTES))
            lines = self._words.read().decode("utf-8", "replace").strip().splitlines()
            return lines[-1].strip()[:_SHOWN_CHARACTERS] if lines else ""
        return ""


def _environment(*, cpu_only: bool) -> dict[str, str]:
    """The child's: this very package first, no network, no token; the allocator's settings stay."""
    environment = {name: value for name, value in os.environ.items() if name not in _DROPPED}
    paths = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment |= {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONIOENCODING": "utf-8",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "USE_TF": "0",
    }
    if cpu_only:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment
