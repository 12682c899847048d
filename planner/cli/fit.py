"""`planner fit`: does the run fit this GPU, how much would fit, and what to change."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from planner.cli.flags import add_setup_flags, setup_from, whole
from planner.cli.reply import Reply

if TYPE_CHECKING:
    from rich.console import Console

    from planner.advise.shardings import Shardings
    from planner.spec import Setup

__all__ = ["HELP", "answer", "flags"]

HELP = "whether the run fits a GPU, the most that fits it, the smallest GPU that fits, and what to change"


def flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    add_setup_flags(parser)


def answer(args: argparse.Namespace) -> Reply:
    """The verdict, the limits and the changes for the setup's GPU."""
    from planner import advise
    from planner.advise.limits import asked_gpu
    from planner.estimate import estimate

    setup = _setup(args)
    gpu = asked_gpu(setup)
    report = estimate(setup)
    found = advise.verdict(report, gpu)
    batch, seq_len = advise.largest_micro_batch(setup), advise.largest_seq_len(setup)
    smallest = advise.smallest_gpu(setup)
    changes = advise.changes(setup)
    several = _several(setup)

    def show(console: Console) -> None:
        from planner.cli.tables import show_fit

        show_fit(console, found, batch, seq_len, smallest, changes)
        if several:
            from planner.cli.sharding_tables import shardings_text

            text = shardings_text(several, setup.sharding.num_gpus)
            console.print(text, soft_wrap=True)

    return Reply(
        answer={
            "verdict": found.to_dict(),
            "largest_micro_batch": batch,
            "largest_seq_len": seq_len,
            "smallest_gpu": smallest.name if smallest else None,
            "changes": [change.to_dict() for change in changes],
            "report": report.to_dict(),
            **({"shardings": several.to_dict()} if several else {}),
        },
        show=show,
    )


def _setup(args: argparse.Namespace) -> Setup:
    """The setup asked for; where a number of GPUs is given alone, the sharding that fits and sends least."""
    number = whole(str(getattr(args, "num_gpus", 1)))
    if number == 1 or hasattr(args, "sharding"):
        return setup_from(args)
    from planner.advise.shardings import cheapest, options, shared

    args.sharding = "fsdp"
    setup = setup_from(args)
    best = cheapest(options(setup, (setup.sharding.num_gpus,)))
    return setup if best is None else shared(setup, best.num_gpus, best.sharding)


def _several(setup: Setup) -> Shardings | None:
    """Every way to share the run, where it has several GPUs."""
    if not setup.sharding.is_distributed:
        return None
    from planner.advise.shardings import shardings

    return shardings(setup)
