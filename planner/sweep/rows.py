"""One row of a sweep: a setup and what a verb answered, or in one line why it did not."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

from planner.advise import verdict
from planner.errors import PlannerError
from planner.measure.probe import now
from planner.report import MemoryReport
from planner.spec import Setup
from planner.sweep.jobs import Job

__all__ = ["SCHEMA", "Answer", "answered", "failed_row", "refused_row", "row", "summary"]

SCHEMA = 1
_VERSIONS = ("planner", "torch", "transformers", "peft")
Answer = Callable[[Setup], MemoryReport]


def row(job: Job, verb: str, found: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """The row of a job that was answered."""
    return _row(job, verb, "done") | {"seconds": round(seconds, 4), "found": dict(found)}


def failed_row(job: Job, verb: str, reason: str) -> dict[str, Any]:
    """The row of a job that could not be answered; it may be tried again."""
    return _row(job, verb, "failed") | {"error": " ".join(reason.split())}


def refused_row(job: Job, verb: str) -> dict[str, Any]:
    """The row of a combination that is no setup."""
    return _row(job, verb, "refused") | {"error": job.refused}


def answered(job: Job, verb: str, answer: Answer) -> dict[str, Any]:
    """The row that `answer` gives; what it raises is the row's error."""
    started = time.perf_counter()
    try:
        setup = Setup.from_dict(job.setup)
        report = answer(setup)
        found = summary(report, setup)
    except PlannerError as error:
        return failed_row(job, verb, str(error))
    except Exception as error:
        said = str(error).strip().partition("\n")[0]
        reason = f"{type(error).__name__}: {said}" if said else type(error).__name__
        return failed_row(job, verb, f"it failed while running ({reason.rstrip('.')}).")
    return row(job, verb, found, time.perf_counter() - started)


def summary(report: MemoryReport, setup: Setup) -> dict[str, Any]:
    """What a row keeps of a report, flat: peaks and parts in bytes, parameters, the verdict on the GPU."""
    provenance = report.provenance
    return {
        "source": report.source,
        "peak_allocated_bytes": report.peak_allocated_bytes,
        "peak_reserved_bytes": report.peak_reserved_bytes,
        "peak_phase": report.peak_phase,
        "verdict": verdict(report, setup.gpu).word if setup.gpu else None,
        "out_of_memory": report.out_of_memory.phase if report.out_of_memory else None,
        **{f"{part}_bytes": size for part, size in report.parts.to_dict().items()},
        "not_known": list(report.not_known),
        "total_parameters": report.parameters.total,
        "trainable_parameters": report.parameters.trainable,
        **{f"{name}_version": provenance[name] for name in _VERSIONS if name in provenance},
    }


def _row(job: Job, verb: str, state: str) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "key": job.key,
        "verb": verb,
        "state": state,
        "date": now(),
        "place": f"{platform.node()}:{os.getpid()}",
        "setup": dict(job.setup),
    }
