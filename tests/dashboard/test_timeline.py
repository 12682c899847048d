"""The simulated timeline as a figure: equal phases, the peak where it is, the predicted lines."""

from __future__ import annotations

import dataclasses

from planner.dashboard.simulations import Simulated
from planner.dashboard.timeline import phases_beside, timeline_alt, timeline_figure
from planner.estimate import estimate
from planner.report import PeakSite
from planner.spec import LoRA, Setup
from planner.units import GIB

SETUP = Setup(model="openai-community/gpt2", method=LoRA(target_modules=("c_attn",)), gpu="t4")
PREDICTED = estimate(SETUP)
TIMELINE = ((0, GIB), (9, 2 * GIB), (10, 2 * GIB), (60, 5 * GIB), (109, 3 * GIB))
BEGINS = (("load", None, 0), ("forward", 2, 10), ("backward", 2, 110))
REPORT = dataclasses.replace(
    PREDICTED,
    source="simulation",
    timeline=TIMELINE,
    peak_site=PeakSite(op="aten.mm.default", module="h.3.mlp"),
)
ONE = Simulated(setup=SETUP, state="done", report=REPORT, begins=BEGINS)


def test_each_phase_is_as_wide_as_the_others() -> None:
    curve = timeline_figure(ONE, PREDICTED).data[0]
    assert list(curve.x) == [0.0, 0.9, 1.0, 1.5, 1.99]
    assert list(curve.y) == [1.0, 2.0, 2.0, 5.0, 3.0]


def test_the_peak_is_marked_where_it_is_and_named() -> None:
    figure = timeline_figure(ONE, PREDICTED)
    marks = [trace for trace in figure.data if trace.name == "Peak"]
    assert [(list(mark.x), list(mark.y)) for mark in marks] == [([1.5], [5.0])]
    assert figure.layout.annotations[0].text.endswith("</b> mm")
    assert "mm in h.3.mlp" in marks[0].hovertemplate
    assert timeline_alt(ONE).endswith("is at mm in h.3.mlp.")
    unnamed = dataclasses.replace(ONE, report=dataclasses.replace(REPORT, peak_site=None))
    assert "backward" in timeline_alt(unnamed) or "forward" in timeline_alt(unnamed)


def test_the_predicted_lines_are_the_phases_of_the_formula() -> None:
    lines = next(
        trace for trace in timeline_figure(ONE, PREDICTED).data if trace.name.startswith("Predicted")
    )
    known = {(p.name, p.step): p.peak_allocated_bytes / GIB for p in PREDICTED.phases}
    drawn = [y for y in lines.y if y is not None]
    assert drawn == [known[name, step] for name, step, _ in BEGINS for _ in range(2)]
    unknown = dataclasses.replace(PREDICTED, not_known=("activations",))
    assert [t.name for t in timeline_figure(ONE, unknown).data] == ["Simulated", "Peak"]


def test_the_table_beside_it_holds_the_same_phases() -> None:
    rows = phases_beside(ONE, PREDICTED)
    assert [row[1] for row in rows] == [
        row[2] for row in rows
    ]  # the stand-in report has the formula's phases
    assert [row[0] for row in rows][-1] == "Optimizer step 2"
