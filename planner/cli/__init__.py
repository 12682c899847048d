"""The command line: `python -m planner VERB`, or `planner VERB`. Translates, and computes nothing."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

from planner.cli.parser import program
from planner.cli.reply import Reply
from planner.errors import PlannerError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["main"]

_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
_CLOSED_PIPE = 141  # 128 + SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0 done, 1 failed while running, 2 a bad setup, 3 no CUDA device, 130 interrupted, 141 the reader of
    the output went away. Errors are one line on standard error; `--debug` adds the traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except PlannerError as error:
        return _failed(str(error), error.exit_code, debug="--debug" in arguments)
    except KeyboardInterrupt:
        return _failed("interrupted.", _INTERRUPTED, debug=False)
    except BrokenPipeError:
        # Python's own advice (library/signal, "Note on SIGPIPE"): nothing is left to flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _CLOSED_PIPE
    except Exception as error:
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        hint = "run again with --debug for the traceback."
        return _failed(f"it failed while running ({reason}); {hint}", 1, debug="--debug" in arguments)


def _run(arguments: list[str]) -> int:
    parser = program()
    try:
        args = parser.parse_args(arguments)
    except SystemExit:  # --help and --version have printed what was asked for
        sys.stdout.flush()
        return 0
    with contextlib.redirect_stdout(sys.stderr):  # what a library prints is not the answer
        reply: Reply = args.answer(args)
    if args.json:
        print(json.dumps(reply.to_dict(), allow_nan=False))
    else:
        reply.show(_screen())
    sys.stdout.flush()
    return 0


def _screen() -> Console:
    try:
        from planner.cli.tables import screen
    except ModuleNotFoundError:  # rich is missing: verbs that print plain text still do
        from planner.cli.plain import PlainScreen

        return PlainScreen()  # type: ignore[return-value]
    return screen()


def _failed(message: str, exit_code: int, *, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    line = "".join(c if c.isprintable() else "?" for c in " ".join(message.split()))
    print(f"planner: {line}", file=sys.stderr)
    return exit_code
