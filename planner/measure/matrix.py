"""A matrix of setups: a TOML file whose groups expand to every combination of their values.

`grid_from` reads the grammar, which sweeps share; `matrix_from` makes setups of it, small ones first.
"""

from __future__ import annotations

import itertools
import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.errors import PlannerError, SetupError
from planner.estimate import estimate
from planner.record import setup_key
from planner.spec import Setup

__all__ = ["Grid", "Matrix", "grid_from", "matrix_from"]

_WORST_BYTES_PER_PARAMETER = 16  # fp32 weights, gradients and two states: an order where no estimate exists
_MOST_COMBINATIONS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """The setups of a file, those that need least memory first; `name` is stored with their records."""

    name: str
    setups: tuple[Setup, ...]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What a file lists, not yet held against anything.

    `top` are the keys before the first table; `combinations` pairs of a group's number, from 1, and flat
    values; `name` is its `set`, or the file's own name.
    """

    name: str
    top: Mapping[str, Any]
    combinations: tuple[tuple[int, dict[str, Any]], ...]


def grid_from(path: Path) -> Grid:
    """Read a grid: `[defaults]`, and `[[group]]` tables of keys; a list of values stands for each of them.

    Every combination in a group counts. Raises SetupError for what cannot be read.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SetupError(f"{path} cannot be read ({error.strerror}); name a matrix in TOML.") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SetupError(f"{path} is no TOML: {error}.") from None
    groups, defaults = content.pop("group", None), content.pop("defaults", {})
    tables = isinstance(groups, list) and all(isinstance(group, dict) for group in groups)
    if not groups or not tables or not isinstance(defaults, dict):
        raise SetupError(f"{path} has no [[group]]; a group is a table of a setup's keys.")
    filled = [{**defaults, **group} for group in groups]
    count = sum(math.prod(len(_choices(value)) for value in group.values()) for group in filled)
    if count > _MOST_COMBINATIONS:
        raise SetupError(f"{path} lists {count:,} combinations, at most {_MOST_COMBINATIONS:,} are taken.")
    found = [(number, values) for number, group in enumerate(filled, 1) for values in _combinations(group)]
    return Grid(name=str(content.get("set", path.stem)), top=content, combinations=tuple(found))


def matrix_from(path: Path) -> Matrix:
    """The setups of a grid; repeated ones count once, whatever GPU they are planned for.

    Raises SetupError, naming the group, for what cannot be read or is no setup.
    """
    grid = grid_from(path)
    found: dict[str, Setup] = {}
    for number, values in grid.combinations:
        try:
            setup = Setup.from_dict(values)
        except SetupError as error:
            raise SetupError(f"{path}, group {number}: {error}") from None
        found.setdefault(setup_key(setup.to_dict()), setup)
    return Matrix(name=grid.name, setups=tuple(sorted(found.values(), key=_needed_bytes)))


def _combinations(group: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every choice of one value for each key that lists several."""
    for chosen in itertools.product(*map(_choices, group.values())):
        yield dict(zip(group, chosen, strict=True))


def _choices(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _needed_bytes(setup: Setup) -> int:
    try:
        return estimate(setup).peak_allocated_bytes
    except PlannerError:
        return setup.model.parameters * _WORST_BYTES_PER_PARAMETER
