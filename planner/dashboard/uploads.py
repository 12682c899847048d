"""Records that a visitor uploads: size and shape limited, every line checked, nothing trusted, nothing kept.

Never opens a path, never asks the hub: a record's model is in the catalogue or carries its config.json, and
only families with closed formulas are read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from planner import catalog
from planner.dashboard.lines import public_line
from planner.errors import PlannerError
from planner.record import Record
from planner.report import MemoryReport
from planner.spec import Setup
from planner.units import MIB

__all__ = ["LARGEST_BYTES", "MOST_LINES", "Upload", "uploaded"]

LARGEST_BYTES = MIB  # a record takes some 8 KB
MOST_LINES = 200
_MOST_DEPTH = 12
_MOST_ITEMS = 5000  # a timeline has 2000 points
_LONGEST_TEXT = 2000
_LONGEST_NAME = 100
_LARGEST_NUMBER = 1 << 50  # a pebibyte
_MOST_PROBLEMS = 5


@dataclass(frozen=True, kw_only=True)
class Upload:
    """What a file held: the records, and one line for each of the first lines that are none."""

    records: tuple[Record, ...] = ()
    problems: tuple[str, ...] = ()


def uploaded(data: bytes) -> Upload:
    """The records of a file of JSON lines. Never raises: what is wrong stands in `problems`."""
    if len(data) > LARGEST_BYTES:
        return Upload(
            problems=(f"The file is larger than {LARGEST_BYTES // MIB} MiB; upload fewer records.",)
        )
    lines = [(number, line) for number, line in enumerate(data.split(b"\n"), 1) if line.strip()]
    if not lines:
        return Upload(problems=("The file is empty.",))
    if len(lines) > MOST_LINES:
        return Upload(problems=(f"The file has {len(lines):,} lines; upload at most {MOST_LINES} records.",))
    records: list[Record] = []
    problems: list[str] = []
    for number, line in lines:
        try:
            records.append(_record(line, f"line {number}"))
        except PlannerError as error:
            problems.append(public_line(f"Line {number} is no record: {str(error).rstrip('.')}."))
    more = len(problems) - _MOST_PROBLEMS
    if more > 0:
        problems[_MOST_PROBLEMS:] = [f"And {more} more lines are no records."]
    return Upload(records=tuple(records), problems=tuple(problems))


def _record(line: bytes, place: str) -> Record:
    try:
        parsed = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
    except PlannerError:
        raise
    except (ValueError, RecursionError):
        raise PlannerError("it is not a line of JSON") from None
    _check_shape(parsed, 0)
    try:
        record = Record.from_dict(parsed, origin="uploaded", place=place)
        _check_record(record)
    except PlannerError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise PlannerError(f"a value has the wrong type ({type(error).__name__})") from None
    return record


def _refuse_constant(name: str) -> NoReturn:
    raise PlannerError(f"{name} is not a number of JSON")


def _check_shape(value: Any, depth: int) -> None:
    """Refuse what no record has: deep nesting, long lists and texts, huge numbers."""
    if depth > _MOST_DEPTH:
        raise PlannerError(f"it nests deeper than {_MOST_DEPTH} levels")
    if isinstance(value, str) and len(value) > _LONGEST_TEXT:
        raise PlannerError(f"it holds a text of more than {_LONGEST_TEXT} characters")
    if isinstance(value, int | float) and not abs(value) < _LARGEST_NUMBER:
        raise PlannerError("it holds a number beyond a pebibyte")
    if isinstance(value, dict | list):
        if len(value) > _MOST_ITEMS:
            raise PlannerError(f"it holds more than {_MOST_ITEMS} values in one place")
        for child in value.values() if isinstance(value, dict) else value:
            _check_shape(child, depth + 1)


def _check_record(record: Record) -> None:
    _check_setup(record.setup)
    for report in (record.report, record.estimate.report, record.simulation.report):
        if report is not None:
            _check_report(report)
    _size("device.total_bytes", record.device.total_bytes)
    for value in (
        record.device.name,
        record.device.driver,
        record.date,
        record.set,
        *record.versions.values(),
    ):
        _text(value)


def _check_setup(flat: Mapping[str, Any]) -> None:
    """A setup that can be planned here. Raises PlannerError, before any path or network could be touched."""
    name, config = flat.get("model"), flat.get("model_config")
    _text(name)
    if config is None and name not in catalog.models():
        raise PlannerError("its model is not in the catalogue, and it carries no model_config")
    if config is not None:
        try:
            catalog.model_from_config(config, id=str(name), source="an uploaded record")
        except catalog.UnknownFamily:
            raise PlannerError("its model's architecture has no closed formula here") from None
    Setup.from_dict(flat)


def _check_report(report: MemoryReport) -> None:
    for name, size in report.parts.to_dict().items():
        _size(name, size)
    for name in ("total", "trainable", "added"):
        _size(name, getattr(report.parameters, name))
    if report.parameters.total < 1:
        raise PlannerError("its model has no parameters")
    _text(report.peak_phase)
    _size("peak_reserved_bytes", report.peak_reserved_bytes or 0)
    for phase in report.phases:
        _text(phase.name)
        _size("step", phase.step or 0)
        for size in (phase.allocated_bytes, phase.peak_allocated_bytes, phase.peak_reserved_bytes or 0):
            _size(phase.name, size)
    if report.out_of_memory is not None:
        _text(report.out_of_memory.phase)
        _size("requested_bytes", report.out_of_memory.requested_bytes)
        _size("free_bytes", report.out_of_memory.free_bytes)
    for text in (*report.notes, *report.not_known, *report.by_subtraction):
        if not isinstance(text, str):
            raise PlannerError("a note of it is not a text")


def _size(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise PlannerError(f"{name[:_LONGEST_NAME]} is not a whole number of at least 0")


def _text(value: Any) -> None:
    if not isinstance(value, str) or len(value) > _LONGEST_NAME:
        raise PlannerError(f"a name in it is not a text of at most {_LONGEST_NAME} characters")
