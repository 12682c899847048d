"""A matrix of setups: a TOML file whose groups expand to every combination of their values."""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.errors import PlannerError, SetupError
from planner.estimate import estimate
from planner.record import setup_key
from planner.spec import Setup

__all__ = ["Matrix", "matrix_from"]

_WORST_BYTES_PER_PARAMETER = 16  # fp32 weights, gradients and two states: an order where no estimate exists


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """The setups of a file, those that need least memory first; `name` is stored with their records."""

    name: str
    setups: tuple[Setup, ...]


def matrix_from(path: Path) -> Matrix:
    """Read and expand a matrix.

    `set = "NAME"` at the top, a table `[defaults]`, and `[[group]]` tables of a setup's keys; a list of
    values stands for each of them, every combination is one setup, and repeated setups count once. Raises
    SetupError, naming the group, for what cannot be read or is no setup.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SetupError(f"{path} cannot be read ({error.strerror}); name a matrix in TOML.") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SetupError(f"{path} is no TOML: {error}.") from None
    groups = content.get("group")
    if not isinstance(groups, list) or not groups:
        raise SetupError(f"{path} has no [[group]]; a group is a table of a setup's keys.")
    found: dict[str, Setup] = {}
    for number, group in enumerate(groups, 1):
        for values in _combinations({**content.get("defaults", {}), **group}):
            try:
                setup = Setup.from_dict(values)
            except SetupError as error:
                raise SetupError(f"{path}, group {number}: {error}") from None
            found.setdefault(setup_key(setup.to_dict()), setup)
    ordered = sorted(found.values(), key=_needed_bytes)
    return Matrix(name=str(content.get("set", path.stem)), setups=tuple(ordered))


def _combinations(group: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every choice of one value for each key that lists several."""
    choices = [value if isinstance(value, list) else [value] for value in group.values()]
    for chosen in itertools.product(*choices):
        yield dict(zip(group, chosen, strict=True))


def _needed_bytes(setup: Setup) -> int:
    try:
        return estimate(setup).peak_allocated_bytes
    except PlannerError:
        return setup.model.parameters * _WORST_BYTES_PER_PARAMETER
