"""Memory over the step: what each phase holds at its highest point, and which of them is the peak."""

from __future__ import annotations

import plotly.graph_objects as go

from planner.advise import Verdict
from planner.dashboard.palette import LINE, PART_COLOURS, TOTAL
from planner.dashboard.tables import html_table
from planner.dashboard.words import phase_title
from planner.report import MemoryReport, Phase
from planner.units import GIB, gib

__all__ = ["steps_alt", "steps_figure", "steps_table"]


def steps_figure(report: MemoryReport, verdict: Verdict | None = None) -> go.Figure:
    """A bar for each phase up to its highest point; the phase of the peak stands out."""
    peak = _peak(report)
    highest_bytes = peak.peak_allocated_bytes
    shows_card = verdict is not None and verdict.capacity_bytes < 3 * highest_bytes
    if verdict is not None and shows_card:
        highest_bytes = max(highest_bytes, verdict.capacity_bytes)
    figure = go.Figure(
        go.Bar(
            x=[_name(phase) for phase in report.phases],
            y=[phase.peak_allocated_bytes / GIB for phase in report.phases],
            marker={"color": [PART_COLOURS["base_weights"] if p is peak else TOTAL for p in report.phases]},
            text=["the peak" if phase is peak else "" for phase in report.phases],
            textposition="outside",
            cliponaxis=False,
            customdata=[[gib(p.peak_allocated_bytes), gib(p.allocated_bytes)] for p in report.phases],
            hovertemplate=(
                "%{x}<br><b>%{customdata[0]}</b> at its highest point<br>%{customdata[1]} at its end"
                "<extra></extra>"
            ),
        ),
        layout={
            "showlegend": False,
            "height": 270,
            "bargap": 0.25,
            "margin": {"l": 0, "r": 0, "t": 8, "b": 0},
            "xaxis": {"fixedrange": True, "ticks": "", "tickangle": -35},
            "yaxis": {
                "title": "GiB",
                "fixedrange": True,
                "range": [0, highest_bytes / GIB * 1.14],
                "nticks": 6,
                "zeroline": False,
            },
        },
    )
    if verdict is not None and shows_card:
        figure.add_hline(y=verdict.capacity_bytes / GIB, line={"color": LINE, "width": 2, "dash": "dash"})
    return figure


def steps_alt(report: MemoryReport) -> str:
    """What the figure says, in a sentence."""
    peak = _peak(report)
    return (
        f"Memory in each phase of the run. The peak of {gib(peak.peak_allocated_bytes)} is in {_name(peak)}."
    )


def steps_table(report: MemoryReport) -> str:
    """HTML: each phase with its highest point and what is left at its end."""
    lines = [[_name(p), gib(p.peak_allocated_bytes), gib(p.allocated_bytes)] for p in report.phases]
    return html_table(["Phase", "Highest point", "At its end"], lines, alt="Memory in each phase of the run")


def _peak(report: MemoryReport) -> Phase:
    """The phase of the report's peak: the last of that name, as later steps hold more."""
    named = [phase for phase in report.phases if phase.name == report.peak_phase]
    return max(named or report.phases, key=lambda phase: phase.peak_allocated_bytes)


def _name(phase: Phase) -> str:
    return phase_title(phase.name) + ("" if phase.step is None else f" {phase.step}")
