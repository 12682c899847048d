"""Records and their errors as text; plain columns, so that they need no library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from planner.accuracy import ErrorRow, FitRow, Row, SideBySide, share_error
from planner.cli.plain import columns
from planner.record import Prediction, Record
from planner.units import gib

__all__ = ["error_table_text", "fit_table_text", "records_text", "side_by_side_text"]

_QUANTITY = {"peak_allocated_bytes": "allocated", "peak_reserved_bytes": "reserved"}
_ALWAYS = {"model", "method", "gpu", "model_config"}


def side_by_side_text(both: SideBySide) -> str:
    """estimate | simulation | measured, with both errors in bytes and percent."""
    rows = [_row(" + ".join(_words(p) for p in row.parts), row) for row in both.parts]
    rows += [_row("Peak allocated", both.peak), _row("Peak reserved", both.reserved)]
    names = ("Part", "Estimated", "Simulated", "Measured", "Estimate's error", "Simulation's error")
    return columns(names, rows)


def _row(name: str, row: Row) -> tuple[str, ...]:
    label = f"{name} (by subtraction)" if row.by_subtraction else name
    sizes = [_size(value) for value in (row.estimate_bytes, row.simulation_bytes, row.measured_bytes)]
    return (label, *sizes, _error(row, "estimate"), _error(row, "simulation"))


def _size(size_bytes: int | None) -> str:
    return "not known" if size_bytes is None else gib(size_bytes)


def _error(row: Row, source: str) -> str:
    difference, share = row.error_bytes(source), row.error(source)
    if difference is None:
        return ""
    return f"{difference:+,} B" if share is None else f"{difference:+,} B ({_percent(share)})"


def error_table_text(table: Sequence[ErrorRow]) -> str:
    """Runs, median and worst errors of each prediction, by group."""
    rows = [
        (
            row.group if row.group == "all" else f"{row.group} {row.name}",
            row.prediction.replace("_", " "),
            _QUANTITY[row.quantity],
            str(row.runs),
            "" if row.median is None else _percent(row.median).lstrip("+"),
            "" if row.worst_over is None else _percent(row.worst_over),
            "" if row.worst_under is None else _percent(row.worst_under),
            str(row.missing or ""),
        )
        for row in table
    ]
    if not rows:
        return "No measured run to compare with yet."
    names = ("Runs of", "Prediction", "Memory", "Runs", "Median", "Worst over", "Worst under", "Without")
    return columns(names, rows, right=3)


def fit_table_text(table: Sequence[FitRow]) -> str:
    """Predicted against real fit."""
    rows = [
        (row.prediction.replace("_", " "), str(row.right), str(row.fitted_against), str(row.failed_against))
        for row in table
    ]
    return columns(("Does it fit?", "Right", "Ran, though not to fit", "Failed, though to fit"), rows)


def records_text(records: Sequence[Record]) -> str:
    """One line a record, with both errors of the peak."""
    rows = []
    for record in records:
        report = record.report
        peak = "out of memory" if report.out_of_memory else gib(report.peak_allocated_bytes)
        rows.append(
            (
                record.date[:10],
                record.device.name,
                f"{record.setup['model']} {record.setup['method']}",
                _settings(record.setup),
                peak,
                _of(record.simulation, record),
                _of(record.estimate, record),
                record.origin,
            )
        )
    names = ("Date", "Device", "Run", "Settings", "Measured", "Simulated", "Estimated", "From")
    return columns(names, rows, right=4)


def _of(prediction: Prediction, record: Record) -> str:
    if prediction.report is None or record.report.out_of_memory is not None:
        return ""
    error = share_error(prediction.report.peak_allocated_bytes, record.report.peak_allocated_bytes)
    return "" if error is None else _percent(error)


def _settings(setup: Any) -> str:
    """What is not at its default, shortly."""
    from planner.spec import METHODS, Training

    defaults: dict[str, Any] = {}
    for cls in (METHODS[setup["method"]], Training):
        defaults |= {name: item.default for name, item in cls.__dataclass_fields__.items()}
    shown = []
    for name, value in setup.items():
        plain = tuple(value) if isinstance(value, list) else value
        usual = defaults.get(name)
        if name in _ALWAYS or plain == usual or (isinstance(usual, tuple) and (plain,) == usual):
            continue
        shown.append(f"{name}={','.join(value) if isinstance(value, list) else value}")
    return " ".join(shown)


def _percent(share: float) -> str:
    """Three decimals where a simulation needs them: `"+0.004 %"`, `"-1.3 %"`."""
    value = 100 * share
    return f"{value:+.3f} %" if abs(value) < 1 else f"{value:+.1f} %"


def _words(name: str) -> str:
    return name.replace("_", " ").capitalize()
