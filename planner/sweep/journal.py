"""The journal of a sweep: JSON lines, only ever appended, from which everything else is written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from planner.measure.records import append_line, json_lines
from planner.sweep.rows import SCHEMA

__all__ = ["Journal"]


class Journal:
    """The rows in `folder/journal.jsonl`, the last one of each key."""

    def __init__(self, folder: Path) -> None:
        """Read what is there; a line that a lost process left broken is no row."""
        self.path = folder / "journal.jsonl"
        self.rows: dict[str, dict[str, Any]] = {}
        for row in json_lines(self.path):
            if row.get("schema") == SCHEMA and isinstance(row.get("key"), str):
                self.rows[row["key"]] = row

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows, durably: all of them are on the disk when this returns. Raises PlannerError."""
        if rows:
            append_line("\n".join(json.dumps(row, allow_nan=False) for row in rows), self.path)
            self.rows |= {row["key"]: dict(row) for row in rows}
