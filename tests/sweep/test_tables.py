"""The tables of a sweep: CSV and Parquet say the same, in columns of one type."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from planner.errors import PlannerError
from planner.sweep import tables
from planner.sweep.jobs import sweep_from
from planner.sweep.run import run_sweep
from planner.sweep.tables import table, write_tables

GRID = """
[[group]]
model = ["openai-community/gpt2", "params:7e9"]
method = "lora"
target_modules = ["attention", "all-linear"]
lora_alpha = [8, 0.5]
lora_dropout = 0.1
[[group]]
model = "openai-community/gpt2"
activation_checkpointing = [true, false]
gpu = "t4"
"""


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "grid.toml").write_text(GRID)
    run_sweep(sweep_from(folder / "grid.toml"), folder / "out", workers=1)
    return folder / "out"


def test_both_files_hold_every_row_and_the_same_values(out: Path) -> None:
    parquet, text = pd.read_parquet(out / "results.parquet"), pd.read_csv(out / "results.csv")
    assert list(parquet.columns) == list(text.columns)
    assert len(parquet) == len(text) == 10
    assert parquet["key"].is_unique
    for name in parquet.columns:
        ours = [None if pd.isna(value) else value for value in parquet[name]]
        theirs = [None if pd.isna(value) else value for value in text[name]]
        assert ours == theirs, name
    assert list(parquet["state"]).count("refused") == 4  # a bare number has no layers for lora
    assert parquet["lora_alpha"].dtype == float
    assert str(parquet["peak_allocated_bytes"].dtype) in ("int64", "float64")
    assert parquet["error"].notna().sum() == 4


def test_a_column_has_one_type() -> None:
    rows: list[dict[str, Any]] = [
        {"setup": {"a": 1, "b": True, "c": ["q_proj", "v_proj"], "d": None}, "found": {"n": []}},
        {"setup": {"a": 2.5, "b": "true", "c": "attention", "d": {"r": 1}, "model_config": {}}, "key": "k"},
    ]
    found = table(rows)
    assert found["a"] == [1.0, 2.5]
    assert found["b"] == ["True", "true"]
    assert found["c"] == ["q_proj,v_proj", "attention"]
    assert found["d"] == [None, '{"r": 1}']
    assert found["n"] == [None, None]
    assert "model_config" not in found
    assert next(iter(found)) == "verb"
    assert list(found)[-1] == "key"


def test_without_pyarrow_the_csv_is_written_and_a_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ModuleNotFoundError(name=name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    files, note = write_tables([{"setup": {"model": "m"}, "key": "k"}], tmp_path)
    assert [path.name for path in files] == ["results.csv"]
    assert note.startswith("No Parquet: pyarrow is not installed")


def test_a_full_disk_leaves_the_tables_that_were_there(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(_columns: object, path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tables, "_write_csv", full)
    with pytest.raises(PlannerError, match=r"cannot be written \(No space left on device\); the journal is"):
        write_tables([], out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
