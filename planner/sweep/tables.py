"""The tables of a sweep, results.csv and results.parquet: a row for each setup, whole or not at all."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from planner.errors import PlannerError

__all__ = ["table", "write_tables"]

_LEFT_OUT = {"model_config"}  # a whole config.json: the journal has it
_FIRST = ("verb", "state", "error")
_LAST = ("seconds", "date", "place", "key")

Columns = dict[str, list[Any]]


def write_tables(rows: Sequence[Mapping[str, Any]], folder: Path) -> tuple[list[Path], str]:
    """Write the rows as CSV and, where pyarrow is installed, as Parquet; measured ones as records, too.

    The files, and in a line what could not be written, or "". Raises PlannerError where the disk refuses.
    """
    columns = table(rows)
    written, reason = [], ""
    try:
        written.append(_whole(folder / "results.csv", lambda path: _write_csv(columns, path)))
        try:
            written.append(_whole(folder / "results.parquet", lambda path: _write_parquet(columns, path)))
        except ModuleNotFoundError:
            reason = "No Parquet: pyarrow is not installed; run pip install pyarrow."
        records = [row["record"] for row in rows if "record" in row]
        if records:
            written.append(_whole(folder / "records.jsonl", lambda path: _write_lines(records, path)))
    except OSError as error:
        raise PlannerError(f"{folder} cannot be written ({error.strerror}); the journal is whole.") from None
    return written, reason


def table(rows: Sequence[Mapping[str, Any]]) -> Columns:
    """The rows in columns of one type each: true or false, whole numbers, numbers or text; None where empty.

    First what was done and whether it went well, then the setup, then what was found.
    """
    setups = dict.fromkeys(key for row in rows for key in row["setup"] if key not in _LEFT_OUT)
    found = dict.fromkeys(key for row in rows for key in row.get("found", {}) if key not in setups)
    columns: Columns = {name: _column([row.get(name) for row in rows]) for name in _FIRST}
    columns |= {name: _column([row["setup"].get(name) for row in rows]) for name in setups}
    columns |= {name: _column([row.get("found", {}).get(name) for row in rows]) for name in found}
    return columns | {name: _column([row.get(name) for row in rows]) for name in _LAST}


def _column(values: list[Any]) -> list[Any]:
    plain = [_plain(value) for value in values]
    kinds = {type(value) for value in plain if value is not None}
    if len(kinds) <= 1:
        return plain
    if kinds == {int, float}:
        return [None if value is None else float(value) for value in plain]
    return [None if value is None else str(value) for value in plain]


def _plain(value: Any) -> Any:
    """A list as q_proj,v_proj, anything else that is no single value as JSON."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ",".join(value) or None
    return json.dumps(value, sort_keys=True) if isinstance(value, dict | list) else value


def _whole(path: Path, write: Callable[[Path], None]) -> Path:
    """Write beside the file, then put it in its place."""
    aside = path.with_name(f".{path.name}.part")
    try:
        write(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def _write_csv(columns: Columns, path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def _write_parquet(columns: Columns, path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    # a column without a value is one of text, so that every reader opens it
    arrays = {
        name: pyarrow.array(values, type=pyarrow.string() if all(v is None for v in values) else None)
        for name, values in columns.items()
    }
    pyarrow.parquet.write_table(pyarrow.table(arrays), path, compression="zstd")


def _write_lines(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    path.write_text("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines), encoding="utf-8")
