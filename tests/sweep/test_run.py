"""Sweeps on this machine: every row once, whatever is killed, interrupted or wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from planner import Setup, estimate
from planner.errors import DeviceError, PlannerError
from planner.sweep import process
from planner.sweep.jobs import Job, Sweep, sweep_from
from planner.sweep.journal import Journal
from planner.sweep.local import local_rows
from planner.sweep.run import run_sweep
from tests.measure.made_up import DEVICE, SETUP, stream

ROOT = Path(__file__).resolve().parents[2]
ESTIMATES = """
[[group]]
model = ["openai-community/gpt2", "meta-llama/Llama-3.2-1B"]
method = ["full", "lora"]
micro_batch_size = [1, 2, 3, 4, 5]
seq_len = [64, 128, 256, 512, 5000]
gpu = ["t4", "h100"]
"""
SIMULATIONS = """
verb = "simulate"
[[group]]
model = "EleutherAI/pythia-410m"
micro_batch_size = [1, 2, 3, 4, 5, 6, 7, 8]
seq_len = [16, 32, 48, 64]
"""


def sweep_of(tmp_path: Path, text: str) -> Sweep:
    """The sweep of a file with this text."""
    (tmp_path / "grid.toml").write_text(text)
    return sweep_from(tmp_path / "grid.toml")


def journal(out: Path) -> list[dict[str, Any]]:
    """Every line of the journal, repeated ones too."""
    path = out / "journal.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_every_row_is_the_estimate_of_its_setup(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, ESTIMATES)
    heard: list[int] = []
    found = run_sweep(sweep, tmp_path / "out", workers=2, on_rows=lambda _rows, left: heard.append(left))
    assert (found.before, found.done, found.failed, found.refused) == (0, 180, 0, 20)  # gpt2 ends at 1,024
    assert heard[-1] == 0
    assert [row["key"] for row in found.rows] == [job.key for job in sweep.jobs]
    for row in found.rows:
        if row["state"] == "refused":
            assert "beyond the 1,024 positions" in row["error"]
            continue
        report = estimate(Setup.from_dict(row["setup"]))
        assert row["found"]["peak_allocated_bytes"] == report.peak_allocated_bytes
        assert row["found"]["activations_bytes"] == report.parts.activations
        assert row["found"]["verdict"] in ("fits", "tight", "does not fit")
    assert {row["found"]["verdict"] for row in found.rows if row["state"] == "done"} > {"fits"}
    assert len(journal(tmp_path / "out")) == 200

    again = run_sweep(sweep, tmp_path / "out")
    assert (again.before, again.done, again.refused) == (200, 0, 0)
    assert len(journal(tmp_path / "out")) == 200


def test_a_wider_file_adds_to_what_is_there(tmp_path: Path) -> None:
    narrow = sweep_of(tmp_path, '[[group]]\nmodel = "openai-community/gpt2"\nseq_len = [64, 128]\n')
    run_sweep(narrow, tmp_path / "out")
    wide = sweep_of(tmp_path, '[[group]]\nmodel = "openai-community/gpt2"\nseq_len = [96, 128]\n')
    found = run_sweep(wide, tmp_path / "out")
    assert (found.before, found.done) == (1, 1)
    assert [row["setup"]["seq_len"] for row in found.rows] == [96, 128, 64]


# --- what is lost in the middle --------------------------------------------------------------------------


def command(tmp_path: Path) -> subprocess.Popen[str]:
    """`planner sweep` of the simulations, in a process of its own that hears Ctrl-C wherever it starts."""
    return subprocess.Popen(
        [sys.executable, "-m", "planner", "sweep", str(tmp_path / "grid.toml"), "--workers", "2", "--json"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background ignores it
    )


def after(rows: int, out: Path, sweep: subprocess.Popen[str]) -> None:
    """Wait until the journal has so many."""
    ends_at = time.monotonic() + 90
    while not (out / "journal.jsonl").exists() or (out / "journal.jsonl").read_text().count("\n") < rows:
        assert sweep.poll() is None, sweep.communicate()
        assert time.monotonic() < ends_at
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    """The working processes that it started."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (path / "stat").read_text().rpartition(")")[2].split()[:2]
            words = (path / "cmdline").read_bytes()
        except OSError:
            continue
        if int(parent) == pid and state != "Z" and b"planner.sweep.worker" in words:
            found.append(int(path.name))
    return found


def alive(pids: Sequence[int]) -> list[int]:
    """Those that still run, a few seconds later."""
    ends_at = time.monotonic() + 10
    left = list(pids)
    while left and time.monotonic() < ends_at:
        left = [pid for pid in left if Path(f"/proc/{pid}").exists()]
        time.sleep(0.05)
    return left


def test_killed_interrupted_and_gone_on_with(tmp_path: Path) -> None:
    """A worker is killed, Ctrl-C, the whole sweep is killed, a line is broken: 32 rows, none twice."""
    sweep_of(tmp_path, SIMULATIONS)
    out = tmp_path / "grid"

    first = command(tmp_path)
    after(3, out, first)
    os.kill(children(first.pid)[0], signal.SIGKILL)
    after(8, out, first)
    workers = children(first.pid)
    assert len(workers) == 2  # the lost one was started again
    first.send_signal(signal.SIGINT)
    said, words = first.communicate(timeout=30)
    assert (first.returncode, said) == (130, "")
    assert "run the same command again to go on" in words
    assert alive(workers) == []
    kept = journal(out)
    assert len(kept) < 32

    second = command(tmp_path)
    after(len(kept) + 3, out, second)
    workers = children(second.pid)
    second.kill()
    second.communicate(timeout=30)
    assert alive(workers) == []
    with (out / "journal.jsonl").open("a") as file:
        file.write('{"schema": 1, "key": "half a li')

    third = command(tmp_path)
    said, words = third.communicate(timeout=120)
    assert third.returncode == 0, words
    answer = json.loads(said)
    assert (answer["setups"], answer["failed"], answer["left"], answer["rows"]) == (32, 0, 0, 32)
    assert answer["before"] >= len(kept) + 3
    lines = (out / "journal.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines if "half a" not in line]
    assert len(rows) == len({row["key"] for row in rows}) == 32


POISONED = """
    import json, os, sys, time
    for line in sys.stdin:
        for job in json.loads(line)["jobs"]:
            if job["setup"]["do"] == "die":
                os.kill(os.getpid(), 9)
            if job["setup"]["do"] == "once" and not os.path.exists(sys.argv[1]):
                open(sys.argv[1], "w").close()
                sys.exit(7)
            if job["setup"]["do"] == "sleep":
                time.sleep(60)
            row = {"schema": 1, "key": job["key"], "verb": "simulate", "state": "done", "setup": job["setup"]}
            print(json.dumps({"event": "row", "row": row}), flush=True)
"""


def poisoned(tmp_path: Path, *does: str, time_limit_s: float = 60.0) -> dict[str, dict[str, Any]]:
    """The rows of jobs that do so to their process, by key; each key once."""
    path = tmp_path / "poisoned.py"
    path.write_text(textwrap.dedent(POISONED))
    jobs = [Job(key=f"{number} {do}", setup={"do": do}) for number, do in enumerate(does)]
    rows = local_rows(
        [jobs], "simulate", workers=2, time_limit_s=time_limit_s,
        command=[sys.executable, str(path), str(tmp_path / "once")],
    )  # fmt: skip
    found = [row for some in rows for row in some]
    assert [row["key"] for row in found] == [job.key for job in jobs]
    return {row["key"]: row for row in found}


def test_a_job_that_kills_its_process_is_a_row_and_costs_no_other(tmp_path: Path) -> None:
    rows = poisoned(tmp_path, "work", "die", "work", "once", "work")
    assert [row["state"] for row in rows.values()] == ["done", "failed", "done", "done", "done"]
    assert rows["1 die"]["error"] == (
        "its process was killed 3 times (SIGKILL); the machine may have run out of main memory."
    )


def test_a_job_beyond_its_time_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_START_LIMIT_S", 5.0)
    rows = poisoned(tmp_path, "work", "sleep", "work", time_limit_s=0.5)
    assert [row["state"] for row in rows.values()] == ["done", "failed", "done"]
    assert rows["1 sleep"]["error"] == "it took longer than 0.5 s; allow more with --time-limit-s."


def test_failed_rows_are_tried_again_only_when_asked(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, '[[group]]\nmodel = "openai-community/gpt2"\n')
    (job,) = sweep.jobs
    out = tmp_path / "out"
    run_sweep(sweep, out, write_only=True)
    Journal(out).add([process.failed_row(job, "estimate", "no luck")])
    kept = run_sweep(sweep, out)
    assert (kept.before, kept.done, kept.rows[0]["state"]) == (1, 0, "failed")
    again = run_sweep(sweep, out, retry_failed=True)
    assert (again.before, again.done) == (0, 1)
    assert [row["state"] for row in again.rows] == ["done"]


def test_a_folder_takes_one_sweep_at_a_time(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, '[[group]]\nmodel = "openai-community/gpt2"\n')
    refused: list[str] = []

    def meanwhile(_rows: object, _left: int) -> None:
        with pytest.raises(PlannerError, match="another sweep writes into") as caught:
            run_sweep(sweep, tmp_path / "out")
        refused.append(str(caught.value))

    run_sweep(sweep, tmp_path / "out", on_rows=meanwhile)
    assert len(refused) == 1


# --- measuring -------------------------------------------------------------------------------------------


def test_measuring_without_a_device_ends_the_sweep_at_once(tmp_path: Path) -> None:
    text = 'verb = "measure"\n[[group]]\nmodel = "openai-community/gpt2"\nseq_len = [8, 16]\n'
    sweep = sweep_of(tmp_path, text)
    with pytest.raises(DeviceError):
        run_sweep(sweep, tmp_path / "out")
    assert journal(tmp_path / "out") == []


def test_measured_rows_carry_their_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from planner.measure.answer import readings
    from planner.measure.probe import recorded
    from planner.measure.records import read
    from planner.record import Prediction

    def record_of(setup: Setup, **_options: Any) -> Any:
        if setup.training.seq_len == 48:
            raise DeviceError("the device is too small.")
        return recorded(setup, readings(iter(stream())), Prediction(reason="not asked"))

    monkeypatch.setattr(process, "record_of", record_of)
    monkeypatch.setattr(process, "_check_device", lambda: None)
    text = f'verb = "measure"\n[[group]]\nmodel = "{SETUP.model.id}"\nseq_len = [32, 48, 64]\n'
    found = run_sweep(sweep_of(tmp_path, text), tmp_path / "out")
    assert (found.done, found.failed) == (2, 1)
    assert found.rows[1]["error"] == "the device is too small."
    assert {row["found"]["source"] for row in found.rows if "found" in row} == {"measurement"}
    shelf = read([tmp_path / "out" / "records.jsonl"])
    assert shelf.unreadable == ()
    assert [record.device.name for record in shelf.records] == [DEVICE.name] * 2
