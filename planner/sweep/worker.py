"""The working process of a sweep: `python -m planner.sweep.worker` (imports torch once, stays warm).

Reads {"verb": "simulate", "jobs": [{"key": ..., "setup": {...}}]} a line and answers each of the jobs with
{"event": "row", "row": {...}}. It ends with its standard input, also in the middle of a job.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import warnings
from typing import Any

from planner.errors import PlannerError
from planner.process import answers, jobs
from planner.report import MemoryReport
from planner.spec import Setup
from planner.sweep.jobs import Job
from planner.sweep.rows import Answer, answered

__all__ = ["main"]

_EASY_TO_KILL = "500"  # of 1000, /proc/PID/oom_score_adj: the kernel ends this before whoever asked


def main() -> int:
    """Serve jobs until standard input ends."""
    emit = answers()
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write(_EASY_TO_KILL)
    verbs: dict[str, Answer] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for asked in jobs():
            verb = str(asked["verb"])
            if verb not in verbs:
                verbs[verb] = _verb(verb)
            for job in asked["jobs"]:
                emit("row", row=answered(Job(key=job["key"], setup=job["setup"]), verb, verbs[verb]))
                if verb == "simulate":
                    gc.collect()
    return 0


def _verb(name: str) -> Answer:
    """The function of a verb, its libraries imported."""
    if name == "estimate":
        from planner.estimate import estimate

        return estimate
    try:
        from planner.simulate.worker import import_libraries

        import_libraries()
        from planner.simulate.run import simulate
    except ModuleNotFoundError as error:
        if str(error.name).startswith("planner"):
            raise
        missing = f"simulating needs {error.name}; run pip install 'vram-planner[simulate]'."

        def refuse(_setup: Setup) -> MemoryReport:
            raise PlannerError(missing)

        return refuse
    gc.collect()
    gc.freeze()  # the libraries live as long as the process: collections after each job pass them by
    return _simulated(simulate)


def _simulated(simulate: Any) -> Answer:
    def answer(setup: Setup) -> MemoryReport:
        found: MemoryReport = simulate(setup)
        return found

    return answer


if __name__ == "__main__":
    sys.exit(main())
