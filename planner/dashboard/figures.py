"""The figures, made from reports and advice. Sizes arrive in bytes and are drawn in GiB."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from planner.advise import Verdict
from planner.compare import Comparison
from planner.dashboard.words import PART_HELP, PART_TITLES
from planner.report import PARTS, MemoryReport
from planner.units import GIB, gib

__all__ = ["CONFIG", "bars", "bars_alt", "waterfall", "waterfall_alt"]

CONFIG = {"displayModeBar": False, "scrollZoom": False, "responsive": True}
# Middle tones: seen on white and on the dark background (a black line would vanish there).
LINE_COLOUR = "#7d8896"
_SAVED_COLOUR, _ADDED_COLOUR, _TOTAL_COLOUR = "#2b9777", "#bd7315", "#848fa1"
_ROW_PIXELS, _AROUND_PIXELS = 62, 104
_LEGEND = {"orientation": "h", "yanchor": "top", "y": -0.02, "x": 0, "xanchor": "left", "traceorder": "normal"}


def bars(rows: Sequence[tuple[str, MemoryReport]], verdict: Verdict | None = None) -> go.Figure:
    """Stacked bars, a row for each report, first on top; the card's capacity as a dashed line.

    The colours are the theme's ten, by position, so all eight parts are always drawn. Hatched rows
    were measured.
    """
    figure = go.Figure()
    labels = [_row_label(label, report) for label, report in rows]
    hatches = ["/" if report.source == "measurement" else "" for _, report in rows]
    for part in PARTS:
        sizes_bytes = [getattr(report.parts, part) for _, report in rows]
        figure.add_bar(
            y=labels,
            x=[size / GIB for size in sizes_bytes],
            orientation="h",
            name=PART_TITLES[part],
            showlegend=any(sizes_bytes),
            marker={"pattern": {"shape": hatches, "solidity": 0.25}, "line": {"width": 0}},
            customdata=[[gib(size), PART_HELP[part]] for size in sizes_bytes],
            hovertemplate="%{y}<br><b>%{fullData.name}: %{customdata[0]}</b><br>%{customdata[1]}<extra></extra>",
        )
    longest_bytes = max(report.peak_allocated_bytes for _, report in rows)
    if verdict is not None:
        _add_card(figure, labels, rows, verdict)
        longest_bytes = max(longest_bytes, verdict.capacity_bytes)
    figure.update_layout(
        barmode="stack",
        bargap=0.38,
        height=_AROUND_PIXELS + _ROW_PIXELS * len(rows),
        margin={"l": 0, "r": 8, "t": 26, "b": 0},
        legend=_LEGEND | {"y": -0.24 if len(rows) > 1 else -0.4},
        yaxis={"autorange": "reversed", "ticks": "", "fixedrange": True, "automargin": True},
        xaxis={
            "title": None, "ticksuffix": " GiB", "range": [0, longest_bytes / GIB * 1.04], "fixedrange": True,
            "nticks": 8, "zeroline": False,
        },
        hoverlabel={"align": "left"},
    )
    return figure


def bars_alt(rows: Sequence[tuple[str, MemoryReport]], verdict: Verdict | None = None) -> str:
    """What the bars say, in a sentence or two."""
    totals = "; ".join(f"{label} {gib(report.peak_allocated_bytes)}" for label, report in rows)
    _, report = rows[-1]
    largest = max(PARTS, key=lambda part: int(getattr(report.parts, part)))
    size = gib(getattr(report.parts, largest))
    card = f" {verdict.gpu} can give {gib(verdict.capacity_bytes)}." if verdict else ""
    return (
        f"Stacked bars of peak allocated memory by part: {totals}. "
        f"The largest part of the last row is {PART_TITLES[largest].lower()} with {size}.{card}"
    )


def waterfall(compared: Comparison, full_title: str, chosen_title: str) -> go.Figure:
    """From full fine-tuning's peak to the chosen method's, a step for each part that differs."""
    steps = [part for part in compared.parts if part.saved_bytes]
    names = [full_title, *(PART_TITLES[part.name] for part in steps), chosen_title]
    changes_bytes = [-part.saved_bytes for part in steps]
    shown = [gib(compared.peak.full_bytes), *(_signed(size) for size in changes_bytes), gib(compared.peak.chosen_bytes)]
    figure = go.Figure(
        go.Waterfall(
            orientation="h",
            y=names,
            x=[compared.peak.full_bytes / GIB, *(size / GIB for size in changes_bytes), None],
            measure=["absolute", *("relative" for _ in steps), "total"],
            text=shown,
            textposition="outside",
            cliponaxis=False,
            hovertemplate="%{y}<br><b>%{text}</b><extra></extra>",
            decreasing={"marker": {"color": _SAVED_COLOUR}},
            increasing={"marker": {"color": _ADDED_COLOUR}},
            totals={"marker": {"color": _TOTAL_COLOUR}},
            connector={"line": {"color": LINE_COLOUR, "width": 1, "dash": "dot"}},
        )
    )
    widest = max(compared.peak.full_bytes, compared.peak.chosen_bytes) / GIB
    figure.update_layout(
        showlegend=False,
        height=60 + 34 * len(names),
        margin={"l": 0, "r": 8, "t": 8, "b": 0},
        yaxis={"autorange": "reversed", "fixedrange": True, "automargin": True, "ticks": ""},
        xaxis={"ticksuffix": " GiB", "range": [0, widest * 1.18], "fixedrange": True, "nticks": 6},
    )
    return figure


def waterfall_alt(compared: Comparison) -> str:
    """What the waterfall says, in a sentence."""
    steps = ", ".join(
        f"{PART_TITLES[part.name].lower()} {_signed(-part.saved_bytes)}" for part in compared.parts if part.saved_bytes
    )
    return (
        f"From {gib(compared.peak.full_bytes)} with full fine-tuning to {gib(compared.peak.chosen_bytes)}: {steps}."
    )


def _add_card(
    figure: go.Figure, labels: Sequence[str], rows: Sequence[tuple[str, MemoryReport]], verdict: Verdict
) -> None:
    """The capacity as a dashed line, and how far up the chosen run may reach on the card."""
    for position, (_, report) in enumerate(rows):
        if report.peak_allocated_bytes == verdict.peak_bytes and position == len(rows) - 1:
            figure.add_scatter(
                x=[report.peak_allocated_bytes / GIB, verdict.upper_bytes / GIB],
                y=[labels[position]] * 2,
                mode="lines+markers",
                name="At most on the card, with reserve and context",
                marker={"symbol": "line-ns", "size": 16, "line": {"width": 2, "color": LINE_COLOUR}},
                line={"color": LINE_COLOUR, "width": 2},
                hovertemplate=f"At most {gib(verdict.upper_bytes)} on the card<extra></extra>",
            )
    at = verdict.capacity_bytes / GIB
    figure.add_vline(x=at, line={"color": LINE_COLOUR, "width": 2, "dash": "dash"})
    figure.add_annotation(
        x=at, y=1, yref="paper", yanchor="bottom", showarrow=False, xanchor="auto",
        text=f"{verdict.gpu}: {gib(verdict.capacity_bytes)}",
    )


def _row_label(label: str, report: MemoryReport) -> str:
    title, _, source = label.rpartition(", ")
    return f"{title or source}<br>{source} <b>{gib(report.peak_allocated_bytes)}</b> "


def _signed(size_bytes: int) -> str:
    sign = "+" if size_bytes >= 0 else "\N{MINUS SIGN}"
    return sign + gib(abs(size_bytes))
