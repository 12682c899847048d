"""The simulating process of the pages: `python -m planner.simulate.worker` (imports torch once, stays warm).

Reads one job a line from standard input, {"id": 7, "setup": {...}}, and answers in JSON lines on standard
output, which no library can reach: {"event": "ready"} once, then for each job {"event": "phase", ...} lines
and one {"event": "report", ...} or {"event": "failed", "message": ...}. It ends with its standard input, also
in the middle of a job: when the server is gone, however it ended, so is this. Excludes any network.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from planner.errors import PlannerError, TraceError
from planner.process import answers, jobs
from planner.units import GIB, gib

__all__ = ["import_libraries", "main"]

Emit = Callable[..., None]
_NICENESS = 5  # the page, which shares the processors, answers first
_EASY_TO_KILL = "500"  # of 1000, /proc/PID/oom_score_adj: the kernel ends this before the server


def main(arguments: list[str] | None = None) -> int:
    """Serve jobs until standard input ends, nothing came for `--idle-s`, or memory ran out."""
    parser = argparse.ArgumentParser(prog="python -m planner.simulate.worker")
    parser.add_argument("--idle-s", type=float, default=600.0, help="end after so many seconds without a job")
    parser.add_argument("--memory-gib", type=float, default=8.0, help="main memory it may take for its data")
    asked = parser.parse_args(arguments)
    emit = answers()
    limit_bytes = int(asked.memory_gib * GIB)
    _behave(limit_bytes)
    asked_for = jobs(asked.idle_s)
    try:
        import_libraries()
    except ModuleNotFoundError as error:
        emit("missing", package=(error.name or "").partition(".")[0])
        return 1
    emit("ready", pid=os.getpid())
    for job in asked_for:
        if not _serve(job, emit, limit_bytes):
            return 1
    return 0


def _behave(limit_bytes: int) -> None:
    """Be a good neighbour of the server: lower priority, first to go, at most so much memory."""
    with contextlib.suppress(OSError, AttributeError):
        os.nice(_NICENESS)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write(_EASY_TO_KILL)
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        soft = limit_bytes if hard == resource.RLIM_INFINITY else min(limit_bytes, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def import_libraries() -> None:
    """Everything a simulation needs, so that the first job starts at once."""
    import accelerate  # noqa: F401
    import peft  # noqa: F401
    import transformers

    import planner.simulate.run  # noqa: F401

    transformers.utils.logging.set_verbosity_error()


def _serve(job: Mapping[str, Any], emit: Emit, limit_bytes: int) -> bool:
    """One job; False where the process is no longer fit for another."""
    answer = partial(emit, id=job["id"])
    try:
        report, begins = _report(job["setup"], answer)
        answer("report", report=report, begins=begins)
    except Exception as error:
        if _out_of_memory(error):
            answer("failed", message=f"the simulation needs more than {gib(limit_bytes)} of main memory.")
            return False
        answer("failed", message=_line(error if isinstance(error, PlannerError) else _unexpected(error)))
    gc.collect()
    return True


def _report(
    flat: Mapping[str, Any], answer: Emit
) -> tuple[dict[str, Any], list[tuple[str, int | None, int]]]:
    """The report, and for each phase (name, step, number of the timeline's event at which it begins)."""
    from planner.simulate.run import Simulation, simulate
    from planner.spec import Setup

    seen: list[Simulation] = []
    begins: list[tuple[str, int | None, int]] = []

    def progress(phase: str, step: int | None) -> None:
        begins.append((phase, step, len(seen[0].ledger.events)))
        answer("phase", phase=phase, step=step)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = simulate(Setup.from_dict(flat), progress=progress, watch=seen.append)
    return report.to_dict(), begins


def _out_of_memory(error: BaseException | None) -> bool:
    """Whether it is, or comes from, main memory that could not be had (torch says it as a RuntimeError)."""
    while error is not None:
        if isinstance(error, MemoryError) or "not enough memory" in str(error):
            return True
        error = error.__cause__
    return False


def _unexpected(error: Exception) -> PlannerError:
    said = str(error).strip().partition("\n")[0]
    reason = f"{type(error).__name__}: {said}" if said else type(error).__name__
    return TraceError(f"the simulation failed ({reason.rstrip('.')}); choose another attention or method.")


def _line(error: PlannerError) -> str:
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
