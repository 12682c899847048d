"""Run a sweep: what its folder has no row of, each row kept as soon as it is there."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.sweep.jobs import Job, Sweep
from planner.sweep.journal import Journal
from planner.sweep.local import local_rows, usual_workers
from planner.sweep.locks import folder_alone
from planner.sweep.rows import refused_row
from planner.sweep.tables import write_tables

__all__ = ["Swept", "run_sweep"]

_ESTIMATES_AT_ONCE = 50  # an estimate takes a millisecond, less than handing one over
TIME_LIMIT_S = 600.0


@dataclass(frozen=True, kw_only=True)
class Swept:
    """One call: jobs that had a row `before`, and those that came to each end now; the files written.

    `rows` are all of the folder, those of the file in its order, then others. `note`: what was not written.
    """

    before: int
    done: int
    failed: int
    refused: int
    rows: tuple[dict[str, Any], ...]
    files: tuple[Path, ...]
    note: str = ""


def run_sweep(
    sweep: Sweep,
    out: Path,
    *,
    workers: int | None = None,
    ray_address: str | None = None,
    time_limit_s: float = TIME_LIMIT_S,
    retry_failed: bool = False,
    write_only: bool = False,
    on_rows: Callable[[Sequence[dict[str, Any]], int], None] | None = None,
) -> Swept:
    """Answer the jobs that `out` has no row of, in `workers` processes, or on Ray's cluster at `ray_address`
    ("" is Ray's own choice); then write its tables.

    `on_rows` hears new rows and how many jobs are left. However this ends, each row that it heard of is in
    `out/journal.jsonl`, and the next call goes on. Raises DeviceError where nothing can be measured,
    PlannerError where `out` cannot be written or Ray not be reached.
    """
    with folder_alone(out):
        journal = Journal(out)
        before = {
            job.key
            for job in sweep.jobs
            if job.key in journal.rows and not (retry_failed and journal.rows[job.key]["state"] == "failed")
        }
        todo = [job for job in sweep.jobs if job.key not in before and not job.refused]
        counts = {"done": 0, "failed": 0, "refused": 0}
        if not write_only:
            refused = [j for j in sweep.jobs if j.refused and j.key not in journal.rows]
            journal.add([refused_row(job, sweep.verb) for job in refused])
            counts["refused"] = len(refused)
        if todo and not write_only:
            left = len(todo)
            with closing(_rows(sweep.verb, todo, workers, ray_address, time_limit_s)) as rows:
                for some in rows:
                    journal.add(some)
                    left -= len(some)
                    for row in some:
                        counts[row["state"]] += 1
                    if on_rows is not None:
                        on_rows(some, left)
        wanted = {job.key: journal.rows[job.key] for job in sweep.jobs if job.key in journal.rows}
        everything = tuple((wanted | journal.rows).values())
        files, note = write_tables(everything, out)
    return Swept(before=len(before), rows=everything, files=tuple(files), note=note, **counts)


def _rows(
    verb: str, todo: Sequence[Job], workers: int | None, ray_address: str | None, time_limit_s: float
) -> Generator[list[dict[str, Any]], None, None]:
    size = _ESTIMATES_AT_ONCE if verb == "estimate" else 1
    chunks = [todo[at : at + size] for at in range(0, len(todo), size)]
    if ray_address is not None:
        from planner.sweep.on_ray import ray_rows

        return ray_rows(chunks, verb, address=ray_address, time_limit_s=time_limit_s)
    number = workers or usual_workers(verb)
    return local_rows(chunks, verb, workers=number, time_limit_s=time_limit_s)
