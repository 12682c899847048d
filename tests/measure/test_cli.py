"""`planner measure` and `planner records` as they are typed, in processes of their own."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from planner import estimate, simulate
from planner.measure.answer import readings
from planner.measure.foretold import Foretold, foretold, line_of
from planner.measure.records import append, append_line, read
from planner.measure.trace import SCHEMA
from planner.record import Prediction, Record
from planner.report import OutOfMemory, Parts
from tests.measure.made_up import DEVICE, SETUP, VERSIONS, made_record, stream

ROOT = Path(__file__).parents[2]
RUN = ("--model", "EleutherAI/pythia-70m", "--method", "lora", "--seq-len", "16")


def run(folder: Path, *words: str, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """`planner WORDS` with the user's records in `folder`, and no GPU."""
    done = subprocess.run(
        [sys.executable, "-m", "planner", *words],
        cwd=ROOT,
        env={
            **os.environ, "PLANNER_RECORDS_DIR": str(folder), "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == code, f"{done.returncode}\n{done.stdout}{done.stderr}"
    return done


def answer(folder: Path, *words: str) -> dict[str, Any]:
    done = run(folder, *words, "--json")
    assert done.stdout.count("\n") == 1
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["schema"] == 1
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's folder with three made-up records and a spoiled line."""
    path = tmp_path / "records.jsonl"
    append(made_record(simulation=1.001, estimate=1.04), path)
    append_line('{"schema": 1', path)
    append(made_record(simulation=0.999, estimate=0.97, seq_len=32, set_name="matrix"), path)
    append(made_record(seq_len=64, set_name="unseen"), path)
    return tmp_path


def test_without_a_device_exit_code_3_and_one_clear_line(tmp_path: Path) -> None:
    done = run(tmp_path, "measure", *RUN, "--json", code=3)
    assert done.stdout == ""
    assert done.stderr.startswith("planner: ")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_rehearsal_keeps_no_record(tmp_path: Path) -> None:
    found = answer(tmp_path, "measure", *RUN, "--rehearse")
    assert found["source"] == "rehearsal"
    assert [phase["name"] for phase in found["phases"]][:2] == ["load", "attach"]
    assert not list(tmp_path.iterdir())


def test_a_matrix_is_rehearsed_within_its_budget_and_resumed(tmp_path: Path) -> None:
    matrix = tmp_path / "m.toml"
    matrix.write_text(
        'set = "try"\n[[group]]\nmodel = "EleutherAI/pythia-70m"\nmethod = ["lora", "bitfit"]\nseq_len = 16\n'
    )
    words = ("measure", "--matrix", str(matrix), "--out", str(tmp_path / "out"), "--rehearse")
    none = answer(tmp_path, *words, "--budget-s", "0.01")
    assert (none["rehearsed"], none["left"]) == (0, 2)
    done = run(tmp_path, *words, "--budget-s", "200")
    assert "2 setups: 0 had a record before, 2 rehearsed" in done.stdout
    assert "No measured run to compare with yet." in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "out" / "rehearsals.jsonl").read_text().splitlines()]
    assert [(line["source"], line["set"]) for line in lines] == [("rehearsal", "try")] * 2
    assert all(line["simulation"]["peak_allocated_bytes"] > 0 for line in lines)
    assert not (tmp_path / "out" / "records.jsonl").exists()  # no memory was measured
    again = answer(tmp_path, *words, "--budget-s", "200")
    assert (again["present"], again["rehearsed"], again["left"]) == (2, 0, 0)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("measure", "--model", "openai-community/gpt2", "--out", "x"), "--out belongs to --matrix"),
        (("measure", "--matrix", "m.toml"), "--matrix needs --out"),
        (("measure", "--matrix", "m.toml", "--out", "x", "--trace", "t"), "exclude each other"),
        (("measure", *RUN, "--time-limit-s", "-1"), "must be seconds above 0"),
        (("measure", *RUN, "--time-limit-s", "nan"), "must be seconds above 0"),
        (("records", "--csv", "a", "--validate"), "exclude each other"),
        (("records", "--resimulate"), "belongs to --accuracy"),
        (("records", "--predictions", "a"), "belongs to --accuracy"),
        (("records", "--accuracy", "--predictions", "nowhere.jsonl"), "nowhere.jsonl cannot be read"),
        (("records", "--into", "a"), "belongs to --merge"),
        (("records", "--set", "mine"), "--set must be one of"),
    ],
)
def test_a_wrong_command_is_one_line(words: tuple[str, ...], told: str, tmp_path: Path) -> None:
    done = run(tmp_path, *words, code=2)
    assert told in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("flags", [(), ("--accuracy",), ("--validate",)])
def test_no_records_yet_is_a_sentence(flags: tuple[str, ...], tmp_path: Path) -> None:
    nothing = tmp_path / "nothing.jsonl"
    nothing.write_text("")
    done = run(tmp_path, "records", "--file", str(nothing), *flags)
    assert "There are no records yet; run planner measure" in done.stdout


def test_records_are_listed_and_a_spoiled_line_is_named(folder: Path) -> None:
    done = run(folder, "records", "--filter", "device=imaginary")
    assert f"planner: skipped {folder / 'records.jsonl'}:2: not a line of JSON." in done.stderr
    assert done.stdout.count("Imaginary GPU") == 3
    assert "+0.100 %" in done.stdout
    found = answer(folder, "records", "--filter", "seq_len=32", "--filter", "device=imaginary")
    (record,) = found["records"]
    assert (record["setup"]["seq_len"], record["from"]) == (32, "own")
    assert len(found["unreadable"]) == 1


def test_the_accuracy_of_records(folder: Path) -> None:
    own = ("--file", str(folder / "records.jsonl"))
    rows = answer(folder, "records", "--accuracy", *own)["accuracy"]
    found = {
        row["prediction"]: row
        for row in rows
        if row["group"] == "all" and row["quantity"] == "peak_allocated_bytes"
    }
    assert set(found) == {"estimate", "simulation", "estimate_now"}
    assert found["estimate"]["runs"] == 3
    assert found["estimate"]["worst_over"] == pytest.approx(0.04)
    assert found["estimate"]["worst_under"] == pytest.approx(-0.03)
    assert found["simulation"]["median"] == pytest.approx(0.001, rel=1e-4)
    one = answer(folder, "records", "--accuracy", "--set", "unseen", *own)
    assert one["runs"] == 1
    text = run(folder, "records", "--accuracy", *own).stdout
    assert "family gpt_neox" in text
    assert "recipe bf16" in text


def test_resimulated_records_stand_beside_the_stored_ones(folder: Path) -> None:
    own = ("--file", str(folder / "records.jsonl"), "--filter", "seq_len=32")
    rows = answer(folder, "records", "--accuracy", "--resimulate", *own)["accuracy"]
    now = [row for row in rows if row["prediction"] == "simulation_now" and row["group"] == "all"]
    assert [(row["quantity"], row["runs"]) for row in now] == [
        ("peak_allocated_bytes", 1), ("peak_reserved_bytes", 1),
    ]


def test_predictions_written_before_stand_beside_the_stored_ones(folder: Path) -> None:
    found = answer(folder, "records", "--file", str(folder / "records.jsonl"))["records"]
    record = next(record for record in found if record["setup"]["seq_len"] == 32)
    before = Prediction.from_dict(record["simulation"])
    assert before.report is not None
    peak = round(record["report"]["peak_allocated_bytes"] * 1.25)
    higher = dataclasses.replace(before.report, parts=Parts(activations=peak))
    written = Foretold(
        setup=record["setup"],
        gpu="Imaginary GPU",
        date="2026-01-01T00:00:00+00:00",
        estimate=Prediction(reason="it was not asked."),
        simulation=Prediction(report=higher),
    )
    path = folder / "before.jsonl"
    path.write_text(line_of(written) + "\n")
    words = ("records", "--accuracy", "--predictions", str(path), "--file", str(folder / "records.jsonl"))
    rows = {
        row["prediction"]: row
        for row in answer(folder, *words)["accuracy"]
        if row["group"] == "all" and row["quantity"] == "peak_allocated_bytes"
    }
    assert rows["simulation_before"]["worst_over"] == pytest.approx(0.25)
    assert [rows[name]["runs"] for name in ("simulation", "simulation_before")] == [1, 1]
    assert (rows["estimate_before"]["runs"], rows["estimate_before"]["missing"]) == (0, 1)
    later = dataclasses.replace(written, simulation=Prediction(reason="it was mended meanwhile."))
    path.write_text(f"{line_of(written)}\n{line_of(later)}\n")
    first = foretold(path)[written.key].simulation.report
    assert first is not None  # what was said first counts
    assert first.peak_allocated_bytes == peak
    path.write_text("{}\n")
    assert "line 1 is no prediction" in run(folder, *words, code=2).stderr


def test_validation_names_the_line(folder: Path) -> None:
    path = folder / "records.jsonl"
    done = run(folder, "records", "--validate", "--file", str(path), code=1)
    assert f"1 of 4 lines are no valid record; the first is {path}:2: not a line of JSON." in done.stderr
    path.write_text("".join(line for line in path.read_text().splitlines(True) if line.endswith("}\n")))
    assert "All 3 records are valid." in run(folder, "records", "--validate", "--file", str(path)).stdout


def test_a_setup_that_this_version_refuses_is_found(tmp_path: Path) -> None:
    line = made_record().to_dict()
    for place in (line["setup"], line["report"]["setup"]):
        place["seq_len"] = 0
    append_line(json.dumps(line), tmp_path / "r.jsonl")
    done = run(tmp_path, "records", "--validate", "--file", str(tmp_path / "r.jsonl"), code=1)
    assert "its setup is refused (seq_len must be a whole number" in done.stderr


def test_export_and_merge(folder: Path) -> None:
    table, into = folder / "t.csv", folder / "into.jsonl"
    path = folder / "records.jsonl"
    assert answer(folder, "records", "--csv", str(table), "--file", str(path))["records"] == 3
    assert len(table.read_text().splitlines()) == 4
    found = answer(folder, "records", "--merge", str(path), str(path), "--into", str(into))
    assert (found["added"], found["read"]) == (3, 6)
    assert len(read([into]).records) == 3


def test_text_needs_no_rich(folder: Path) -> None:
    """On a machine with torch and nothing else of this project's."""
    blocker = folder / "blocked"
    blocker.mkdir()
    (blocker / "rich.py").write_text("raise ModuleNotFoundError('no rich', name='rich')")
    done = run(folder, "records", "--accuracy", PYTHONPATH=str(blocker))
    assert "Worst over" in done.stdout
    done = run(folder, "estimate", *RUN, PYTHONPATH=str(blocker))
    assert "Peak allocated" in done.stdout


def test_a_trace_is_aligned(tmp_path: Path) -> None:
    head = {"schema": SCHEMA, "setup": SETUP.to_dict(), "device": DEVICE.to_dict(), "versions": VERSIONS}
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({**head, "phases": ["", "load"], "events": [[1, 1, 77, 1, "x.py:1 f"]]}))
    found = answer(tmp_path, "records", "--align", str(path))
    assert found["first_other_size"]["number"] == 0
    assert "real 77 bytes in load (x.py:1 f)" in found["sentence"]


# --- what is shown of a measured run, made up ------------------------------------------------------------


def shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], record: Record, *words: str
) -> str:
    """What `planner measure` prints for this record, in this process."""
    from planner.cli import main
    from planner.measure import single

    monkeypatch.setattr(single, "record_of", lambda _setup, **_options: record)
    assert main(["measure", *RUN, *words]) == 0
    return capsys.readouterr().out


def test_a_measured_run_is_recorded_and_shown_beside_both_predictions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PLANNER_RECORDS_DIR", str(tmp_path))
    record = made_record(simulation=1.001, estimate=1.04)
    text = shown(monkeypatch, capsys, record)
    for part in ("Imaginary GPU", "(by subtraction)", "+4.0 %", "+0.100 %", "is what remains", "Recorded in"):
        assert part in text
    found = json.loads(shown(monkeypatch, capsys, record, "--json", "--no-record"))
    assert found["source"] == "measurement"
    assert found["record"] is None
    assert found["comparison"]["peak_allocated"]["estimate_error"] == pytest.approx(0.04)
    assert found["simulation"]["source"] == "simulation"
    assert len(read([tmp_path / "records.jsonl"]).records) == 1


def test_out_of_memory_is_shown_as_a_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PLANNER_RECORDS_DIR", str(tmp_path))
    record = made_record()
    failure = OutOfMemory(phase="forward", requested_bytes=3 << 30, free_bytes=1 << 30)
    full = dataclasses.replace(
        record,
        report=dataclasses.replace(record.report, out_of_memory=failure),
        simulation=Prediction(reason="it cannot be traced."),
    )
    text = shown(monkeypatch, capsys, full)
    assert "Out of memory in forward: 3.0 GiB asked for, 1.0 GiB free." in text
    assert "No simulation: it cannot be traced." in text
    assert "out of memory" in run(tmp_path, "records", "--filter", "device=imaginary").stdout


def test_the_simulation_of_a_record_is_made_beside_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device's own event starts it, for that device."""
    from planner.measure import single

    def measured(_child: Any, _setup: Any, _limit: float, *, on_event: Any, **_options: Any) -> Any:
        for event in stream():
            on_event(event)
        return readings(stream())

    monkeypatch.setattr(single, "measured", measured)
    record = single.record_of(SETUP, python=sys.executable)
    assert record.simulation.report is not None
    expected = simulate(SETUP, gpu=DEVICE.gpu)
    assert record.simulation.report.parts == expected.parts
    assert record.estimate.report == estimate(SETUP)
    assert Record.from_dict(json.loads(json.dumps(record.to_dict()))) == dataclasses.replace(
        record, simulation=Prediction(report=dataclasses.replace(record.simulation.report, timeline=()))
    )
