"""Peaks of a sweep over one of its columns."""

from __future__ import annotations

from typing import Any

import pandas as pd
import plotly.graph_objects as go

from planner.dashboard.palette import WORD_COLOURS
from planner.units import GIB, gib

__all__ = ["MOST_POINTS", "sweep_alt", "sweep_figure"]

MOST_POINTS = 2000
_SYMBOLS = {"fits": "circle", "tight": "diamond", "does not fit": "x", "not known": "square-open"}
_NO_WORD = "no answer"
_LONGEST_TICK = 24
_MOST_TICKS = 8


def sweep_figure(rows: pd.DataFrame, across: str, title: str, verdict: str) -> go.Figure:
    """Peak allocated memory in GiB over the column `across`, a mark for each setup, by verdict.

    `verdict` names the column with the words; colour and symbol both say them. At most 2,000 setups.
    """
    drawn = rows.iloc[:: max(1, -(-len(rows) // MOST_POINTS))]
    figure = go.Figure()
    for word in (*_SYMBOLS, _NO_WORD):
        some = drawn[drawn[verdict] == word]
        if some.empty:
            continue
        figure.add_scatter(
            x=_values(some, across),
            y=(some["peak_allocated_bytes"] / GIB).tolist(),
            mode="markers",
            name=word,
            marker={
                "color": WORD_COLOURS.get(word, WORD_COLOURS["not known"]),
                "symbol": _SYMBOLS.get(word, "square-open"),
                "size": 8,
                "line": {"width": 0.5, "color": "#16202b"},
            },
            customdata=[
                [index + 1, _safe(row["model"]), _safe(row["method"]), gib(int(row["peak_allocated_bytes"]))]
                for index, row in some.iterrows()
            ],
            hovertemplate=(
                "<b>row %{customdata[0]}: %{customdata[1]}</b><br>%{customdata[2]}, %{customdata[3]}"
                "<extra></extra>"
            ),
        )
    number = _is_number(rows[across])
    many = number and rows[across].min() > 0 and rows[across].max() / rows[across].min() >= 16
    kind = "log" if many else "linear" if number else "category"
    figure.update_layout(
        height=360,
        margin={"l": 0, "r": 8, "t": 8, "b": 0},
        showlegend=True,
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.0, "x": 0},
        hovermode="closest",
        xaxis={"title": _safe(title), "fixedrange": True, "type": kind},
        yaxis={"title": "Peak allocated, GiB", "fixedrange": True, "rangemode": "tozero"},
    )
    if number and rows[across].nunique() <= _MOST_TICKS:
        ticks = sorted(set(_values(rows.dropna(subset=[across]), across)))
        figure.update_xaxes(tickvals=ticks, ticktext=[f"{tick:,g}" for tick in ticks])
    return figure


def sweep_alt(rows: pd.DataFrame, title: str, verdict: str) -> str:
    """The figure in a sentence."""
    peaks = rows["peak_allocated_bytes"]
    counts = ", ".join(f"{number:,} {word}" for word, number in rows[verdict].value_counts().items())
    return (
        f"Peak allocated memory of {len(rows):,} setups against {title}: from {gib(int(peaks.min()))} to "
        f"{gib(int(peaks.max()))}; {counts}."
    )


def _values(rows: pd.DataFrame, across: str) -> list[Any]:
    if across.endswith("_bytes"):
        return [value / GIB for value in rows[across]]
    if _is_number(rows[across]):
        return list(rows[across])
    return ["none" if value is None else _safe(value)[-_LONGEST_TICK:] for value in rows[across]]


def _is_number(values: pd.Series[Any]) -> bool:
    return bool(pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values))


def _safe(value: Any) -> str:
    """Plotly reads some HTML in labels."""
    return str(value).replace("<", "&lt;")
