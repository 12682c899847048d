"""Predicted against measured, and the errors by size: figures of the Accuracy page."""

from __future__ import annotations

import math
from collections.abc import Sequence

import plotly.graph_objects as go

from planner.dashboard.palette import LINE, PART_COLOURS
from planner.dashboard.runs import PREDICTIONS, Run, signed_percent
from planner.units import GIB, gib

__all__ = ["BAND", "against_figure", "errors_figure", "figure_alt"]

BAND = 0.05  # the worst case that the estimate promises
_STYLES = {
    "estimate_now": (PART_COLOURS["base_weights"], "circle"),
    "estimate": (PART_COLOURS["temporaries"], "x-thin-open"),
    "simulation": (PART_COLOURS["activations"], "diamond-open"),
}
_FILL = "rgba(125,136,150,0.18)"
_LINE = {"color": LINE, "width": 1, "dash": "dot"}


def against_figure(runs: Sequence[Run]) -> go.Figure:
    """Predicted over measured peaks, both axes logarithmic, with the line of no error and the band."""
    figure = go.Figure()
    sizes = [run.measured_bytes / GIB for run in runs if not run.full_device] or [1.0]
    ends = [min(sizes) / 1.3, max(sizes) * 1.3]
    figure.add_scatter(
        x=[*ends, *reversed(ends)],
        y=[*(end * (1 + BAND) for end in ends), *(end * (1 - BAND) for end in reversed(ends))],
        mode="lines",
        fill="toself",
        fillcolor=_FILL,
        line={"width": 0},
        hoverinfo="skip",
        name=f"within {BAND:.0%}".replace("%", " %"),
    )
    figure.add_scatter(x=ends, y=ends, mode="lines", line=_LINE, hoverinfo="skip", showlegend=False)
    for prediction in PREDICTIONS:
        _add(figure, runs, prediction, lambda run, name: run.predicted_bytes[name] / GIB)
    axis = {
        "type": "log", "fixedrange": True, "zeroline": False, "range": [math.log10(end) for end in ends],
        "tickvals": _ticks(ends), "ticktext": [f"{tick:g}" for tick in _ticks(ends)],
    }  # fmt: skip
    _lay_out(figure)
    figure.update_layout(
        xaxis={**axis, "title": "Measured peak, GiB"},
        yaxis={**axis, "title": "Predicted peak, GiB"},
    )
    return figure


def errors_figure(runs: Sequence[Run]) -> go.Figure:
    """The error of each prediction in percent over the measured peak, with the band."""
    figure = go.Figure()
    figure.add_hrect(y0=-100 * BAND, y1=100 * BAND, fillcolor=_FILL, line_width=0, layer="below")
    figure.add_hline(y=0, line=_LINE)
    errors = [0.0]
    for prediction in PREDICTIONS:
        errors += [error for run in runs if (error := run.error(prediction)) is not None]
        _add(figure, runs, prediction, lambda run, name: 100 * (run.error(name) or 0.0))
    sizes = [run.measured_bytes / GIB for run in runs if not run.full_device] or [1.0]
    ticks = _ticks([min(sizes) / 1.3, max(sizes) * 1.3])
    highest = 100 * max(1.25 * BAND, 1.1 * max(map(abs, errors)))
    _lay_out(figure)
    figure.update_layout(
        xaxis={
            "type": "log", "title": "Measured peak, GiB", "fixedrange": True, "tickvals": ticks,
            "ticktext": [f"{tick:g}" for tick in ticks],
        },
        yaxis={
            "title": "Error", "ticksuffix": " %", "fixedrange": True, "range": [-highest, highest],
            "zeroline": False,
        },
    )  # fmt: skip
    return figure


def figure_alt(runs: Sequence[Run]) -> str:
    """What both figures say, in a sentence."""
    inside = [run for run in runs if (e := run.error("estimate_now")) is not None and abs(e) <= BAND]
    return (
        f"Predicted against measured peaks of {len(runs)} runs; the formula is within {BAND * 100:.0f} % of "
        f"{len(inside)} of them."
    )


def _add(figure: go.Figure, runs: Sequence[Run], prediction: str, y: object) -> None:
    found = [run for run in runs if run.error(prediction) is not None]
    if not found:
        return
    assert callable(y)
    colour, symbol = _STYLES[prediction]
    figure.add_scatter(
        x=[run.measured_bytes / GIB for run in found],
        y=[y(run, prediction) for run in found],
        mode="markers",
        name=PREDICTIONS[prediction],
        marker={"color": colour, "symbol": symbol, "size": 9, "line": {"width": 1.5, "color": colour}},
        customdata=[
            [
                run.title.replace("<", "&lt;"),
                gib(run.measured_bytes),
                gib(run.predicted_bytes[prediction]),
                signed_percent(run.error(prediction) or 0.0),
            ]
            for run in found
        ],
        hovertemplate=(
            "<b>%{customdata[0]}</b><br>measured %{customdata[1]}<br>predicted %{customdata[2]}, "
            "%{customdata[3]}<extra></extra>"
        ),
    )


def _ticks(ends: Sequence[float]) -> list[float]:
    """1, 2, 5, 10 ... GiB between the ends."""
    steps = [digit * 10.0**power for power in range(-3, 5) for digit in (1, 2, 5)]
    return [step for step in steps if ends[0] <= step <= ends[1]]


def _lay_out(figure: go.Figure) -> None:
    figure.update_layout(
        height=340,
        margin={"l": 0, "r": 8, "t": 8, "b": 0},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.0, "x": 0},
        hoverlabel={"align": "left"},
        hovermode="closest",
    )
