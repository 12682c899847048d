"""`planner simulate`: the memory of the real training step, run without a GPU (imports torch)."""

from __future__ import annotations

import argparse
from typing import Any

from planner.cli.estimate import report_reply
from planner.cli.flags import add_setup_flags, setup_from
from planner.cli.reply import Reply

__all__ = ["HELP", "answer", "flags"]

HELP = "memory of the real training step, run without a GPU on tensors without storage, in seconds"


def flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    add_setup_flags(parser)
    parser.add_argument(
        "--snapshot", metavar="FILE", help="also write the allocator's history for pytorch.org/memory_viz"
    )


def answer(args: argparse.Namespace) -> Reply:
    """The simulation of the setup, with a progress bar on standard error where that is a terminal."""
    setup = setup_from(args)
    from planner.cli.progress import progress_bar
    from planner.simulate import simulate

    options: dict[str, Any] = {"snapshot": args.snapshot} if hasattr(args, "snapshot") else {}
    with progress_bar() as progress:
        report = simulate(setup, progress=progress, **options)
    return report_reply(setup, report)
