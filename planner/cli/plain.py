"""Text for people without rich: a console that prints, and tables of aligned columns."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["PlainScreen", "columns"]


class PlainScreen:
    """What the verbs need of a console where rich is not installed."""

    def print(self, text: object = "", *, soft_wrap: bool = True) -> None:
        """One line, or several, never broken."""
        print(text)


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
