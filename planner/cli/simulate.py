"""`planner simulate`: the memory of the real training step, run without a GPU (imports torch)."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from planner.cli.estimate import report_reply
from planner.cli.flags import add_setup_flags, setup_from, whole
from planner.cli.reply import Reply
from planner.errors import PlannerError, SetupError

__all__ = ["HELP", "answer", "flags", "missing_library"]

HELP = "memory of the real training step, run without a GPU on tensors without storage, in seconds"
_OPTIONAL = {"torch", "transformers", "peft", "accelerate", "safetensors"}


def flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    add_setup_flags(parser)
    parser.add_argument("--rank", metavar="N", help="which of several GPUs (default: 0, the largest shards)")
    parser.add_argument(
        "--snapshot",
        metavar="FILE",
        help="write the memory's history for pytorch.org/memory_viz to this file",
    )


def answer(args: argparse.Namespace) -> Reply:
    """The simulation of the setup, with a moving bar on standard error where that is a terminal."""
    setup = setup_from(args)
    target = _target(args.snapshot) if "snapshot" in args else None
    rank = whole(args.rank) if "rank" in args else None
    from planner.cli.progress import progress_bar

    with missing_library("simulate"):
        from planner.simulate.on_gpu import simulated_on_gpu
        from planner.simulate.snapshot import Recording

        recording = Recording() if target else None
        with progress_bar() as progress:
            report = simulated_on_gpu(setup, progress=progress, watch=recording, rank=rank)
        if recording and target:
            recording.write(target)
    return report_reply(setup, report)


@contextmanager
def missing_library(verb: str) -> Iterator[None]:
    """What is not installed, in one line; transformers says less while it runs. Raises PlannerError."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read once, when transformers is imported
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _OPTIONAL:
            raise
        raise PlannerError(
            f"{verb} needs {error.name}, which is not installed; run pip install 'vram-planner[simulate]'."
        ) from None


def _target(text: str) -> Path:
    """The file of `--snapshot`. Raises SetupError, before anything is simulated, where it cannot be one."""
    path = Path(text)
    try:
        if not text or (path.exists() and not path.is_file()):
            raise SetupError(f"--snapshot {text!r} is no file; name a file, such as step.pickle.")
        if not path.absolute().parent.is_dir():
            raise SetupError(f"--snapshot {text!r}: there is no folder {str(path.parent)!r}; make it first.")
    except SetupError:
        raise
    except (OSError, ValueError) as error:  # a name too long, a null byte
        reason = getattr(error, "strerror", None) or error
        raise SetupError(f"--snapshot {text[:80]!r} cannot be a file's name ({reason}).") from None
    return path
