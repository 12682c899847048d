"""Every error a user can meet, each with the exit code of the command line.

    PlannerError                 1   something failed while running
    ├── SetupError               2   what was asked for makes no sense, or cannot be done
    │   └── ModelError           2   a model that cannot be found, read or trusted
    ├── DeviceError              3   no CUDA device can be used
    └── TraceError               1   a training step that cannot be simulated

The message is one line that says what was given, what is allowed and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["DeviceError", "ModelError", "PlannerError", "SetupError", "TraceError", "nearest"]


class PlannerError(Exception):
    """Base of all errors that are meant for the user; `exit_code` is the shell's."""

    exit_code = 1


class SetupError(PlannerError, ValueError):
    """A setup that is refused where it enters."""

    exit_code = 2


class ModelError(SetupError):
    """A model that is unknown, unreachable, malformed, or would need remote code."""


class DeviceError(PlannerError):
    """No CUDA device that can be measured on."""

    exit_code = 3


class TraceError(PlannerError):
    """A training step that cannot be simulated; names the operation."""


def nearest(given: str, allowed: Iterable[str], most: int = 3) -> str:
    """The end of an error sentence: the names closest to what was typed, or the allowed ones.

    `nearest("qproj", ["q_proj", "v_proj"])` is `"did you mean q_proj, v_proj?"`.
    """
    names = sorted(set(allowed))
    folded = {name.casefold(): name for name in names}
    close = difflib.get_close_matches(given.casefold(), folded, n=most, cutoff=0.6)
    if close:
        return f"did you mean {', '.join(folded[name] for name in close)}?"
    shown = names if len(names) <= 12 else [*names[:12], "..."]
    return f"allowed: {', '.join(shown)}."
