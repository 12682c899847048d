"""The figures, made from reports and advice. Sizes arrive in bytes and are drawn in GiB."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from planner.advise import Verdict
from planner.compare import Comparison
from planner.dashboard.palette import ADDED, LINE, PART_COLOURS, SAVED, TOTAL
from planner.dashboard.words import PART_HELP, PART_TITLES
from planner.report import PARTS, MemoryReport
from planner.units import GIB, gib

__all__ = ["CONFIG", "bars", "bars_alt", "legend", "waterfall", "waterfall_alt"]

CONFIG = {"displayModeBar": False, "scrollZoom": False, "responsive": True}
_LIST = "display:flex;flex-wrap:wrap;gap:0.15rem 1.1rem;margin:0;padding:0;list-style:none;font-size:0.85rem"
_ENTRY = "display:flex;align-items:center;gap:0.4rem;margin:0"
_SWATCH = "display:inline-block;width:0.8rem;height:0.8rem;border-radius:2px;flex:none;"
_MARK = "display:inline-block;width:1.3rem;height:0;flex:none;"
_HATCH = f"repeating-linear-gradient(135deg,{LINE} 0 2px,transparent 2px 5px)"
_ROW_PIXELS, _AROUND_PIXELS = 58, 62


def bars(rows: Sequence[tuple[str, MemoryReport]], verdict: Verdict | None = None) -> go.Figure:
    """Stacked bars, a row for each report, first on top; the card's capacity as a dashed line.

    Hatched rows were measured. The legend is HTML under the figure (`legend`): plotly's own becomes a
    scroll box on a narrow screen.
    """
    labels = [_row_label(label, report) for label, report in rows]
    hatches = ["/" if report.source == "measurement" else "" for _, report in rows]
    longest_bytes = max(report.peak_allocated_bytes for _, report in rows)
    if verdict is not None:
        longest_bytes = max(longest_bytes, verdict.capacity_bytes)
    figure = go.Figure(layout=_bars_layout(len(rows), longest_bytes))
    for part in PARTS:
        sizes_bytes = [getattr(report.parts, part) for _, report in rows]
        figure.add_bar(
            y=labels,
            x=[size / GIB for size in sizes_bytes],
            orientation="h",
            name=PART_TITLES[part],
            marker={"color": PART_COLOURS[part], "pattern": {"shape": hatches, "solidity": 0.25}},
            customdata=[[gib(size), PART_HELP[part]] for size in sizes_bytes],
            hovertemplate=(
                "%{y}<br><b>%{fullData.name}: %{customdata[0]}</b><br>%{customdata[1]}<extra></extra>"
            ),
        )
    if verdict is not None:
        _add_card(figure, labels, rows, verdict)
    return figure


def _bars_layout(rows: int, longest_bytes: int) -> dict[str, Any]:
    """Given to the figure at once: `update_layout` takes several times as long."""
    return {
        "barmode": "stack",
        "bargap": 0.38,
        "height": _AROUND_PIXELS + _ROW_PIXELS * rows,
        "margin": {"l": 0, "r": 8, "t": 24, "b": 0},
        "showlegend": False,
        "yaxis": {"autorange": "reversed", "ticks": "", "fixedrange": True, "automargin": True},
        "xaxis": {
            "title": None,
            "ticksuffix": " GiB",
            "showticksuffix": "last",
            "range": [0, longest_bytes / GIB * 1.04],
            "fixedrange": True,
            "nticks": 8,
            "zeroline": False,
        },
        "hoverlabel": {"align": "left"},
    }


def legend(rows: Sequence[tuple[str, MemoryReport]], verdict: Verdict | None = None) -> str:
    """The bars' legend as HTML that wraps on any width: the parts that some row has, and the marks."""
    parts = [part for part in PARTS if any(getattr(report.parts, part) for _, report in rows)]
    entries = [
        f'<span style="{_SWATCH}background:{PART_COLOURS[part]}"></span>{PART_TITLES[part]}' for part in parts
    ]
    if verdict is not None:
        entries.append(f'<span style="{_MARK}border-top:3px dashed {LINE}"></span>What the card can give')
        entries.append(
            f'<span style="{_MARK}border-top:2px solid {LINE}"></span>'
            "At most on the card, with reserve and context"
        )
    if any(report.source == "measurement" for _, report in rows):
        entries.append(f'<span style="{_SWATCH}background:{_HATCH}"></span>Measured')
    items = "".join(f'<li style="{_ENTRY}">{entry}</li>' for entry in entries)
    return f'<ul style="{_LIST}">{items}</ul>'


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
    shown = [
        gib(compared.peak.full_bytes),
        *(_signed(size) for size in changes_bytes),
        gib(compared.peak.chosen_bytes),
    ]
    widest = max(compared.peak.full_bytes, compared.peak.chosen_bytes) / GIB
    return go.Figure(
        go.Waterfall(
            orientation="h",
            y=names,
            x=[compared.peak.full_bytes / GIB, *(size / GIB for size in changes_bytes), None],
            measure=["absolute", *("relative" for _ in steps), "total"],
            text=shown,
            textposition="outside",
            cliponaxis=False,
            hovertemplate="%{y}<br><b>%{text}</b><extra></extra>",
            decreasing={"marker": {"color": SAVED}},
            increasing={"marker": {"color": ADDED}},
            totals={"marker": {"color": TOTAL}},
            connector={"line": {"color": LINE, "width": 1, "dash": "dot"}},
        ),
        layout={
            "showlegend": False,
            "height": 60 + 34 * len(names),
            "margin": {"l": 0, "r": 8, "t": 8, "b": 0},
            "yaxis": {"autorange": "reversed", "fixedrange": True, "automargin": True, "ticks": ""},
            "xaxis": {
                "ticksuffix": " GiB",
                "showticksuffix": "last",
                "range": [0, widest * 1.18],
                "fixedrange": True,
                "nticks": 6,
            },
        },
    )


def waterfall_alt(compared: Comparison) -> str:
    """What the waterfall says, in a sentence."""
    steps = ", ".join(
        f"{PART_TITLES[part.name].lower()} {_signed(-part.saved_bytes)}"
        for part in compared.parts
        if part.saved_bytes
    )
    full, chosen = gib(compared.peak.full_bytes), gib(compared.peak.chosen_bytes)
    return f"From {full} with full fine-tuning to {chosen}: {steps}."


def _add_card(
    figure: go.Figure, labels: Sequence[str], rows: Sequence[tuple[str, MemoryReport]], verdict: Verdict
) -> None:
    """The capacity as a dashed line, and how far up the chosen run may reach on the card."""
    judged = [at for at, (_, report) in enumerate(rows) if report.peak_allocated_bytes == verdict.peak_bytes]
    if judged:
        figure.add_scatter(
            x=[verdict.peak_bytes / GIB, verdict.upper_bytes / GIB],
            y=[labels[judged[-1]]] * 2,
            mode="lines+markers",
            marker={"symbol": "line-ns", "size": 16, "line": {"width": 2, "color": LINE}},
            line={"color": LINE, "width": 2},
            hovertemplate=f"At most {gib(verdict.upper_bytes)} on the card<extra></extra>",
        )
    at = verdict.capacity_bytes / GIB
    share = at / figure.layout.xaxis.range[1]
    figure.add_vline(x=at, line={"color": LINE, "width": 2, "dash": "dash"})
    figure.add_annotation(
        x=at,
        y=1,
        yref="paper",
        yanchor="bottom",
        showarrow=False,
        xanchor="right" if share > 0.75 else "left" if share < 0.25 else "center",  # else cut on a phone
        text=f"{verdict.gpu}: {gib(verdict.capacity_bytes)}",
    )


def _row_label(label: str, report: MemoryReport) -> str:
    title, _, source = label.rpartition(", ")
    return f"{title or source}<br>{source} <b>{gib(report.peak_allocated_bytes)}</b> "


def _signed(size_bytes: int) -> str:
    sign = "+" if size_bytes >= 0 else "\N{MINUS SIGN}"
    return sign + gib(abs(size_bytes))
