"""`planner compare`: full fine-tuning beside the chosen method, part by part."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from planner.cli.flags import add_setup_flags, setup_from, whole
from planner.cli.reply import Reply
from planner.compare import comparison, full_of, storage
from planner.errors import SetupError
from planner.estimate import estimate
from planner.spec import FullFineTuning

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["HELP", "answer", "flags"]

HELP = "full fine-tuning beside a PEFT method: what each part of the memory saves, and the disk space"
_TASKS = 5


def flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    add_setup_flags(parser)
    parser.add_argument(
        "--tasks", metavar="N", help=f"fine-tuned tasks to count disk space for (default: {_TASKS})"
    )


def answer(args: argparse.Namespace) -> Reply:
    """Both estimates, their differences and the disk space."""
    setup = setup_from(args)
    if isinstance(setup.method, FullFineTuning):
        raise SetupError(
            "compare sets full fine-tuning beside another method; give --method lora, adapter or bitfit, "
            "or --trainable-params 4e6."
        )
    space = storage(setup, whole(getattr(args, "tasks", str(_TASKS))))
    both = comparison(estimate(full_of(setup)), estimate(setup))
    verdicts: dict[str, Any] = {}
    if setup.gpu:
        from planner.advise.fits import verdict

        verdicts = {"full": verdict(both.full, setup.gpu), "chosen": verdict(both.chosen, setup.gpu)}

    def show(console: Console) -> None:
        from planner.cli.tables import show_comparison

        show_comparison(console, both, space, tuple(verdicts.values()))

    found: dict[str, Any] = {**both.to_dict(), "storage": space.to_dict()}
    if verdicts:
        found["verdicts"] = {name: item.to_dict() for name, item in verdicts.items()}
    return Reply(answer=found, show=show)
