"""Several ranks of one run, started by torchrun or accelerate launch, listened to and ended together."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection, Listener
from typing import Any, Literal, get_args

from planner.checks import choice
from planner.errors import PlannerError
from planner.process import Ended, Served

__all__ = ["ADDRESS", "KEY", "Launcher", "Ranks"]

ADDRESS, KEY = "VRAM_PLANNER_RANKS", "VRAM_PLANNER_RANKS_KEY"
Launcher = Literal["torchrun", "accelerate"]
_POLL_SECONDS = 0.2
_LAST_WORDS_SECONDS = 5.0  # torchrun looks at its ranks every 0.1 s, and then ends the others
_LOST_SECONDS = 1.0  # a rank that was killed is noticed by the others first
_EXIT_CODE = re.compile(r"exitcode\s*:\s*(-?\d+)")


class Ranks:
    """`number` processes of one group. Use it as a context: however the block is left, none stays behind.

    Each runs `planner.measure.rank`. `python` is the interpreter to use. Raises PlannerError where they
    cannot be started, SetupError for another launcher.
    """

    def __init__(
        self, number: int, *, launcher: str = "torchrun", python: str | None = None, cpu_only: bool = False
    ) -> None:
        """Start them; they wait for a job."""
        choice("launcher", launcher, get_args(Launcher))
        key = secrets.token_bytes(32)
        self.number = number
        self.phases: dict[int, str] = {}
        self._calls = Listener(authkey=key)
        self._heard: queue.Queue[tuple[int, dict[str, Any] | None]] = queue.Queue()
        self._connections: dict[int, Connection] = {}
        self._pids: dict[int, int] = {}
        self._job: bytes | None = None
        self._asked = threading.Event()
        environment = {ADDRESS: str(self._calls.address), KEY: key.hex()}
        if cpu_only:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        try:
            self._launcher = Served(
                _command(launcher, number, python or sys.executable),
                name=launcher,
                keep_words=True,
                environment=environment,
            )
        except PlannerError:
            self._calls.close()
            raise
        threading.Thread(target=self._answer_calls, daemon=True).start()

    def __enter__(self) -> Ranks:
        """The ranks themselves."""
        return self

    def __exit__(self, *_: object) -> None:
        """End them."""
        self.close()

    def ask(self, job: str, setup: Mapping[str, Any], **options: Any) -> None:
        """Give every rank its job, also those that call later."""
        self._job = json.dumps({"job": job, "setup": dict(setup), **options}, allow_nan=False).encode()
        self._asked.set()

    def events(
        self, *, time_limit_s: float, cancelled: Callable[[], bool] | None = None
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """(rank, event) as they come, until every rank has ended its job.

        A rank that refuses, or runs out of memory, ends the iteration once it has said so: the others wait
        for it in vain. Raises PlannerError after `time_limit_s`, when `cancelled()`, and when a rank dies.
        """
        ends_at = time.monotonic() + time_limit_s
        running = set(range(self.number))
        given_up: set[int] = set()
        while running:
            if cancelled is not None and cancelled():
                raise PlannerError("the run was cancelled; nothing was recorded.")
            wait = min(_POLL_SECONDS, ends_at - time.monotonic())
            if wait <= 0:
                raise PlannerError(
                    f"the run took longer than {time_limit_s:g} s{self._where(min(running))} and was ended; "
                    "allow more with --time-limit-s, or choose a smaller setup."
                )
            try:
                rank, event = self._heard.get(timeout=wait)
            except queue.Empty:
                if not self._launcher.alive and self._heard.empty():
                    raise PlannerError(self._never_started(running)) from None
                continue
            if event is None:
                if rank in running:
                    raise PlannerError(self._death(rank))
                continue
            kind = event.get("event")
            if kind == "enter":
                self.phases[rank] = str(event["name"])
            elif kind in ("refused", "out_of_memory"):
                given_up.add(rank)
                lost = self._lost(running - given_up) if kind == "refused" else None
                if lost is not None:  # what this rank says is that the other does not answer
                    raise PlannerError(self._death(lost))
            if kind != "end":
                yield rank, event
                continue
            running.discard(rank)
            if running and given_up and given_up.isdisjoint(running):
                return
        for connection in list(self._connections.values()):
            with contextlib.suppress(OSError):
                connection.send_bytes(b"over")

    def close(self) -> None:
        """End every rank and the launcher; safe to call twice."""
        self._asked.set()
        for rank in list(self._connections):  # in sessions of their own, so the launcher's end is not theirs
            with contextlib.suppress(OSError):
                os.kill(self._pids[rank], getattr(signal, "SIGKILL", signal.SIGTERM))
        ends_at = time.monotonic() + _LAST_WORDS_SECONDS
        while self._connections and time.monotonic() < ends_at:  # a connection ends with its process
            time.sleep(_POLL_SECONDS / 10)
        self._launcher.close()
        for connection in list(self._connections.values()):
            connection.close()
        with contextlib.suppress(OSError):
            self._calls.close()

    def _answer_calls(self) -> None:
        with contextlib.suppress(OSError, EOFError):
            for _ in range(self.number):
                connection = self._calls.accept()
                hello = json.loads(connection.recv_bytes())
                rank = int(hello["rank"])
                self._pids[rank] = int(hello["pid"])
                self._connections[rank] = connection
                threading.Thread(target=self._listen, args=(rank, connection), daemon=True).start()

    def _listen(self, rank: int, connection: Connection) -> None:
        self._asked.wait()
        with contextlib.suppress(OSError, EOFError, ValueError, TypeError):  # TypeError: closed in the middle
            if self._job is not None:
                connection.send_bytes(self._job)
            while True:
                self._heard.put((rank, json.loads(connection.recv_bytes())))
        self._connections.pop(rank, None)
        self._heard.put((rank, None))

    def _lost(self, others: set[int]) -> int | None:
        """One of these ranks whose process has ended, or does so in a moment."""
        ends_at = time.monotonic() + _LOST_SECONDS
        while others:
            gone = others - set(self._connections)
            if gone:
                return min(gone)
            if time.monotonic() >= ends_at:
                break
            time.sleep(_POLL_SECONDS / 10)
        return None

    def _where(self, rank: int) -> str:
        phase = self.phases.get(rank, "")
        return f" (rank {rank} in {phase.replace('_', ' ')})" if phase else ""

    def _death(self, rank: int) -> str:
        """One line for a rank that ended before its job did."""
        code = _EXIT_CODE.search(self._words())
        how = "ended"
        if code:
            end = Ended(int(code[1]))
            how = f"ended with exit code {end.code}"
            if end.signal_name:
                how = f"was killed by {end.signal_name}"
        phase = self.phases.get(rank, "")
        where = f" in {phase.replace('_', ' ')}" if phase else ""
        return f"rank {rank} of {self.number} {how}{where}; the others were ended, nothing was recorded."

    def _never_started(self, running: set[int]) -> str:
        words = self._launcher.last_words()
        said = f": {words}" if words else "."
        return f"{len(running)} of {self.number} ranks did not start or ended at once{said}"

    def _words(self) -> str:
        """What the launcher says of its ranks, which takes it a moment."""
        ends_at = time.monotonic() + _LAST_WORDS_SECONDS
        while self._launcher.alive and time.monotonic() < ends_at:
            time.sleep(_POLL_SECONDS / 2)
        return self._launcher.words()


def _command(launcher: str, number: int, python: str) -> list[str]:
    if launcher == "accelerate":
        run = ["accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no"]
        run += ["--dynamo_backend", "no", "--num_processes", str(number), "--main_process_port", "0"]
    else:
        run = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(number)]
    return [python, "-m", *run, "-m", "planner.measure.rank"]
