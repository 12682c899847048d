"""The phases of a run as they begin, on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["phases_told"]


def phases_told() -> Callable[[Mapping[str, Any]], None] | None:
    """A listener that names each phase, and its rank where there are several; None where nobody looks."""
    if not sys.stderr.isatty():
        return None

    def tell(event: Mapping[str, Any]) -> None:
        if event["event"] == "enter":
            rank = f"rank {event['rank']}: " if "rank" in event else ""
            step = f", step {event['step']}" if event.get("step") else ""
            print(f"{rank}{event['name'].replace('_', ' ')}{step}", file=sys.stderr)

    return tell
