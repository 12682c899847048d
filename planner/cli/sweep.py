"""`planner sweep`: thousands of setups from one file, on this machine or on a Ray cluster."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.cli.reply import Reply
from planner.errors import SetupError

if TYPE_CHECKING:
    from rich.console import Console

    from planner.sweep.jobs import Sweep
    from planner.sweep.run import Swept

__all__ = ["HELP", "answer", "flags"]

HELP = "thousands of setups estimated, simulated or measured, resumable; results as CSV and Parquet"
_SAID_EVERY_S = 10.0
_MOST_ERRORS = 3
_MOST_WORKERS = 1024
_PAST = {"estimate": "estimated", "simulate": "simulated", "measure": "measured"}


def flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument(
        "sweep", metavar="FILE", help="setups in TOML: [defaults] and [[group]]; a list is each of its values"
    )
    parser.add_argument("--verb", metavar="estimate|simulate|measure", help="instead of the file's own verb")
    parser.add_argument("--out", metavar="DIR", help="folder of the results (default: FILE without .toml)")
    parser.add_argument("--retry-failed", action="store_true", help="try again what failed before")
    parser.add_argument("--write-only", action="store_true", help="run nothing, write the tables of DIR")
    run = parser.add_argument_group("the run")
    run.add_argument("--workers", metavar="N", help="processes on this machine (default: one a processor)")
    run.add_argument("--time-limit-s", metavar="S", help="seconds for one setup (default: 600)")
    run.add_argument(
        "--ray",
        metavar="ADDRESS",
        nargs="?",
        const="",
        help="run on a Ray cluster: HOST:PORT, or nothing for RAY_ADDRESS or one of its own",
    )


def answer(args: argparse.Namespace) -> Reply:
    """Run what the folder has no row of, and write its tables."""
    from planner.cli.measure import seconds
    from planner.sweep.jobs import sweep_from
    from planner.sweep.run import TIME_LIMIT_S, run_sweep

    if hasattr(args, "ray") and hasattr(args, "workers"):
        raise SetupError("--workers and --ray exclude each other; Ray's nodes say how many CPUs they have.")
    path = Path(args.sweep)
    workers, time_limit_s = _workers(args), seconds(args, "time_limit_s", TIME_LIMIT_S)
    sweep = sweep_from(path, verb=getattr(args, "verb", None))
    out = Path(getattr(args, "out", "") or path.with_suffix(""))
    if out == path:
        raise SetupError(f"{path} has no ending .toml; give a folder for the results with --out.")
    told = _Told(len(sweep.jobs))
    try:
        found = run_sweep(
            sweep,
            out,
            workers=workers,
            ray_address=getattr(args, "ray", None),
            time_limit_s=time_limit_s,
            retry_failed=hasattr(args, "retry_failed"),
            write_only=hasattr(args, "write_only"),
            on_rows=told.rows,
        )
    except KeyboardInterrupt:
        print("All rows until now are kept; run the same command again to go on.", file=sys.stderr)
        raise
    return _reply(sweep, found, out)


def _workers(args: argparse.Namespace) -> int | None:
    text = getattr(args, "workers", None)
    if text is None:
        return None
    if not text.isdecimal() or not 1 <= int(text) <= _MOST_WORKERS:
        raise SetupError(f"--workers must be a whole number from 1 to {_MOST_WORKERS:,}, got {text!r}.")
    return int(text)


class _Told:
    """Says on standard error how far it is, from time to time."""

    def __init__(self, jobs: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._jobs, self._clock = jobs, clock
        self._started = self._said = clock()
        self._new = 0

    def rows(self, rows: Sequence[dict[str, Any]], left: int) -> None:
        """Some rows came, `left` jobs are to come."""
        self._new += len(rows)
        at = self._clock()
        if at - self._said < _SAID_EVERY_S:
            return
        self._said = at
        rate = self._new / (at - self._started)
        print(
            f"{self._jobs - left:,}/{self._jobs:,}, {rate:.3g} a second, about {_time(left / rate)} left",
            file=sys.stderr,
            flush=True,
        )


def _time(seconds: float) -> str:
    """`"40 s"`, `"12 min"`, `"3.5 h"`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _reply(sweep: Sweep, found: Swept, out: Path) -> Reply:
    now = found.done + found.failed + found.refused
    left = len(sweep.jobs) - found.before - now
    errors = [row for row in found.rows if row.get("error")]

    def show(console: Console) -> None:
        counts = [f"{found.before:,} were there before"] if found.before else []
        counts += [f"{found.done:,} {_PAST[sweep.verb]}"]
        counts += [f"{number:,} {name}" for name, number in _ill(found) if number]
        more = f" {left:,} are left." if left else ""
        console.print(f"{len(sweep.jobs):,} setups: {', '.join(counts)}.{more}", soft_wrap=True)
        for row in errors[:_MOST_ERRORS]:
            console.print(f"{row['setup'].get('model')}: {row['error']}", soft_wrap=True)
        if len(errors) > _MOST_ERRORS:
            rest = len(errors) - _MOST_ERRORS
            console.print(f"{rest:,} more without an answer stand in the table, each with its reason.")
        names = ", ".join(path.name for path in found.files)
        console.print(f"In {out}: {names}. The page Sweeps shows them.", soft_wrap=True)
        if found.note:
            console.print(found.note, soft_wrap=True)

    values = {
        "sweep": sweep.name,
        "verb": sweep.verb,
        "setups": len(sweep.jobs),
        "before": found.before,
        "done": found.done,
        "failed": found.failed,
        "refused": found.refused,
        "left": left,
        "rows": len(found.rows),
        "files": [str(path) for path in found.files],
    }
    return Reply(answer=values, show=show)


def _ill(found: Swept) -> tuple[tuple[str, int], ...]:
    return ("failed", found.failed), ("refused", found.refused)
