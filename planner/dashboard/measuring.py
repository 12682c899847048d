"""What a measurement looks like on the page: its stages, its end, and its figures beside both predictions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from html import escape

import streamlit as st

from planner.accuracy import Row, side_by_side
from planner.dashboard import recorded
from planner.dashboard.measurements import Measured, Stage
from planner.dashboard.runs import signed_percent
from planner.dashboard.tables import html_table, part_title
from planner.dashboard.uploads import Upload
from planner.dashboard.words import PHASE_TITLES, phase_title, plain
from planner.record import Record
from planner.report import MemoryReport
from planner.units import gib

__all__ = ["about", "beside", "ended", "result", "stages", "uploaded"]

_ENDS = {"peak_allocated_bytes": "Peak allocated", "peak_reserved_bytes": "Peak reserved"}


def stages(last: Measured) -> None:
    """The phases so far, the one that runs last."""
    seconds = time.monotonic() - last.began_s
    where = f" on {plain(last.device)}" if last.device else ""
    now = _stage(last.stages[-1]) if last.stages else "Starting torch"
    st.progress(min(1.0, len(last.stages) / 9), text=f"{now}{where}, {seconds:.0f} s")
    if last.stages:
        lines = [
            [
                escape(_stage(stage)),
                "running" if stage.peak_allocated_bytes is None else gib(stage.peak_allocated_bytes),
            ]
            for stage in last.stages
        ]
        st.html(html_table(["Phase", "Highest point"], lines, alt="Phases measured so far"))


def ended(last: Measured, predicted: MemoryReport) -> None:
    """How this session's last measurement of the shown setup ended; a record's figures stand elsewhere."""
    if last.state == "cancelled":
        st.info("The measurement was cancelled; nothing was recorded.", icon=":material/cancel:")
    elif last.state == "failed":
        st.error(f"Not measured: {plain(last.reason)}", icon=":material/error:")
    elif last.record is not None:
        report = last.record.report
        if report.out_of_memory is None:
            error = predicted.peak_allocated_bytes / report.peak_allocated_bytes - 1
            st.success(
                f"Measured {gib(report.peak_allocated_bytes)}, the formula errs by {signed_percent(error)}. "
                "The figures are below.",
                icon=":material/check_circle:",
            )
        if last.note:
            st.warning(f"Not kept: {plain(last.note)}", icon=":material/save:")


def about(record: Record, *, live: bool) -> None:
    """The badge, and on what it was measured: machine, driver, versions, date."""
    label, icon, colour = recorded.BADGES["live" if live else record.origin]
    device, versions = record.device, record.versions
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        st.badge(label, icon=icon, color=colour)  # type: ignore[arg-type]
        st.caption(
            plain(
                f"{device.name}, {gib(device.total_bytes)}, driver {device.driver}; "
                f"torch {versions['torch']}, transformers {versions['transformers']}, "
                f"peft {versions['peft']}; {record.date[:10]}"
            ),
            width="stretch",
        )


def result(record: Record, predicted: MemoryReport | None, simulated: MemoryReport | None) -> None:
    """predicted | simulated | measured | difference, or where the memory ran out."""
    failure = record.report.out_of_memory
    if failure is not None:
        phase = PHASE_TITLES.get(failure.phase, failure.phase.replace("_", " "))
        asked = f": {gib(failure.requested_bytes)} asked for" if failure.requested_bytes else ""
        expected = "" if predicted is None else f" The formula expects {gib(predicted.peak_allocated_bytes)}."
        st.warning(
            plain(
                f"Out of memory in {phase}{asked}, {gib(failure.free_bytes)} free, on "
                f"{gib(record.device.total_bytes)}. That is a result: it does not fit.{expected}"
            ),
            icon=":material/memory_alt:",
        )
        beside(predicted, simulated, None)
        return
    beside(predicted, simulated, record.report)
    for note in record.report.notes:
        st.caption(plain(note))


def beside(
    predicted: MemoryReport | None, simulated: MemoryReport | None, measured: MemoryReport | None
) -> None:
    """The table: a row for each part, the peaks last."""
    both = side_by_side(estimate=predicted, simulation=simulated, measurement=measured)
    lines = [_line(row) for row in (*both.parts, both.reserved, both.peak)]
    head = ["Part", "Predicted", "Simulated", "Measured", "Formula's difference", "Simulation's difference"]
    if measured is None:  # nothing to differ from
        head, lines = head[:4], [line[:4] for line in lines]
        lines[-1][3] = "not measured"
    st.html(
        html_table(head, lines, alt="Predicted, simulated and measured, part by part", last_is_total=True)
    )


def uploaded(found: Upload) -> None:
    """What an uploaded file held."""
    count = len(found.records)
    if count:
        st.success(
            f"{count} {'record' if count == 1 else 'records'} read. What was measured of the shown setup "
            "stands above, all of them on the page Accuracy.",
            icon=":material/check_circle:",
        )
    for problem in found.problems:
        st.warning(plain(problem), icon=":material/report:")


def _line(row: Row) -> list[str]:
    title = _ENDS.get(row.parts[0]) or _joined([part_title(name) for name in row.parts])
    if row.by_subtraction:
        title += " <small>(by subtraction)</small>"
    return [
        title,
        _size(row.estimate_bytes),
        _size(row.simulation_bytes),
        _size(row.measured_bytes),
        _difference(row, "estimate"),
        _difference(row, "simulation"),
    ]


def _joined(titles: Sequence[str]) -> str:
    return ", ".join([titles[0], *(title.lower() for title in titles[1:])])


def _size(size_bytes: int | None) -> str:
    return "\N{EN DASH}" if size_bytes is None else gib(size_bytes) if size_bytes else "0"


def _difference(row: Row, source: str) -> str:
    size, share = row.error_bytes(source), row.error(source)
    if size is None:
        return ""
    if not size:
        return "equal"
    sign = "+" if size > 0 else "\N{MINUS SIGN}"
    percent = "" if share is None else f" ({signed_percent(share)})"
    return f"{sign}{abs(size) / (1 << 20):,.1f} MiB{percent}"


def _stage(stage: Stage) -> str:
    return phase_title(stage.name) + ("" if stage.step is None else f" {stage.step}")
