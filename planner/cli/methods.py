"""`planner methods`: every method for one model, sorted by peak; by formulas, or all by simulation."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from planner.advise.default_methods import default_methods
from planner.advise.fits import verdict
from planner.advise.method_table import MethodTable, method_table
from planner.cli.flags import add_setup_flags, setup_from
from planner.cli.reply import Reply
from planner.cli.simulate import missing_library
from planner.report import MemoryReport
from planner.spec import Setup

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["HELP", "answer", "flags"]

HELP = "all methods for one model, sorted by peak: by formulas where known, --simulate for every one"


def flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    add_setup_flags(parser)
    parser.add_argument(
        "--simulate", action="store_true", help="run the step of every method, a second or two for each"
    )


def answer(args: argparse.Namespace) -> Reply:
    """The table, with a moving bar on standard error while it simulates."""
    setup = setup_from(args)
    table = _simulated(setup) if getattr(args, "simulate", False) else method_table(setup)
    words = _verdicts(setup, table)

    def show(console: Console) -> None:
        from planner.cli.tables import show_methods

        show_methods(console, table, words)

    found = table.to_dict()
    for row in found["rows"]:
        if row["title"] in words:
            row["verdict"] = words[row["title"]]
    return Reply(answer={"setup": setup.to_dict(), **found}, show=show)


def _verdicts(setup: Setup, table: MethodTable) -> dict[str, str]:
    """The verdict's word on the setup's GPU for each row, by title."""
    if setup.gpu is None:
        return {}
    return {
        row.title: verdict(row.report, setup.gpu).word
        for row in table.rows
        if row.report is not None and row.peak_bytes is not None
    }


def _simulated(setup: Setup) -> MethodTable:
    from planner.cli.progress import progress_bar

    titles = [named.title for named in default_methods(setup) if named.setup]
    number = 0
    with missing_library("methods --simulate"), progress_bar() as draw:
        from planner.simulate.run import simulate

        def answered(one: Setup) -> MemoryReport:
            nonlocal number
            number += 1
            return simulate(one, progress=_told(draw, f"{number} of {len(titles)}, {titles[number - 1]}"))

        return method_table(setup, answered)


def _told(draw: Callable[[str, int | None], None] | None, title: str) -> Any:
    if draw is None:
        return None
    return lambda phase, step: draw(f"{title}: {phase}", step)
