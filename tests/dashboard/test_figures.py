"""The figures and their twins say what the reports say, and only measurements are hatched."""

from __future__ import annotations

import csv
import dataclasses
import io
import json

import pytest
from hypothesis import given, strategies as st

from planner.advise import grid, verdict
from planner.compare import comparison, full_of
from planner.dashboard import figures, grid as squares, steps, tables
from planner.dashboard.answers import answer
from planner.dashboard.words import PART_TITLES
from planner.estimate import estimate
from planner.report import PARTS, MemoryReport
from planner.spec import LoRA, Setup, Training
from planner.units import GIB, gib

SETUP = Setup(model="openai-community/gpt2", method=LoRA(), training=Training(micro_batch_size=2), gpu="t4")


@pytest.fixture(scope="module")
def rows() -> tuple[tuple[str, MemoryReport], ...]:
    """Full and LoRA, predicted, and a report that claims to be measured."""
    measured = dataclasses.replace(estimate(SETUP), source="measurement")
    return answer(SETUP, [measured]).rows


def test_the_rows_are_full_then_chosen_then_what_else_there_is(rows) -> None:
    assert [label for label, _ in rows] == [
        "Full fine-tuning, predicted",
        "LoRA, predicted",
        "LoRA, measured",
    ]
    assert [label for label, _ in answer(full_of(SETUP)).rows] == ["Full fine-tuning, predicted"]


def test_the_error_is_the_prediction_against_the_measurement() -> None:
    predicted = estimate(SETUP)
    parts = dataclasses.replace(
        predicted.parts, workspace=predicted.parts.workspace + predicted.peak_allocated_bytes
    )
    measured = dataclasses.replace(predicted, source="measurement", parts=parts)  # twice the prediction
    assert answer(SETUP, [measured]).prediction_error == -0.5
    assert answer(SETUP, [dataclasses.replace(predicted, source="simulation")]).prediction_error is None


def test_bars_stack_the_parts_to_the_peak(rows) -> None:
    figure = figures.bars(rows, verdict(rows[1][1], SETUP.gpu))
    stacks = [trace for trace in figure.data if trace.type == "bar"]
    assert [trace.name for trace in stacks] == [PART_TITLES[part] for part in PARTS]
    for position, (_, report) in enumerate(rows):
        assert sum(trace.x[position] for trace in stacks) * GIB == pytest.approx(report.peak_allocated_bytes)
        assert gib(report.peak_allocated_bytes) in stacks[0].y[position]
    assert stacks[0].marker.pattern.shape == ("", "", "/")
    capacity = verdict(rows[1][1], SETUP.gpu).capacity_bytes
    line = figure.layout.shapes[0]
    assert (line.x0 * GIB, line.line.dash) == (pytest.approx(capacity), "dash")
    assert gib(capacity) in figures.bars_alt(rows, verdict(rows[1][1], SETUP.gpu))


def test_the_legend_names_the_parts_that_are_there(rows) -> None:
    text = figures.legend(rows[:2])
    assert "Base weights" in text
    assert "Measured" not in text
    assert "Measured" in figures.legend(rows)


def test_the_waterfall_ends_at_the_chosen_peak(rows) -> None:
    compared = comparison(rows[0][1], rows[1][1])
    steps = figures.waterfall(compared, "Full", "LoRA").data[0]
    assert steps.measure[0] == "absolute"
    assert steps.measure[-1] == "total"
    assert sum(steps.x[:-1]) * GIB == pytest.approx(compared.peak.chosen_bytes)


def test_the_phase_of_the_peak_stands_out_once(rows) -> None:
    report = rows[1][1]
    bars = steps.steps_figure(report, verdict(report, SETUP.gpu)).data[0]
    assert list(bars.text).count("the peak") == 1
    assert max(bars.y) == bars.y[list(bars.text).index("the peak")]
    assert len(set(bars.x)) == len(report.phases)
    assert gib(report.peak_allocated_bytes) in steps.steps_alt(report)
    assert gib(report.peak_allocated_bytes) in steps.steps_table(report)


def test_tables_and_files_hold_the_same_numbers(rows) -> None:
    lines = list(csv.reader(io.StringIO(tables.parts_csv(rows))))
    assert lines[0] == ["part_bytes", *(label for label, _ in rows)]
    for line in lines[1:-1]:
        assert [int(cell) for cell in line[1:]] == [getattr(report.parts, line[0]) for _, report in rows]
    assert [int(cell) for cell in lines[-1][1:]] == [report.peak_allocated_bytes for _, report in rows]
    reports = {
        label: MemoryReport.from_dict(one) for label, one in json.loads(tables.reports_json(rows)).items()
    }
    assert reports == {label: MemoryReport.from_dict(report.to_dict()) for label, report in rows}
    shown = tables.parts_table(rows[:2], comparison(rows[0][1], rows[1][1]))
    for _, report in rows[:2]:
        assert gib(report.peak_allocated_bytes) in shown


def test_unknown_parts_are_not_shown_as_zero() -> None:
    bare = answer(Setup(model="params:7e9"))
    assert "not known" in tables.parts_table(bare.rows)
    assert "activations,\n" in tables.parts_csv(bare.rows)


def test_the_grid_has_a_square_for_every_cell_and_a_click_finds_it() -> None:
    cells = grid(SETUP, (1, 64), (128, 1024, 4096))  # gpt2 has 1,024 positions
    figure = squares.grid_figure(cells, (1, 128))
    data = [point for trace in figure.data if trace.customdata is not None for point in trace.customdata]
    assert {(point[0], point[1]) for point in data} == {(1, 128), (1, 1024), (64, 128), (64, 1024)}
    assert squares.clicked([{"customdata": list(data[0])}]) == {
        "micro_batch_size": data[0][0],
        "seq_len": data[0][1],
    }
    assert squares.clicked([]) is None
    assert squares.clicked([{}]) is None
    signs = {trace.name.split()[0] for trace in figure.data if trace.mode == "markers+text"}
    assert signs <= {"✓", "≈", "✕"}
    assert "beyond the model" in tables.grid_table(cells)
    assert "of 4 combinations fit" in squares.grid_alt(cells)


@given(st.sampled_from(["micro_batch_size", "seq_len"]), st.integers(1, 10**6), st.integers(1, 10**6))
def test_the_axis_has_the_current_value_and_nothing_beyond_the_model(
    name: str, current: int, limit: int
) -> None:
    limit = max(current, limit)
    values = squares.axis(name, current, limit)
    assert current in values
    assert list(values) == sorted(set(values))
    assert values[-1] <= limit
    assert len(values) <= 8


def test_text_from_outside_cannot_become_markup() -> None:
    compared = tables.parts_table([("<script>", answer(SETUP).chosen)])
    assert "<script>" not in compared


@pytest.mark.parametrize(("gpu", "anchor"), [("t4", "left"), ("h200", "right")])
def test_the_name_of_the_card_stays_inside_the_picture(gpu: str, anchor: str) -> None:
    planned = Setup(model="meta-llama/Llama-3.1-8B" if gpu == "t4" else "gpt2", gpu=gpu)
    report = estimate(planned)
    figure = figures.bars([("Full fine-tuning, predicted", report)], verdict(report, planned.gpu))
    assert figure.layout.annotations[0].xanchor == anchor
