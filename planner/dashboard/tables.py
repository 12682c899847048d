"""The figures' twins: the same numbers as tables and as files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from html import escape

import pandas as pd

from planner.advise import Cell, Verdict
from planner.catalog.gpus import Gpu
from planner.compare import Comparison, Difference
from planner.dashboard.words import PART_TITLES, SIGNS
from planner.report import PARTS, MemoryReport
from planner.units import GIB, gib

__all__ = [
    "cards_table",
    "grid_table",
    "html_table",
    "part_title",
    "parts_csv",
    "parts_table",
    "reports_json",
]

_TABLE = "border-collapse:collapse;width:100%;font-size:0.88rem;font-variant-numeric:tabular-nums"
_CELL = "padding:0.28rem 0.3rem;"
_RULE = "border-top:1px solid rgba(125,136,150,0.3);"
_ALIGN = {False: "text-align:left;vertical-align:bottom;", True: "text-align:right;vertical-align:bottom;"}
_TOTAL = "font-weight:650;border-top-width:2px;"


def parts_table(rows: Sequence[tuple[str, MemoryReport]], compared: Comparison | None = None) -> str:
    """HTML: a row for each part and the peak, a column for each report, and what is saved, in GiB."""
    head = ["Part", *(escape(label) for label, _ in rows)]
    lines = [[PART_TITLES[part], *(_cell(report, part) for _, report in rows)] for part in PARTS]
    lines.append(["Peak allocated", *(gib(report.peak_allocated_bytes) for _, report in rows)])
    if compared is not None:
        head.append("Saved")
        for line, difference in zip(lines, (*compared.parts, compared.peak), strict=True):
            line.append(_saved(difference))
    return html_table(head, lines, alt="Peak allocated memory by part", last_is_total=True)


def html_table(
    head: Sequence[str], lines: Sequence[Sequence[str]], *, alt: str, last_is_total: bool = False
) -> str:
    """HTML: a table whose first column is text and whose others are flush right. Cells are HTML already.

    A table wider than the screen scrolls within itself, by keyboard too.
    """
    top = "".join(
        f'<th scope="col" style="{_CELL}{_ALIGN[at > 0]}">{text}</th>' for at, text in enumerate(head)
    )
    body = "".join(
        f'<tr style="{_RULE}{_TOTAL if last_is_total and line is lines[-1] else ""}">{_cells(line)}</tr>'
        for line in lines
    )
    return (
        f'<div role="region" aria-label="{escape(alt)}" tabindex="0" style="overflow-x:auto">'
        f'<table style="{_TABLE}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def grid_table(cells: Sequence[Sequence[Cell]]) -> str:
    """HTML: the grid's cells with sign and GiB on the card."""
    head = ["Micro batch", *(f"{cell.seq_len:,}" for cell in cells[0])]
    lines = [[f"{row[0].micro_batch_size:,}", *(_in_words(cell) for cell in row)] for row in cells]
    return html_table(head, lines, alt="Memory on the card by micro batch and sequence length")


def part_title(name: str) -> str:
    """The part's name on the screen."""
    return PART_TITLES[name]


def cards_table(cards: Sequence[tuple[Gpu, Verdict]]) -> pd.DataFrame:
    """A row for each GPU: verdict with its sign, memory and what the run takes there, in GiB."""
    return pd.DataFrame(
        {
            "Verdict": [f"{SIGNS[found.word]} {found.word}" for _, found in cards],
            "GPU": [card.driver_name.removeprefix("NVIDIA ") for card, _ in cards],
            "Memory, GiB": [round(card.total_bytes / GIB, 1) for card, _ in cards],
            "At most, GiB": [round(found.upper_bytes / GIB, 1) for _, found in cards],
        }
    )


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


def _saved(difference: Difference) -> str:
    if not difference.saved_bytes:
        return "none"
    sign = "" if difference.saved_bytes > 0 else "\N{MINUS SIGN}"
    return sign + gib(abs(difference.saved_bytes))


def _cells(line: Sequence[str]) -> str:
    first, *others = line
    numbers = "".join(f'<td style="{_CELL}{_ALIGN[True]}white-space:nowrap">{text}</td>' for text in others)
    return (
        f'<th scope="row" style="{_CELL}{_ALIGN[False]}font-weight:inherit;width:34%">{first}</th>{numbers}'
    )


def _in_words(cell: Cell) -> str:
    if cell.verdict is None:
        return "beyond the model"
    return f"{SIGNS[cell.verdict.word]} {gib(cell.verdict.device_bytes)}"


def _cell(report: MemoryReport, part: str) -> str:
    size_bytes = int(getattr(report.parts, part))
    return "not known" if part in report.not_known else gib(size_bytes) if size_bytes else "0"
