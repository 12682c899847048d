"""Runs that others measured and published: figures with their source, kept apart from our own records."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["PublishedRun", "published_runs"]


@dataclass(frozen=True, kw_only=True)
class PublishedRun:
    """One run of somebody else's: `setup` as `Setup.from_dict` takes it, peaks in bytes as published.

    `source` and `url` say where it was published; `versions` are those of the libraries then.
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


@cache
def published_runs() -> tuple[PublishedRun, ...]:
    """Every packaged run, file by file in their order."""
    found = []
    for path in sorted(Path(__file__).parent.glob("*.json")):
        file = json.loads(path.read_text(encoding="utf-8"))
        same = {"device": file["device"], "source": file["source"], "url": file["url"]}
        found += [PublishedRun(**run, **same) for run in file["runs"]]
    return tuple(found)
