"""`planner sweep` as a person types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from planner.cli.sweep import _time, _Told


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    """A file of four setups, one of them none."""
    path = tmp_path / "grid.toml"
    path.write_text(
        '[[group]]\nmodel = "openai-community/gpt2"\nmicro_batch_size = [1, 2]\nseq_len = [64, 128]\n'
        '[[group]]\nmodel = "openai-community/gpt2"\nseq_len = 2000\n'
    )
    return path


def test_what_it_says(planner_command, grid: Path) -> None:
    said = planner_command("sweep", str(grid), "--workers", "1").stdout
    assert said.startswith("5 setups: 4 estimated, 1 refused.\n")
    assert "openai-community/gpt2: group 2: seq_len 2,000 is beyond" in said
    assert f"In {grid.with_suffix('')}: results.csv, results.parquet." in said
    again = json.loads(planner_command("sweep", str(grid), "--json").stdout)
    assert (again["before"], again["done"], again["left"], again["rows"]) == (5, 0, 0, 5)


def test_tables_on_demand(planner_command, grid: Path, tmp_path: Path) -> None:
    out = tmp_path / "elsewhere"
    said = planner_command("sweep", str(grid), "--out", str(out), "--write-only").stdout
    assert "5 setups: 0 estimated. 5 are left." in said
    assert (out / "results.csv").read_text().startswith("verb,state,error,")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--ray", "--workers", "2"), "--workers and --ray exclude each other"),
        (("--workers", "0"), "--workers must be a whole number from 1 to 1,024, got '0'."),
        (("--verb", "guess"), "verb must be one of estimate, simulate, measure, got 'guess'"),
        (("--time-limit-s", "soon"), "--time-limit-s must be seconds above 0, got 'soon'."),
    ],
)
def test_refusals(planner_command, grid: Path, words: tuple[str, ...], told: str) -> None:
    answer = planner_command("sweep", str(grid), *words, code=2)
    assert told in answer.stderr
    assert answer.stderr.count("\n") == 1


def test_a_file_is_asked_for(planner_command, tmp_path: Path) -> None:
    assert "FILE" in planner_command("sweep", code=2).stderr
    assert "cannot be read" in planner_command("sweep", str(tmp_path / "none.toml"), code=2).stderr
    (tmp_path / "plain").write_text('[[group]]\nmodel = "openai-community/gpt2"\n')
    assert "has no ending .toml" in planner_command("sweep", str(tmp_path / "plain"), code=2).stderr


def test_progress_is_said_from_time_to_time(capsys: pytest.CaptureFixture[str]) -> None:
    at = iter([0.0, 1.0, 11.0, 12.0])
    told = _Told(1000, lambda: next(at))
    told.rows([{}] * 10, 700)
    told.rows([{}] * 100, 600)
    told.rows([{}] * 100, 500)
    assert capsys.readouterr().err == "400/1,000, 10 a second, about 60 s left\n"
    assert [_time(seconds) for seconds in (40, 700, 12600)] == ["40 s", "12 min", "3.5 h"]
