"""Runs that others measured and published: figures with their source, kept apart from our own records."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["PublishedRun", "published_runs"]

_FOLDER = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class PublishedRun:
    """One run of somebody else's: `setup` as `Setup.from_dict` takes it, peaks in bytes as published.

    `source` and `url` say where it was published; `versions` are those of the libraries then. The simulated
    peaks are ours, made by `scripts/simulate_published.py`; None where none is packaged.
    """

    id: str
    setup: Mapping[str, Any]
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    trainable_params: int
    total_params: int
    device: str
    versions: str
    source: str
    url: str
    simulated_allocated_bytes: int | None = None
    simulated_reserved_bytes: int | None = None


@cache
def published_runs() -> tuple[PublishedRun, ...]:
    """Every packaged run, file by file in their order."""
    peaks = _simulated_peaks()
    found = []
    for path in sorted(_FOLDER.glob("t4_*.json")):
        file = json.loads(path.read_text(encoding="utf-8"))
        same = {"device": file["device"], "source": file["source"], "url": file["url"]}
        for run in file["runs"]:
            allocated, reserved = peaks.get(run["id"], (None, None))
            found.append(
                PublishedRun(
                    **run, **same, simulated_allocated_bytes=allocated, simulated_reserved_bytes=reserved
                )
            )
    return tuple(found)


def _simulated_peaks() -> dict[str, tuple[int, int]]:
    path = _FOLDER / "simulations.json"
    if not path.exists():
        return {}
    peaks = json.loads(path.read_text(encoding="utf-8"))["peaks"]
    return {name: (allocated, reserved) for name, (allocated, reserved) in peaks.items()}
