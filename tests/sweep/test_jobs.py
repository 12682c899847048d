"""What a sweep's file asks for: the matrix's grammar, a job each, refusals as rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from planner.errors import SetupError
from planner.measure.matrix import matrix_from
from planner.spec import Setup
from planner.sweep.jobs import Sweep, sweep_from

ROOT = Path(__file__).resolve().parents[2]


def read(tmp_path: Path, text: str, verb: str | None = None) -> Sweep:
    """The sweep of a file with this text."""
    path = tmp_path / "grid.toml"
    path.write_text(text)
    return sweep_from(path, verb=verb)


def test_the_matrix_of_the_benchmarks_is_a_sweep_too() -> None:
    path = ROOT / "benchmarks" / "matrix.toml"
    sweep = sweep_from(path)
    assert sweep.name == "matrix"
    assert [job.refused for job in sweep.jobs] == [""] * len(sweep.jobs)
    wanted = {setup.model.id for setup in matrix_from(path).setups}
    assert {job.setup["model"] for job in sweep.jobs} == wanted
    assert len(sweep.jobs) == len(matrix_from(path).setups)


def test_every_combination_is_one_job_with_its_defaults_filled_in(tmp_path: Path) -> None:
    sweep = read(
        tmp_path,
        'set = "mine"\nverb = "simulate"\n[defaults]\nmodel = "openai-community/gpt2"\n'
        '[[group]]\nseq_len = [64, 128]\ngpu = ["t4", "h100", "24GiB"]\n'
        '[[group]]\nseq_len = 64\ngpu = "t4"\nprecision = "bf16"\n',
    )
    assert (sweep.name, sweep.verb, len(sweep.jobs)) == ("mine", "simulate", 6)  # the last one is the first
    assert len({job.key for job in sweep.jobs}) == 6
    for job in sweep.jobs:
        assert Setup.from_dict(job.setup).to_dict() == job.setup
    assert {job.setup["gpu"] for job in sweep.jobs} == {"t4", "h100", "24GiB"}


def test_a_combination_that_is_no_setup_keeps_its_reason_and_costs_no_other(tmp_path: Path) -> None:
    sweep = read(
        tmp_path,
        '[[group]]\nmodel = "openai-community/gpt2"\nseq_len = [64, 4096]\n'
        '[[group]]\nmodel = ["openai-community/gpt2", "nobody/knows"]\nlora_rankk = 3\n'
        "[[group]]\nmodel = 7\nsince = 2026-01-01\n",
    )
    good, *bad = sweep.jobs
    assert good.refused == ""
    assert bad[0].refused.startswith("group 1: seq_len 4,096 is beyond the 1,024 positions")
    assert "lora_rank" in bad[1].refused
    assert bad[-1].refused.startswith("group 3: model is missing")
    assert len(bad) == 4
    assert all("\n" not in job.refused for job in bad)


def test_the_verb_counts_in_the_key_and_the_shell_s_comes_first(tmp_path: Path) -> None:
    text = 'verb = "simulate"\n[[group]]\nmodel = "openai-community/gpt2"\n'
    file, shell = read(tmp_path, text), read(tmp_path, text, verb="estimate")
    assert (file.verb, shell.verb) == ("simulate", "estimate")
    assert file.jobs[0].key != shell.jobs[0].key
    with pytest.raises(SetupError, match="verb must be one of estimate, simulate, measure, got 'guess'"):
        read(tmp_path, text, verb="guess")


def test_a_grid_beyond_a_million_is_refused_before_it_is_made(tmp_path: Path) -> None:
    axis = list(range(1, 201))
    with pytest.raises(SetupError, match="8,000,000 combinations, at most 1,000,000"):
        read(
            tmp_path,
            f'[[group]]\nmodel = "openai-community/gpt2"\nseq_len = {axis}\nmicro_batch_size = {axis}\n'
            f"gradient_accumulation_steps = {axis}\n",
        )


@pytest.mark.parametrize("text", ["group = 3", "group = [1, 2]", "defaults = 1\n[[group]]\nmodel = 'x'"])
def test_what_is_no_grid_is_one_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(SetupError, match=r"has no \[\[group\]\]"):
        read(tmp_path, text)
