"""`planner simulate`: the memory of the real training step, run without a GPU (imports torch)."""

from __future__ import annotations

import argparse
import os

from planner.cli.estimate import report_reply
from planner.cli.flags import add_setup_flags, setup_from
from planner.cli.reply import Reply
from planner.errors import PlannerError

__all__ = ["HELP", "answer", "flags"]

HELP = "memory of the real training step, run without a GPU on tensors without storage, in seconds"
_OPTIONAL = {"torch", "transformers", "peft", "accelerate", "safetensors"}


def flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    add_setup_flags(parser)


def answer(args: argparse.Namespace) -> Reply:
    """The simulation of the setup, with a moving bar on standard error where that is a terminal."""
    setup = setup_from(args)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read once, when transformers is imported
    from planner.cli.progress import progress_bar
    from planner.simulate import simulate

    try:
        with progress_bar() as progress:
            report = simulate(setup, progress=progress)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _OPTIONAL:
            raise
        raise PlannerError(
            f"simulate needs {error.name}, which is not installed; run pip install 'vram-planner[simulate]'."
        ) from None
    return report_reply(setup, report)
