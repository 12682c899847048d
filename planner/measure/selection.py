"""Records chosen by what was asked and on what it ran, and the same as a table for a spreadsheet."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from planner.accuracy import family, share_error
from planner.errors import PlannerError, SetupError, nearest
from planner.record import Record
from planner.report import PARTS

__all__ = ["csv_text", "filtered", "of_set", "write_csv"]

SETS = ("all", "matrix", "unseen")
_OTHER_KEYS = ("device", "family", "set", "from", "date", "torch", "transformers", "peft", "planner")


def of_set(records: Iterable[Record], name: str) -> tuple[Record, ...]:
    """The records of one list of setups; "all" keeps every one. Raises SetupError."""
    if name not in SETS:
        raise SetupError(f"--set must be one of {', '.join(SETS)}, got {name!r}.")
    return tuple(record for record in records if name in ("all", record.set))


def filtered(records: Sequence[Record], conditions: Sequence[str]) -> tuple[Record, ...]:
    """The records for which every "key=value" holds, case ignored.

    Keys are a setup's fields, and device (a part of its name is enough), family, set, from, date (its
    beginning), torch and other versions. Raises SetupError for anything else.
    """
    kept = tuple(records)
    known = {key for record in records for key in record.setup} | set(_OTHER_KEYS)
    for condition in conditions:
        key, equals, value = condition.partition("=")
        if not equals:
            raise SetupError(f"--filter takes key=value, got {condition!r}; such as method=lora.")
        if records and key not in known:
            raise SetupError(f"--filter knows no key {key!r}; {nearest(key, known)}")
        kept = tuple(record for record in kept if _holds(record, key, value.casefold()))
    return kept


def _holds(record: Record, key: str, value: str) -> bool:
    if key == "device":
        return value in record.device.name.casefold()
    if key == "date":
        return record.date.casefold().startswith(value)
    if key == "from":
        return record.origin == value
    if key == "set":
        return record.set.casefold() == value
    if key == "family":
        return family(record.setup).casefold() == value
    if key in record.setup:
        found = record.setup[key]
        return (",".join(found) if isinstance(found, list) else str(found)).casefold() == value
    return record.versions.get(key, "").casefold() == value


def csv_text(records: Sequence[Record]) -> str:
    """One line a record under a line of names; bytes, and errors as shares of what was measured."""
    keys = sorted({key for record in records for key in record.setup} - {"model_config", "gpu"})
    versions = ("torch", "cuda", "transformers", "peft", "accelerate", "planner")
    peaks = ("peak_allocated_bytes", "peak_reserved_bytes")
    predictions = ("estimate", "simulation")
    names = ["date", "set", "from", "device", "driver", *versions, "family", *keys, *peaks, "peak_phase"]
    names += ["out_of_memory", *(f"{part}_bytes" for part in PARTS)]
    names += [f"{p}_{q}{suffix}" for p in predictions for q in peaks for suffix in ("", "_error")]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    for record in records:
        report = record.report
        row: dict[str, object] = {
            "date": record.date,
            "set": record.set,
            "from": record.origin,
            "device": record.device.name,
            "driver": record.device.driver,
            "family": family(record.setup),
            "peak_phase": report.peak_phase,
            "out_of_memory": report.out_of_memory is not None,
            **{name: record.versions.get(name, "") for name in versions},
            **{f"{n}_bytes": "" if n in report.not_known else getattr(report.parts, n) for n in PARTS},
        }
        for key in keys:
            value = record.setup.get(key)
            row[key] = ",".join(value) if isinstance(value, list) else value
        for peak in peaks:
            row[peak] = getattr(report, peak)
        for name in predictions:
            predicted = getattr(record, name).report
            for peak in peaks:
                size = getattr(predicted, peak, None)
                row[f"{name}_{peak}"] = size
                if size is not None and getattr(report, peak) and report.out_of_memory is None:
                    row[f"{name}_{peak}_error"] = share_error(size, getattr(report, peak))
        writer.writerow(row)
    return stream.getvalue()


def write_csv(records: Sequence[Record], path: Path) -> None:
    """Write `csv_text`. Raises PlannerError where the file cannot be written."""
    try:
        path.write_text(csv_text(records), encoding="utf-8")
    except OSError as error:
        raise PlannerError(f"{path} cannot be written ({error.strerror}).") from None
