"""The one measurement that this server may run at a time, as it goes: stages, Cancel, its end. No streamlit.

The training step runs in a process of its own (`planner.measure`); nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from planner.dashboard.lines import public_line
from planner.errors import PlannerError
from planner.measure.device import OTHERS_BYTES
from planner.measure.nvml import DriverGpu
from planner.measure.records import append
from planner.measure.single import record_of
from planner.record import Record
from planner.report import MemoryReport
from planner.spec import Setup
from planner.units import gib

__all__ = ["Measured", "Measurements", "Stage", "blocked", "driver_gpus"]

State = Literal["running", "done", "failed", "cancelled"]
_ROOT = Path(__file__).resolve().parents[2]
_ASK_DRIVER = (
    "import dataclasses, json; from planner.measure.nvml import driver_gpus; "
    "print(json.dumps([dataclasses.asdict(gpu) for gpu in driver_gpus()]))"
)
_DRIVER_PATIENCE_S = 10.0  # a wedged driver answers never


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One phase of the run; bytes None while it runs."""

    name: str
    step: int | None
    peak_allocated_bytes: int | None = None
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A measurement as it stands. `record` where it is done, `reason` in one line where it failed.

    `note` says what went wrong beside the run, such as a record that could not be kept.
    """

    setup: Setup
    visitor: str
    state: State
    began_s: float
    stages: tuple[Stage, ...] = ()
    device: str = ""
    record: Record | None = None
    reason: str = ""
    note: str = ""

    @property
    def active(self) -> bool:
        """Whether it still runs."""
        return self.state == "running"


class Measurements:
    """At most one measurement, whoever asks; the last one's end is kept. Safe from any thread.

    `measure` and `keep` are there to be replaced in tests.
    """

    def __init__(
        self,
        *,
        time_limit_s: float = 600.0,
        measure: Callable[..., Record] = record_of,
        keep: Callable[[Record], object] = append,
    ) -> None:
        """Nothing runs yet."""
        self._time_limit_s, self._measure, self._keep = time_limit_s, measure, keep
        self._lock = threading.Lock()
        self._last: Measured | None = None
        self._cancelled = threading.Event()

    @property
    def last(self) -> Measured | None:
        """The measurement that runs, or the last one that did."""
        with self._lock:
            return self._last

    def start(self, setup: Setup, visitor: str) -> None:
        """Begin in the background. Raises PlannerError where one runs already."""
        with self._lock:
            if self._last is not None and self._last.active:
                raise PlannerError("Another measurement is running on this machine; wait for it to end.")
            self._cancelled.clear()
            self._last = Measured(setup=setup, visitor=visitor, state="running", began_s=time.monotonic())
        threading.Thread(target=self._run, args=(setup,), name="measurement", daemon=True).start()

    def cancel(self, visitor: str) -> None:
        """End the run, if this visitor began it."""
        with self._lock:
            if self._last is not None and self._last.active and self._last.visitor == visitor:
                self._cancelled.set()

    def close(self) -> None:
        """End whatever runs: the server ends."""
        self._cancelled.set()

    def _over(self) -> bool:
        """Whether to stop: cancelled, or the server is ending (concurrent.futures would wait for us)."""
        return self._cancelled.is_set() or not threading.main_thread().is_alive()

    def _run(self, setup: Setup) -> None:
        try:
            record = self._measure(
                setup, time_limit_s=self._time_limit_s, on_event=self._hear, cancelled=self._over
            )
        except PlannerError as error:
            state: State = "cancelled" if self._cancelled.is_set() else "failed"
            self._change(state=state, reason=public_line(str(error)))
        except Exception as error:
            self._change(state="failed", reason=f"the measurement failed ({type(error).__name__}).")
        else:
            self._change(state="done", record=record, note=self._kept(record))

    def _kept(self, record: Record) -> str:
        try:
            self._keep(record)
        except PlannerError as error:
            return public_line(str(error))
        return ""

    def _hear(self, event: Mapping[str, Any]) -> None:
        kind = event.get("event")
        if kind == "device":
            self._change(device=str(event.get("name")))
        elif kind == "enter":
            self._change(stage=Stage(name=str(event["name"]), step=event.get("step")))
        elif kind == "phase":
            self._change(
                stage=Stage(
                    name=str(event["name"]),
                    step=event.get("step"),
                    peak_allocated_bytes=event.get("peak_allocated_bytes"),
                    seconds=event.get("seconds"),
                )
            )

    def _change(self, *, stage: Stage | None = None, **changes: Any) -> None:
        with self._lock:
            assert self._last is not None
            if stage is not None:
                before = [s for s in self._last.stages if s.seconds is not None]
                changes["stages"] = (*before, stage)
            self._last = dataclasses.replace(self._last, **changes)


def driver_gpus() -> tuple[DriverGpu, ...]:
    """What NVIDIA's driver lists, asked in a process of its own; empty without a driver, or a dead one."""
    try:
        answer = subprocess.run(
            [sys.executable, "-c", _ASK_DRIVER],
            cwd=_ROOT,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=_DRIVER_PATIENCE_S,
            check=True,
        )
        return tuple(DriverGpu(**gpu) for gpu in json.loads(answer.stdout))
    except (OSError, subprocess.SubprocessError, ValueError, TypeError):
        return ()


def blocked(*, allowed: bool, gpus: tuple[DriverGpu, ...], predicted: MemoryReport) -> str | None:
    """Why this setup cannot be measured on this server, in a line; None where it can."""
    if not allowed:
        return (
            "Measuring is switched off on this server. Whoever runs it can allow it with "
            "PLANNER_ALLOW_MEASURE=1, on a machine with an NVIDIA GPU."
        )
    if not gpus:
        return "This server has no NVIDIA GPU: its driver lists none. Measure on your own machine instead."
    gpu, weights_bytes = gpus[0], predicted.parts.base_weights
    if gpu.used_bytes > OTHERS_BYTES:
        return (
            f"The GPU is busy: other processes hold {gib(gpu.used_bytes)} of {gpu.name}. Wait for them, or "
            "end them; they would disturb the figures."
        )
    if weights_bytes > gpu.total_bytes:
        return (
            f"{gpu.name} is too small: it has {gib(gpu.total_bytes)}, and the weights alone take "
            f"{gib(weights_bytes)}. Choose a smaller model or a 16-bit precision."
        )
    return None
