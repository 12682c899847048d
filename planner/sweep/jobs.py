"""What a sweep asks for: a job for each combination of a grid, and what is wrong with the others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from planner.checks import choice
from planner.errors import PlannerError
from planner.measure.matrix import grid_from
from planner.spec import Setup

__all__ = ["Job", "Sweep", "VerbName", "key_of", "sweep_from"]

VerbName = Literal["estimate", "simulate", "measure"]
_KEY_CHARACTERS = 32  # 128 bits of SHA-256


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One combination: its flat setup with every default filled in, or `refused` says why it is none."""

    key: str
    setup: Mapping[str, Any]
    refused: str = ""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The jobs of a file in its order, none twice; `verb` is what is done with each."""

    name: str
    verb: VerbName
    jobs: tuple[Job, ...]


def sweep_from(path: Path, *, verb: str | None = None) -> Sweep:
    """Read a grid as `planner measure --matrix` does, with `verb = "simulate"` at its top.

    `verb` here comes before the file's; estimate where neither says it. A combination that is no setup is a
    job with `refused`. Raises SetupError for what cannot be read.
    """
    grid = grid_from(path)
    asked = verb or str(grid.top.get("verb", "estimate"))
    choice("verb", asked, get_args(VerbName))
    found: dict[str, Job] = {}
    for number, values in grid.combinations:
        job = _job(number, values, asked)
        found.setdefault(job.key, job)
    return Sweep(name=grid.name, verb=asked, jobs=tuple(found.values()))  # type: ignore[arg-type]


def key_of(verb: str, flat: Mapping[str, Any]) -> str:
    """A short name for the answer of a verb to a setup, its GPU included."""
    text = json.dumps([verb, flat], sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:_KEY_CHARACTERS]


def _job(group: int, values: Mapping[str, Any], verb: str) -> Job:
    try:
        flat: Mapping[str, Any] = Setup.from_dict(values).to_dict()
    except PlannerError as error:
        flat = json.loads(json.dumps(values, default=str))  # a date is text: it is refused anyway
        reason = " ".join(str(error).split())
        return Job(key=key_of(verb, flat), setup=flat, refused=f"group {group}: {reason}")
    return Job(key=key_of(verb, flat), setup=flat)
