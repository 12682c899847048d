"""The server's side of the simulating process: started, asked, listened to, ended with all it started."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from planner.dashboard.lines import public_line
from planner.errors import PlannerError

__all__ = ["IdledOut", "Worker"]

_ROOT = Path(__file__).resolve().parents[2]
_DROPPED = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "PYTHONSTARTUP")
_POLL_SECONDS = 0.1
_START_LIMIT_S = 120.0  # importing torch takes 2 to 10 s; a cold disk on a busy machine far more
_LARGEST_SETUP_BYTES = 2 << 20


class IdledOut(Exception):
    """The process had ended by itself, having had nothing to do, before it saw the job."""


class Worker:
    """One process of `planner.simulate.worker`, in a process group of its own.

    `answers` sends a job and yields what it says; `close` ends the process. Not for two jobs at a time.
    """

    def __init__(self, command: list[str] | None = None) -> None:
        """Start it. Raises PlannerError where it cannot be started."""
        words = command or [sys.executable, "-P", "-m", "planner.simulate.worker"]
        try:
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # libraries' warnings, and paths that are nobody's business
                env=_environment(),
                start_new_session=True,
            )
        except OSError as error:
            raise PlannerError(f"the simulation cannot be started ({error.strerror}).") from None
        self._ready = False
        self._ended = threading.Lock()
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def pid(self) -> int:
        """Its process id, and that of its group."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def answers(
        self, number: int, setup: Mapping[str, Any], *, time_limit_s: float, cancelled: Callable[[], bool]
    ) -> Iterator[dict[str, Any]]:
        """Its "phase" events of job `number`, then "report" or "failed"; nothing more when cancelled.

        Raises IdledOut, and PlannerError after `time_limit_s` and where the process dies. It is ended then.
        """
        self._send({"id": number, "setup": dict(setup)})
        ends_at = time.monotonic() + time_limit_s + (0 if self._ready else _START_LIMIT_S)
        heard = False
        while not cancelled():
            if time.monotonic() > ends_at:
                self.close()
                raise PlannerError(
                    f"the simulation took longer than {time_limit_s:g} s and was ended; "
                    "choose a smaller setup."
                )
            try:
                line = self._lines.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
            if line is None:
                raise self._death(heard=heard)
            event = _event(line)
            if event.get("event") == "ready":
                self._ready = True
            elif event.get("event") == "missing":
                package = public_line(str(event.get("package")))
                raise PlannerError(
                    f"simulating needs {package}, which this server does not have; "
                    "run pip install 'vram-planner[simulate]' there."
                )
            elif event.get("id") == number:
                heard = True
                yield event
                if event.get("event") in ("report", "failed"):
                    return
        self.close()

    def close(self) -> None:
        """End the whole process group at once; safe to call twice and from any thread."""
        with self._ended:
            if self._process.poll() is None:
                with contextlib.suppress(OSError):
                    if os.name == "posix":
                        os.killpg(self._process.pid, signal.SIGKILL)
                    else:
                        self._process.kill()
            self._process.wait()
            with contextlib.suppress(OSError, ValueError):
                assert self._process.stdin is not None
                self._process.stdin.close()

    def _send(self, job: Mapping[str, Any]) -> None:
        data = json.dumps(job, allow_nan=False).encode() + b"\n"
        if len(data) > _LARGEST_SETUP_BYTES:
            raise PlannerError("the model's config.json is too large to simulate.")
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # a process that has died is noticed when it is heard
            self._process.stdin.write(data)
            self._process.stdin.flush()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(OSError, ValueError), self._process.stdout as stream:
            for line in stream:
                self._lines.put(line)
        self._lines.put(None)

    def _death(self, *, heard: bool) -> Exception:
        code = self._process.wait()
        self.close()
        if code == 0 and not heard:
            return IdledOut()
        if code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
            hint = "; the machine may have run out of main memory" if -code == signal.SIGKILL else ""
            return PlannerError(f"the simulating process was killed ({name}){hint}. Try again.")
        return PlannerError(f"the simulating process ended with exit code {code}. Try again.")


def _event(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _environment() -> dict[str, str]:
    """The child's: this very package, no GPU, no network, no token, one thread."""
    environment = {name: value for name, value in os.environ.items() if name not in _DROPPED}
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return environment | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONIOENCODING": "utf-8",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "OMP_NUM_THREADS": "1",  # nothing is calculated on tensors without storage
        "MALLOC_ARENA_MAX": "2",
        "USE_TF": "0",
    }
