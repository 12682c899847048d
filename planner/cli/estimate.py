"""`planner estimate`: the memory of one training step, by formulas."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from planner.cli.flags import add_setup_flags, setup_from
from planner.cli.plain import report_text
from planner.cli.reply import Reply
from planner.estimate import estimate
from planner.report import MemoryReport
from planner.spec import Setup

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["HELP", "answer", "flags", "report_reply"]

HELP = "memory of one training step by formulas, in milliseconds"


def flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    add_setup_flags(parser)


def answer(args: argparse.Namespace) -> Reply:
    """The estimate of the setup."""
    setup = setup_from(args)
    return report_reply(setup, estimate(setup))


def report_reply(setup: Setup, report: MemoryReport) -> Reply:
    """A report, with the verdict on the setup's GPU where one is given."""
    from planner.advise.fits import verdict

    found = verdict(report, setup.gpu) if setup.gpu else None

    def show(console: Console) -> None:
        try:
            from planner.cli.tables import show_report
        except ModuleNotFoundError:  # without rich
            console.print(report_text(report))
        else:
            show_report(console, report, found)

    extra = {"verdict": found.to_dict()} if found else {}
    return Reply(answer={**report.to_dict(), **extra}, show=show)
