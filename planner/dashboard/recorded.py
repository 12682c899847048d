"""Recorded measurements for the pages: packaged ones, this machine's own, and what the visitor uploaded."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from planner.accuracy import Nearest, nearest_record
from planner.dashboard.uploads import Upload, uploaded
from planner.errors import PlannerError
from planner.measure.records import PACKAGED, Shelf, records_dir, shelf
from planner.record import Record, setup_key
from planner.report import MemoryReport
from planner.spec import Setup

__all__ = [
    "BADGES",
    "accept",
    "forget_uploads",
    "measured_here",
    "measured_reports",
    "nearest_run",
    "recorded",
    "remember_live",
    "uploads",
]

_UPLOADS, _LIVE = "_uploaded_records", "_live_records"
# origin of a record -> what its badge says, its icon and its colour
BADGES = {
    "live": ("Live", ":material/bolt:", "green"),
    "packaged": ("Recorded", ":material/inventory_2:", "blue"),
    "own": ("Recorded here", ":material/save:", "blue"),
    "other": ("Recorded", ":material/inventory_2:", "blue"),
    "uploaded": ("Uploaded", ":material/upload_file:", "orange"),
    "published": ("Published by others", ":material/public:", "gray"),
}


def recorded() -> Shelf:
    """Packaged records and this machine's own; read again when a file has changed."""
    return _shelf(_stamp())


def uploads() -> tuple[Record, ...]:
    """The records that this session's visitor has uploaded; nobody else sees them."""
    return tuple(st.session_state.get(_UPLOADS, ()))


def accept(data: bytes) -> Upload:
    """Take the records of an uploaded file into this session, in place of earlier ones."""
    found = uploaded(data)
    if found.records:
        st.session_state[_UPLOADS] = found.records
    return found


def forget_uploads() -> None:
    """Drop what was uploaded."""
    st.session_state.pop(_UPLOADS, None)


def remember_live(record: Record) -> None:
    """A record that this session has just measured."""
    st.session_state[_LIVE] = (*measured_here(), record)[-8:]


def measured_here() -> tuple[Record, ...]:
    """The records measured in this session, the last one last."""
    return tuple(st.session_state.get(_LIVE, ()))


def nearest_run(setup: Setup) -> Nearest | None:
    """The recorded run of this setup, or the nearest one of its model and method; uploads count."""
    return nearest_record(setup, (*recorded().records, *uploads()))


def measured_reports(*setups: Setup) -> tuple[MemoryReport, ...]:
    """What our own records say of exactly these setups; runs that ended out of memory have no peak."""
    try:
        reports = _reports(_stamp())
    except PlannerError:
        return ()  # the pages Measure and Accuracy say what is wrong
    if not reports:
        return ()
    return tuple(reports[key] for setup in setups if (key := setup_key(setup.to_dict())) in reports)


def _stamp() -> tuple[tuple[str, int, int], ...]:
    """Every file of records with its time and size."""
    found = []
    for folder in (PACKAGED, records_dir(), records_dir() / "uploads"):
        found += [_file_stamp(path) for path in sorted(folder.glob("*.jsonl"))]
    return tuple(found)


def _file_stamp(path: Path) -> tuple[str, int, int]:
    try:
        seen = path.stat()
    except OSError:
        return str(path), 0, 0
    return str(path), seen.st_mtime_ns, seen.st_size


@st.cache_resource(max_entries=2, show_spinner=False)
def _shelf(stamp: tuple[tuple[str, int, int], ...]) -> Shelf:
    return shelf()


@st.cache_resource(max_entries=2, show_spinner=False)
def _reports(stamp: tuple[tuple[str, int, int], ...]) -> dict[str, MemoryReport]:
    """The latest report of our own for each setup; the Plan page asks on every run of its script."""
    records = [r for r in _shelf(stamp).records if r.origin != "uploaded" and r.report.out_of_memory is None]
    return {record.key: record.report for record in sorted(records, key=lambda record: record.date)}
