"""Memory over the step as simulated: every allocation, the predicted phases over it, the peak named."""

from __future__ import annotations

import plotly.graph_objects as go

from planner.advise import Verdict
from planner.dashboard.palette import LINE, PART_COLOURS
from planner.dashboard.simulations import Simulated
from planner.dashboard.words import phase_title
from planner.report import MemoryReport
from planner.units import GIB, gib

__all__ = ["phases_beside", "timeline_alt", "timeline_figure"]

_SIMULATED, _PREDICTED = PART_COLOURS["base_weights"], PART_COLOURS["temporaries"]
_LONGEST_OP = 30


def timeline_figure(one: Simulated, predicted: MemoryReport, verdict: Verdict | None = None) -> go.Figure:
    """Allocated memory over the events, each phase of the run as wide as the others; GiB.

    The predicted highest point of each phase is a line over it. Needs a simulation that is done.
    """
    report = one.report
    assert report is not None
    xs, ys = _curve(one)
    figure = go.Figure()
    figure.add_scatter(
        x=xs,
        y=[size / GIB for size in ys],
        mode="lines",
        name="Simulated",
        line={"color": _SIMULATED, "width": 1.5},
        fill="tozeroy",
        hovertemplate="<b>%{y:.2f} GiB</b> simulated<extra></extra>",
    )
    _add_predicted(figure, one, predicted)
    peak_at = max(range(len(ys)), key=ys.__getitem__)
    figure.add_scatter(
        x=[xs[peak_at]],
        y=[ys[peak_at] / GIB],
        mode="markers",
        name="Peak",
        marker={"size": 10, "color": PART_COLOURS["workspace"], "line": {"width": 1, "color": LINE}},
        hovertemplate=f"<b>{gib(report.peak_allocated_bytes)}</b><br>{_site(report)}<extra></extra>",
        showlegend=False,
    )
    late = xs[peak_at] > len(one.begins) / 2
    figure.add_annotation(
        x=xs[peak_at],
        y=ys[peak_at] / GIB,
        text=f"<b>{gib(report.peak_allocated_bytes)}</b> {_op(report)}",
        showarrow=False,
        xanchor="right" if late else "left",
        yanchor="bottom",
        yshift=7,
    )
    highest_bytes = max(ys[peak_at], *(p.peak_allocated_bytes for p in predicted.phases), 1)
    if verdict is not None and verdict.capacity_bytes < 3 * highest_bytes:
        figure.add_hline(y=verdict.capacity_bytes / GIB, line={"color": LINE, "width": 2, "dash": "dash"})
        highest_bytes = max(highest_bytes, verdict.capacity_bytes)
    figure.update_layout(
        height=290,
        margin={"l": 0, "r": 0, "t": 8, "b": 0},
        hovermode="closest",
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.0, "x": 0},
        xaxis={
            "fixedrange": True,
            "range": [0, len(one.begins)],
            "tickvals": [at + 0.5 for at in range(len(one.begins))],
            "ticktext": [_name(name, step) for name, step, _ in one.begins],
            "tickangle": -35,
            "ticks": "",
            "showgrid": False,
            "zeroline": False,
        },
        yaxis={
            "title": "GiB",
            "fixedrange": True,
            "range": [0, highest_bytes / GIB * 1.16],
            "nticks": 6,
            "zeroline": False,
        },
    )
    return figure


def timeline_alt(one: Simulated) -> str:
    """What the figure says, in a sentence."""
    assert one.report is not None
    peak = gib(one.report.peak_allocated_bytes)
    return f"Simulated memory over the step. The peak of {peak} is at {_site(one.report)}."


def _curve(one: Simulated) -> tuple[list[float], list[int]]:
    """The timeline with each phase stretched to a width of 1."""
    assert one.report is not None
    points = one.report.timeline
    starts = [at for _, _, at in one.begins]
    ends = [*starts[1:], points[-1][0] + 1 if points else 1]
    xs: list[float] = []
    ys: list[int] = []
    phase = 0
    for at, size in points:
        while phase + 1 < len(starts) and at >= starts[phase + 1]:
            phase += 1
        width = max(1, ends[phase] - starts[phase])
        xs.append(round(phase + (at - starts[phase]) / width, 4))
        ys.append(size)
    return xs, ys


def _add_predicted(figure: go.Figure, one: Simulated, predicted: MemoryReport) -> None:
    """A short line at the predicted highest point of each phase that both know."""
    known = {(phase.name, phase.step): phase.peak_allocated_bytes for phase in predicted.phases}
    xs: list[float | None] = []
    ys: list[float | None] = []
    texts: list[str] = []
    for number, (name, step, _) in enumerate(one.begins):
        size = known.get((name, step))
        if size is None or predicted.not_known:
            continue
        xs += [number + 0.06, number + 0.94, None]
        ys += [size / GIB, size / GIB, None]
        texts += [gib(size)] * 3
    if xs:
        figure.add_scatter(
            x=xs,
            y=ys,
            mode="lines",
            name="Predicted highest point of each phase",
            line={"color": _PREDICTED, "width": 2.5},
            customdata=texts,
            hovertemplate="<b>%{customdata}</b> predicted<extra></extra>",
        )


def _site(report: MemoryReport) -> str:
    """Operation and module at the peak."""
    site = report.peak_site
    return f"{_op(report)} in {site.module}" if site is not None and site.module else _op(report)


def _op(report: MemoryReport) -> str:
    """The operation at the peak, short enough to stand in the figure; the phase where it is not known."""
    site = report.peak_site
    if site is None or not site.op:
        return phase_title(report.peak_phase).lower()
    op = site.op.removeprefix("aten.").removesuffix(".default")
    return op if len(op) <= _LONGEST_OP else f"{op[: _LONGEST_OP - 3]}..."


def _name(name: str, step: int | None) -> str:
    return phase_title(name) + ("" if step is None else f" {step}")


def phases_beside(one: Simulated, predicted: MemoryReport) -> list[tuple[str, int | None, int]]:
    """(phase, predicted, simulated) highest points in bytes; None where the formula does not know it."""
    assert one.report is not None
    known = {(p.name, p.step): p.peak_allocated_bytes for p in predicted.phases}
    return [
        (
            _name(phase.name, phase.step),
            None if predicted.not_known else known.get((phase.name, phase.step)),
            phase.peak_allocated_bytes,
        )
        for phase in one.report.phases
    ]
