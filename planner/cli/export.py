"""`planner export`: what was planned as a folder of files that run."""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from planner.cli.flags import add_setup_flags, setup_from
from planner.cli.reply import Reply
from planner.errors import PlannerError, SetupError
from planner.export import exported

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["HELP", "answer", "flags", "write"]

HELP = "what was planned as files that run: a training script, its settings, requirements"


def flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    add_setup_flags(parser)
    group = parser.add_argument_group("where to")
    group.add_argument("--out", metavar="DIR", help="folder for the files; made where it does not exist")
    group.add_argument(
        "--force",
        action="store_true",
        help="write into a folder that has files, over those of the same names",
    )


def answer(args: argparse.Namespace) -> Reply:
    """Write the files of the setup and say which. Raises SetupError where the folder is in the way."""
    setup = setup_from(args)
    given = getattr(args, "out", "")
    if not given:
        raise SetupError("--out is missing; give a folder for the files, such as --out my-run.")
    files = exported(setup)
    write(files, Path(given), force=getattr(args, "force", False))
    names = sorted(files)

    def show(console: Console) -> None:
        console.print(f"Written to {given}: {', '.join(names)}.", soft_wrap=True)
        console.print(f"Try it without a download: python {Path(given, 'train.py')} --model model --steps 3")

    return Reply(answer={"setup": setup.to_dict(), "out": given, "files": names}, show=show)


def write(files: Mapping[str, str], out: Path, *, force: bool = False) -> None:
    """Write the files below `out`, whole or not at all: into a folder beside it, then moved.

    A folder with files is refused without `force`; with it, each file replaces the one of its name and
    all others stay. Raises SetupError, and PlannerError where the disk refuses.
    """
    if out.exists() and not out.is_dir():
        raise SetupError(f"--out {out} is a file; give a folder.")
    try:
        if not force and out.is_dir() and any(out.iterdir()):
            raise SetupError(f"--out {out} has files already; give another folder, or --force.")
        out.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        try:
            for name, text in files.items():
                path = beside / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8", newline="\n")
            _move(beside, out, files)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise PlannerError(f"--out {out} cannot be written ({reason}); give another folder.") from error


def _move(beside: Path, out: Path, files: Mapping[str, str]) -> None:
    """The whole folder at once where there is none yet, else file by file."""
    if not out.exists():
        beside.chmod(0o777 & ~_umask())  # a temporary folder is its owner's alone
        beside.rename(out)
        return
    for name in files:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(beside / name, out / name)


def _umask() -> int:
    """What new files may not be; it can only be read by setting it."""
    current = os.umask(0)
    os.umask(current)
    return current
