"""Predicted beside measured: part by part for one run, and as tables of errors and of fits for many."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from planner.errors import PlannerError
from planner.record import Nearest, Record, nearest_record
from planner.report import PARTS, MemoryReport

__all__ = [
    "GROUPS",
    "ErrorRow",
    "FitRow",
    "Nearest",
    "Row",
    "SideBySide",
    "error_table",
    "family",
    "fit_table",
    "nearest_record",
    "share_error",
    "side_by_side",
]

GROUPS = ("all", "method", "family", "recipe")


def share_error(predicted_bytes: int, measured_bytes: int) -> float | None:
    """(predicted - measured) / measured: above 0 predicted too much; None where nothing was measured."""
    return (predicted_bytes - measured_bytes) / measured_bytes if measured_bytes else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the comparison. `parts` has several names where a measurement knows only their sum.

    Bytes, None where not known. `by_subtraction`: the measured figure is a remainder.
    """

    parts: tuple[str, ...]
    estimate_bytes: int | None
    simulation_bytes: int | None
    measured_bytes: int | None
    by_subtraction: bool = False

    def error_bytes(self, source: str) -> int | None:
        """Predicted minus measured, for "estimate" or "simulation"; None where one is missing."""
        predicted = self.estimate_bytes if source == "estimate" else self.simulation_bytes
        if predicted is None or self.measured_bytes is None:
            return None
        return predicted - self.measured_bytes

    def error(self, source: str) -> float | None:
        """The same as a share of what was measured."""
        difference = self.error_bytes(source)
        return difference / self.measured_bytes if difference is not None and self.measured_bytes else None

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "parts": list(self.parts),
            "estimate_bytes": self.estimate_bytes,
            "simulation_bytes": self.simulation_bytes,
            "measured_bytes": self.measured_bytes,
            "by_subtraction": self.by_subtraction,
            **{f"{s}_error_bytes": self.error_bytes(s) for s in ("estimate", "simulation")},
            **{f"{s}_error": self.error(s) for s in ("estimate", "simulation")},
        }


@dataclass(frozen=True, kw_only=True)
class SideBySide:
    """estimate | simulation | measurement: a row for each part, for the peak and for reserved memory."""

    parts: tuple[Row, ...]
    peak: Row
    reserved: Row

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "parts": [row.to_dict() for row in self.parts],
            "peak_allocated": self.peak.to_dict(),
            "peak_reserved": self.reserved.to_dict(),
        }


def side_by_side(
    *,
    estimate: MemoryReport | None = None,
    simulation: MemoryReport | None = None,
    measurement: MemoryReport | None = None,
) -> SideBySide:
    """Up to three reports of one setup. The parts that a measurement knows only as one remainder become one
    row, in which the predictions are summed as well. Raises PlannerError where a report has another source.
    """
    given = {"estimate": estimate, "simulation": simulation, "measurement": measurement}
    for source, report in given.items():
        if report is not None and report.source != source:
            raise PlannerError(f"a {report.source} was given as the {source}; name each by its source.")
    folded = () if measurement is None else _remainder(measurement)
    groups: list[tuple[str, ...]] = [(name,) for name in PARTS if name not in folded]
    if folded:
        groups.append(folded)
    rows = tuple(
        Row(
            parts=names,
            estimate_bytes=_sum(estimate, names),
            simulation_bytes=_sum(simulation, names),
            measured_bytes=None if measurement is None else sum(getattr(measurement.parts, n) for n in names),
            by_subtraction=names == folded,
        )
        for names in groups
    )

    def total(name: str) -> Row:
        return Row(
            parts=(name,),
            estimate_bytes=getattr(estimate, name, None),
            simulation_bytes=getattr(simulation, name, None),
            measured_bytes=getattr(measurement, name, None),
        )

    return SideBySide(parts=rows, peak=total("peak_allocated_bytes"), reserved=total("peak_reserved_bytes"))


def _remainder(measurement: MemoryReport) -> tuple[str, ...]:
    """The parts of which only the sum was measured, in their order."""
    loose = {*measurement.by_subtraction, *measurement.not_known}
    return tuple(name for name in PARTS if name in loose)


def _sum(report: MemoryReport | None, names: Sequence[str]) -> int | None:
    """The sum of some parts; None without a report, or where one of them is not known."""
    if report is None or any(name in report.not_known for name in names):
        return None
    return sum(int(getattr(report.parts, name)) for name in names)


@dataclass(frozen=True, kw_only=True, slots=True)
class ErrorRow:
    """Errors of one prediction over the runs of one group, as shares of what was measured.

    `median` is of absolute errors; `worst_over` is the largest error above 0, `worst_under` the lowest below
    (None where no run errs that way). `runs` had both figures; `missing` had no prediction.
    """

    group: str
    name: str
    prediction: str
    quantity: str
    runs: int
    missing: int
    median: float | None
    worst_over: float | None
    worst_under: float | None
    worst_over_setup: str = ""
    worst_under_setup: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


Predict = Callable[[Record], MemoryReport | None]
STORED: Mapping[str, Predict] = {
    "estimate": lambda record: record.estimate.report,
    "simulation": lambda record: record.simulation.report,
}


def error_table(
    records: Iterable[Record], predictions: Mapping[str, Predict] | None = None
) -> tuple[ErrorRow, ...]:
    """Errors of each prediction, over all runs and by method, family and recipe.

    `predictions` maps a name to a function of a record (default: the ones stored with it). Runs that ended
    out of memory have no peak to compare and are left out.
    """
    runs = [record for record in records if record.report.out_of_memory is None]
    asked = STORED if predictions is None else predictions
    answers = {name: [predict(record) for record in runs] for name, predict in asked.items()}
    rows = []
    for group, name, indices in _groups(runs):
        for prediction, reports in answers.items():
            for quantity in ("peak_allocated_bytes", "peak_reserved_bytes"):
                pairs = [(runs[i], reports[i]) for i in indices]
                row = _error_row(group, name, prediction, quantity, pairs)
                if row.runs or quantity == "peak_allocated_bytes":
                    rows.append(row)
    return tuple(rows)


def _groups(runs: Sequence[Record]) -> list[tuple[str, str, list[int]]]:
    """(group, name, indices of its runs); every run is in one name of each group."""
    found: list[tuple[str, str, list[int]]] = []
    for group in GROUPS:
        by_name: dict[str, list[int]] = {}
        for index, record in enumerate(runs):
            by_name.setdefault(_group_name(group, record), []).append(index)
        found += [(group, name, by_name[name]) for name in sorted(by_name)]
    return found


def _group_name(group: str, record: Record) -> str:
    if group == "method":
        return str(record.setup.get("method"))
    if group == "family":
        return family(record.setup)
    return str(record.setup.get("precision")) if group == "recipe" else "all"


def _error_row(
    group: str, name: str, prediction: str, quantity: str, pairs: Sequence[tuple[Record, MemoryReport | None]]
) -> ErrorRow:
    errors: list[tuple[float, str]] = []
    missing = 0
    for record, report in pairs:
        predicted, measured = getattr(report, quantity, None), getattr(record.report, quantity)
        error = share_error(predicted, measured) if predicted is not None and measured else None
        if error is None or (report is not None and report.not_known and report.source == "estimate"):
            missing += 1
        else:
            errors.append((error, record.key))
    over, under = max(errors, default=(0.0, "")), min(errors, default=(0.0, ""))
    return ErrorRow(
        group=group,
        name=name,
        prediction=prediction,
        quantity=quantity,
        runs=len(errors),
        missing=missing,
        median=statistics.median(abs(e) for e, _ in errors) if errors else None,
        worst_over=over[0] if over[0] > 0 else None,
        worst_under=under[0] if under[0] < 0 else None,
        worst_over_setup=over[1] if over[0] > 0 else "",
        worst_under_setup=under[1] if under[0] < 0 else "",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class FitRow:
    """Whether runs were rightly predicted to fit their device: numbers of runs."""

    prediction: str
    right: int
    fitted_against: int  # ran, though it was predicted not to fit
    failed_against: int  # ran out of memory, though it was predicted to fit

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def fit_table(
    records: Iterable[Record], predictions: Mapping[str, Predict] | None = None
) -> tuple[FitRow, ...]:
    """Predicted against real fit: reserved (or, in an estimate, allocated) memory and the measured context,
    against the device's total less what others held.
    """
    runs = list(records)
    rows = []
    for name, predict in (STORED if predictions is None else predictions).items():
        counts = {(predicted, real): 0 for predicted in (True, False) for real in (True, False)}
        for record in runs:
            report, found = predict(record), record.report.provenance
            if report is None:
                continue
            needed = report.peak_reserved_bytes or report.peak_allocated_bytes
            taken = (found.get("others_bytes") or 0) + (found.get("context_bytes") or 0)
            counts[needed + taken <= record.device.total_bytes, record.report.out_of_memory is None] += 1
        rows.append(
            FitRow(
                prediction=name,
                right=counts[True, True] + counts[False, False],
                fitted_against=counts[False, True],
                failed_against=counts[True, False],
            )
        )
    return tuple(rows)


def family(setup: Mapping[str, Any]) -> str:
    """The family (config.json's model_type) of the model in a setup's JSON values, or "unknown"."""
    config = setup.get("model_config")
    if isinstance(config, Mapping):
        return str(config.get("model_type", "unknown"))
    from planner import catalog

    name = str(setup.get("model"))
    if name not in catalog.models():
        return "unknown"
    return str(catalog.model(name).config.get("model_type", "unknown"))
