"""The figures' twins: the same numbers as tables and as files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence

import pandas as pd

from planner.dashboard.words import PART_TITLES
from planner.report import PARTS, MemoryReport
from planner.units import gib

__all__ = ["parts_csv", "parts_table", "reports_json"]


def parts_table(rows: Sequence[tuple[str, MemoryReport]]) -> pd.DataFrame:
    """A row for each part and the peak, a column for each report, in GiB as text."""
    columns = {
        label: [*(_cell(report, part) for part in PARTS), gib(report.peak_allocated_bytes)] for label, report in rows
    }
    index = pd.Index([*(PART_TITLES[part] for part in PARTS), "Peak allocated"], name="Part")
    return pd.DataFrame(columns, index=index)


def parts_csv(rows: Sequence[tuple[str, MemoryReport]]) -> str:
    """The same table in bytes, for a spreadsheet: part, then a column for each report."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["part_bytes", *(label for label, _ in rows)])
    for part in PARTS:
        writer.writerow([part, *("" if part in r.not_known else getattr(r.parts, part) for _, r in rows)])
    writer.writerow(["peak_allocated_bytes", *(report.peak_allocated_bytes for _, report in rows)])
    return text.getvalue()


def reports_json(rows: Sequence[tuple[str, MemoryReport]]) -> str:
    """Every report in full, as the command line prints it, under its label."""
    return json.dumps({label: report.to_dict() for label, report in rows}, indent=1)


def _cell(report: MemoryReport, part: str) -> str:
    return "not known" if part in report.not_known else gib(getattr(report.parts, part))
