"""Sizes: bytes inside, GiB on screens, GB (10^9 bytes) in the textbook example only."""

from __future__ import annotations

import math
import re

from planner.errors import SetupError

__all__ = ["GB", "GIB", "KIB", "MIB", "count", "gb", "gib", "parse_bytes", "parse_count", "percent"]

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
GB = 10**9

_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(GiB|GB|MiB|MB)\s*", re.IGNORECASE)
_SIZE_UNITS = {"gib": GIB, "gb": GB, "mib": MIB, "mb": 10**6}
_COUNT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?(?:e[+]?[0-9]{1,2})?)\s*([kmbt]?)\s*", re.IGNORECASE)
_COUNT_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def gib(size_bytes: float) -> str:
    """Bytes for a screen: `"20.4 GiB"`, two decimals below 1 GiB."""
    value = size_bytes / GIB
    return f"{value:,.2f} GiB" if abs(value) < 1 else f"{value:,.1f} GiB"


def gb(size_bytes: float) -> str:
    """Bytes in units of 10^9 with two decimals, trailing zeros dropped: `"14.05 GB"`."""
    return f"{size_bytes / GB:,.2f}".rstrip("0").rstrip(".") + " GB"


def count(number: int) -> str:
    """A number of parameters for a screen: `"8.03 B"`, `"9.2 M"`, `"65,536"`."""
    for limit, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if number >= limit:
            digits = 2 if unit != "M" else 1
            return f"{number / limit:,.{digits}f} {unit}"
    return f"{number:,}"


def percent(share: float) -> str:
    """A share from 0 to 1 with as many digits as it needs: `"0.28 %"`, `"83.3 %"`."""
    value = 100 * share
    return f"{value:.1f} %" if abs(value) >= 1 or value == 0 else f"{value:.2g} %"


def parse_bytes(text: str) -> int:
    """`"24GiB"` or `"24 GB"` in bytes (GiB = 2^30, GB = 10^9). Raises SetupError."""
    match = _SIZE.fullmatch(text)
    if not match or float(match[1]) <= 0:
        raise SetupError(f"{text!r} is not a size; write a positive number and GiB, such as 24GiB.")
    return int(float(match[1]) * _SIZE_UNITS[match[2].lower()])


def parse_count(text: str) -> int:
    """`"7e9"`, `"7B"` or `"4000000"` as a whole number of at least 1. Raises SetupError."""
    match = _COUNT.fullmatch(text)
    value = float(match[1]) * _COUNT_UNITS[match[2].lower()] if match else math.nan
    if not math.isfinite(value) or value < 1 or value > 1e15:
        raise SetupError(
            f"{text!r} is not a number of parameters; write one from 1 to 1e15, such as 7e9 or 7B."
        )
    return round(value)
