"""A process that serves jobs in JSON lines: the parent's side of the pipe, and the child's."""

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
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from planner.errors import PlannerError

__all__ = ["Ended", "Served", "answers", "jobs"]

_DROPPED = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "PYTHONSTARTUP")
_JOIN_SECONDS = 0.2
_LAST_WORDS_BYTES = 4096
_SHOWN_CHARACTERS = 300
_LOST_PARENT = 4


class Ended(Exception):
    """The process has ended; `code` is its exit code, `signal_name` what killed it, or ""."""

    def __init__(self, code: int) -> None:
        """Of an exit code as subprocess gives it: negative for a signal."""
        super().__init__(code)
        self.code = code
        self.signal_name = ""
        if code < 0:
            known = -code in set(signal.Signals)
            self.signal_name = signal.Signals(-code).name if known else f"signal {-code}"

    @property
    def starved(self) -> bool:
        """Whether it was killed as the kernel kills where main memory runs out."""
        return self.signal_name == "SIGKILL"


class Served:
    """One process in a session and process group of its own, without network and token.

    `send` writes a job, `heard` reads what it says, `close` ends it with all it started. Its standard
    error is kept where `keep_words`, and else goes nowhere. Raises PlannerError where it cannot be started.
    """

    def __init__(
        self,
        command: list[str],
        *,
        name: str = "",
        keep_words: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start `command`, called `name` in errors, with this environment's variables and `environment`."""
        self._words = tempfile.TemporaryFile() if keep_words else None  # noqa: SIM115 - lives as long as it
        self._ending = threading.Lock()
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._words if self._words is not None else subprocess.DEVNULL,
                env=_environment() | dict(environment or {}),
                start_new_session=True,
            )
        except OSError as error:
            if self._words is not None:
                self._words.close()
            raise PlannerError(f"{name or command[0]} cannot be started ({error.strerror}).") from None
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    @property
    def pid(self) -> int:
        """Its process id, and that of its group."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def send(self, job: Mapping[str, Any]) -> None:
        """Write one job. A process that has died is noticed when it is heard."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.write(json.dumps(job, allow_nan=False).encode() + b"\n")
            self._process.stdin.flush()

    def heard(self, wait_s: float) -> dict[str, Any]:
        """The next event; {} where none came in `wait_s` seconds. Raises Ended after the last one."""
        try:
            line = self._lines.get(timeout=max(0.0, wait_s))
        except queue.Empty:
            return {}
        if line is None:
            self._lines.put(None)  # whoever asks again is told again
            raise Ended(self._process.wait())
        try:
            event = json.loads(line)
        except ValueError:
            return {}
        return event if isinstance(event, dict) else {}

    def last_words(self) -> str:
        """The last line on standard error, where it is kept."""
        lines = self.words().strip().splitlines()
        return lines[-1].strip()[:_SHOWN_CHARACTERS] if lines else ""

    def words(self) -> str:
        """The end of standard error, where it is kept."""
        if self._words is None:
            return ""
        with contextlib.suppress(OSError, ValueError):
            size = os.fstat(self._words.fileno()).st_size
            self._words.seek(max(0, size - _LAST_WORDS_BYTES))
            return self._words.read().decode("utf-8", "replace")
        return ""

    def kill(self) -> None:
        """End the whole process group at once; safe to call twice and from any thread."""
        with self._ending:
            if self._process.poll() is None:
                with contextlib.suppress(OSError):
                    if os.name == "posix":
                        os.killpg(self._process.pid, signal.SIGKILL)
                    else:
                        self._process.kill()
            self._process.wait()

    def close(self) -> None:
        """End the process and forget it; safe to call twice and from any thread."""
        self.kill()
        self._listener.join(timeout=_JOIN_SECONDS)
        heard = None if self._listener.is_alive() else self._process.stdout  # closing would wait for it
        for stream in (self._process.stdin, heard, self._words):
            if stream is not None:
                with contextlib.suppress(OSError, ValueError):
                    stream.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(OSError, ValueError):
            for line in self._process.stdout:
                if line.endswith(b"\n"):  # an unfinished last line is dropped
                    self._lines.put(line)
        self._lines.put(None)


def _environment() -> dict[str, str]:
    """This very package first, no network, no token; the allocator's settings stay."""
    environment = {name: value for name, value in os.environ.items() if name not in _DROPPED}
    paths = [str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return environment | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONIOENCODING": "utf-8",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "USE_TF": "0",
    }


def answers() -> Callable[..., None]:
    """The child's side: a function of (event, **values) that writes one line where no library can.

    What anything else prints goes to standard error from now on.
    """
    handle = os.dup(1)
    os.dup2(2, 1)
    return partial(_emit, handle)


def _emit(handle: int, event: str, **values: Any) -> None:
    view = memoryview(json.dumps({"event": event, **values}, allow_nan=False).encode() + b"\n")
    while view:
        view = view[os.write(handle, view) :]


def jobs(idle_s: float | None = None) -> Iterator[dict[str, Any]]:
    """The child's side: jobs as they come, until standard input ends or none came for `idle_s` seconds.

    Read by a thread from this call on: the input's end in the middle of a job ends the process, so that
    none outlives its parent.
    """
    lines: queue.Queue[str | None] = queue.Queue()

    def watch() -> None:
        for line in sys.stdin:
            lines.put(line)
        if lines.unfinished_tasks:  # counted from the moment a job is put, so none slips by
            os._exit(_LOST_PARENT)
        lines.put(None)

    threading.Thread(target=watch, daemon=True).start()
    return _taken(lines, idle_s)


def _taken(lines: queue.Queue[str | None], idle_s: float | None) -> Iterator[dict[str, Any]]:
    with contextlib.suppress(queue.Empty):
        while (line := lines.get(timeout=idle_s)) is not None:
            yield json.loads(line)
            lines.task_done()
