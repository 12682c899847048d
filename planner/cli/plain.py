"""Text for people without rich: a console that prints, and tables of aligned columns."""

from __future__ import annotations

from collections.abc import Sequence

from planner.report import MemoryReport
from planner.units import gib

__all__ = ["PlainScreen", "columns", "report_text"]


class PlainScreen:
    """What the verbs need of a console where rich is not installed."""

    def print(self, text: object = "", *, soft_wrap: bool = True) -> None:
        """One line, or several, never broken."""
        print(text)


def report_text(report: MemoryReport) -> str:
    """A report's parts at the peak, its peaks and its notes."""
    rows = [
        (name.replace("_", " ").capitalize(), "not known" if name in report.not_known else gib(size))
        for name, size in report.parts.to_dict().items()
    ]
    rows.append(("Peak allocated", gib(report.peak_allocated_bytes)))
    if report.peak_reserved_bytes is not None:
        rows.append(("Peak reserved", gib(report.peak_reserved_bytes)))
    lead = f"{report.setup['model']}, method {report.setup['method']}: {report.source}."
    return "\n".join((lead, columns(("Part", "At the peak"), rows), *report.notes))


def columns(names: Sequence[str], rows: Sequence[Sequence[str]], *, right: int = 1) -> str:
    """A table as text: names, a rule, rows; columns from number `right` on are aligned to the right."""
    table = [list(names), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(names))]
    lines = []
    for row in table:
        cells = [
            cell.rjust(width) if i >= right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join(lines)
