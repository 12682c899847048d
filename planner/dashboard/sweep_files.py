"""The results of a sweep that a visitor uploads: size and shape limited, every column checked, nothing kept.

No streamlit in here; what cannot be read is one line. Never opens a path, never asks the hub.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import pandas as pd

from planner import catalog
from planner.advise import verdict
from planner.catalog.gpus import Gpu
from planner.dashboard.fields import method_fields, sharding_fields, training_fields
from planner.errors import PlannerError
from planner.methods import METHODS
from planner.report import MemoryReport, Parameters, Parts
from planner.units import MIB

__all__ = ["LARGEST_BYTES", "MOST_ROWS", "flat_setup", "sweep_table", "varying", "verdicts"]

LARGEST_BYTES = 8 * MIB  # 1,000 rows take some 0.4 MB as CSV, 0.1 MB as Parquet
MOST_ROWS = 20_000
_MOST_COLUMNS = 100
_LARGEST_UNPACKED_BYTES = 128 * MIB  # a Parquet file says so itself, before anything is read
_LONGEST_TEXT = 2000
_LARGEST_NUMBER = float(1 << 60)
_NEEDED = ("verb", "state", "model", "method", "peak_allocated_bytes")
_SOURCES = ("estimate", "simulation", "measurement")
_STATES = {"done", "failed", "refused"}


def sweep_table(data: bytes) -> pd.DataFrame:
    """The rows of a results.parquet or results.csv. Raises PlannerError, in one line, for anything else."""
    if len(data) > LARGEST_BYTES:
        raise PlannerError(f"The file is larger than {LARGEST_BYTES // MIB} MiB; upload fewer rows.")
    try:
        found = _parquet(data) if data[:4] == b"PAR1" else _csv(data)
    except PlannerError:
        raise
    except Exception as error:  # whatever a reader makes of bytes that are no table
        raise PlannerError(
            f"The file is neither Parquet nor CSV that can be read ({type(error).__name__}); upload the "
            "results.parquet or results.csv of a sweep."
        ) from None
    return _checked(found)


def _parquet(data: bytes) -> pd.DataFrame:
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(io.BytesIO(data))
    held = file.metadata
    _check_shape(held.num_rows, held.num_columns)
    unpacked_bytes = sum(held.row_group(at).total_byte_size for at in range(held.num_row_groups))
    if unpacked_bytes > _LARGEST_UNPACKED_BYTES:
        raise PlannerError(f"The file unpacks to more than {_LARGEST_UNPACKED_BYTES // MIB} MiB.")
    table: pd.DataFrame = file.read().to_pandas()
    return table


def _csv(data: bytes) -> pd.DataFrame:
    text = data.decode("utf-8")
    _check_shape(0, text.partition("\n")[0].count(",") + 1)
    found: pd.DataFrame = pd.read_csv(io.StringIO(text), nrows=MOST_ROWS + 1, low_memory=False)
    return found


def _check_shape(rows: int, columns: int) -> None:
    if rows > MOST_ROWS:
        raise PlannerError(f"The file has more than {MOST_ROWS:,} rows; upload fewer.")
    if columns > _MOST_COLUMNS:
        raise PlannerError(f"The file has {columns:,} columns, a sweep's has at most {_MOST_COLUMNS}.")


def _checked(found: pd.DataFrame) -> pd.DataFrame:
    """Columns of plain numbers, truths and short texts, with the ones that every sweep has."""
    _check_shape(len(found), len(found.columns))
    missing = [name for name in _NEEDED if name not in found.columns]
    if missing:
        raise PlannerError(f"The file is no result of a sweep: it has no column {missing[0]}.")
    if found.empty:
        raise PlannerError("The file has no row.")
    found = found.reset_index(drop=True)
    found = pd.DataFrame({str(name): _column(str(name), found[name]) for name in found.columns})
    if not set(found["state"]) <= _STATES:
        raise PlannerError("The file is no result of a sweep: its column state has words that none has.")
    for name in [name for name in found.columns if name.endswith("_bytes")]:
        if not pd.api.types.is_numeric_dtype(found[name]):
            if found[name].notna().any():
                raise PlannerError(f"The file is no result of a sweep: {name[:60]} is no number.")
            found[name] = found[name].astype("float64")
        if (found[name] < 0).any():
            raise PlannerError(f"The file is no result of a sweep: {name[:60]} is below 0.")
    return found


def _column(name: str, values: pd.Series[Any]) -> pd.Series[Any]:
    if len(name) > 100:
        raise PlannerError("The file is no result of a sweep: a column's name is too long.")
    if pd.api.types.is_bool_dtype(values):
        return values
    if pd.api.types.is_numeric_dtype(values):
        if (values.abs() > _LARGEST_NUMBER).any():
            raise PlannerError(f"The file is no result of a sweep: {name} has a number beyond all bounds.")
        return values
    texts = [None if _empty(value) else str(value) for value in values]
    if any(text is not None and len(text) > _LONGEST_TEXT for text in texts):
        raise PlannerError(f"The file is no result of a sweep: {name} has a text too long for one.")
    return pd.Series(texts, dtype="object")


def _empty(value: Any) -> bool:
    return bool(pd.api.types.is_scalar(value) and pd.isna(value))


def varying(table: pd.DataFrame, most: int = 30) -> list[str]:
    """The columns of setups that have 2 to `most` values, in the file's order: what a filter can choose."""
    keys = _setup_keys()
    return [
        name
        for name in table.columns
        if (name in keys or name in ("verb", "state")) and 2 <= table[name].nunique() <= most
    ]


def verdicts(table: pd.DataFrame, gpu: Gpu) -> list[str]:
    """For each row, whether it fits the GPU; "no answer" where there is none."""
    found = []
    for row in table.to_dict("records"):
        peak = row["peak_allocated_bytes"]
        source = row.get("source")
        if row["state"] != "done" or _empty(peak) or source not in _SOURCES:
            found.append("no answer")
            continue
        reserved = row.get("peak_reserved_bytes")
        report = MemoryReport(
            source=source,
            setup={"attention": row.get("attention")},
            parameters=Parameters(total=1, trainable=1),
            parts=Parts(base_weights=int(peak)),  # the verdict asks for the sum alone
            phases=(),
            peak_phase=str(row.get("peak_phase")),
            peak_reserved_bytes=None if _empty(reserved) else int(reserved),
            not_known=() if _empty(row.get("not_known")) else tuple(str(row["not_known"]).split(",")),
        )
        found.append(verdict(report, gpu).word)
    return found


def flat_setup(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """The row's setup as a link's keys; None where its model is not one that a link can name."""
    model, method = str(row["model"]), str(row["method"])
    if method not in METHODS or (model not in catalog.models() and not model.startswith("params:")):
        return None
    flat: dict[str, Any] = {"model": model, "method": method}
    for field in (*method_fields(method), *training_fields(), *sharding_fields()):
        value = row.get(field.name)
        if not _empty(value):
            flat[field.name] = _plain(field.kind, value)
    if not _empty(row.get("gpu")):
        flat["gpu"] = str(row["gpu"])
    return flat


def _plain(kind: str, value: Any) -> Any:
    """A cell as its input takes it: a column with gaps holds whole numbers as floats, truths as texts."""
    if kind == "whole" and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind == "flag":
        return str(value).casefold() == "true"
    return value.item() if hasattr(value, "item") else value


def _setup_keys() -> set[str]:
    fields = [*training_fields(), *sharding_fields(), *(f for name in METHODS for f in method_fields(name))]
    return {"model", "method", "gpu"} | {field.name for field in fields}
