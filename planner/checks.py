"""Checks of single values, each with one sentence that says what was given and what is allowed."""

from __future__ import annotations

import math
from typing import Any

from planner.errors import SetupError

__all__ = ["choice", "number", "whole"]

_LARGEST = 10**9


def whole(name: str, value: Any, *, low: int = 1, high: int = _LARGEST) -> None:
    """Refuse what is not a whole number from `low` to `high`. Raises SetupError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise SetupError(f"{name} must be a whole number of at least {low}, got {value!r}.")
    if value > high:
        raise SetupError(f"{name} must be at most {high:,}, got {value:,}.")


def number(
    name: str, value: Any, *, low: float, high: float = math.inf, low_allowed: bool = True
) -> None:
    """Refuse what is not a finite number from (or above) `low` and below `high`. Raises SetupError."""
    bounds = f"from {low:g}" if low_allowed else f"above {low:g}"
    if math.isfinite(high):
        bounds += f" and below {high:g}"
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or value < low
        or value >= high
        or (value == low and not low_allowed)
    ):
        raise SetupError(f"{name} must be a number {bounds}, got {value!r}.")


def choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Refuse what is not among the allowed words. Raises SetupError."""
    if value not in allowed:
        raise SetupError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")
