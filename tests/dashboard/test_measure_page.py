"""Measure and Accuracy without a browser and without a GPU: every state, with made-up records and runs."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from planner.dashboard import here, measurements as module
from planner.dashboard.measurements import Measurements, blocked, driver_gpus
from planner.dashboard.runs import (
    PREDICTIONS,
    published_run,
    recorded_run,
    runs_csv,
    runs_json,
    spread,
    worst,
)
from planner.errors import DeviceError, PlannerError
from planner.estimate import estimate
from planner.measure.nvml import DriverGpu
from planner.measure.published import published_runs
from planner.measure.records import append
from planner.record import Record
from planner.report import OutOfMemory
from planner.simulate import simulate
from planner.spec import Setup
from planner.units import GIB
from tests.measure.made_up import SETUP, made_record, stream

PYTHIA = {
    "model": "EleutherAI/pythia-70m",
    "lora_rank": "4",
    "seq_len": "16",
}  # the setup of the made-up record
KNOWN = [run for run in map(published_run, published_runs()) if run.error("estimate_now") is not None]
GPU = DriverGpu(name="Imaginary GPU", uuid="GPU-0", total_bytes=8 * GIB, used_bytes=0)


@pytest.fixture(autouse=True)
def records(monkeypatch, tmp_path) -> Path:
    """An empty folder of records of one's own."""
    monkeypatch.setenv("PLANNER_RECORDS_DIR", str(tmp_path))
    return tmp_path / "records.jsonl"


@pytest.fixture
def open_measure(open_app) -> Callable[..., Any]:
    """`open_measure(seq_len="64")`: the Measure page of that link."""
    return lambda **link: open_app(**link).switch_page("planner/dashboard/measure.py").run()


@pytest.fixture
def open_accuracy(open_app) -> Callable[..., Any]:
    """The Accuracy page."""
    return lambda **link: open_app(**link).switch_page("planner/dashboard/accuracy.py").run()


class Cached:
    """Stands in for the cached list of GPUs."""

    def __init__(self, gpus: tuple[DriverGpu, ...]) -> None:
        self.gpus = gpus

    def __call__(self) -> tuple[DriverGpu, ...]:
        return self.gpus

    def clear(self) -> None:
        """Nothing to forget."""


class Probe:
    """Stands in for a measurement: says the events of a made-up stream, ends when it is told to."""

    def __init__(self, end: Record | Exception) -> None:
        self.end, self.go_on, self.calls = end, threading.Event(), 0

    def __call__(self, setup: Setup, *, time_limit_s: float, on_event: Any, cancelled: Any) -> Record:
        self.calls += 1
        for event in stream():
            if event["event"] == "phase":
                on_event({"event": "enter", "name": event["name"], "step": event["step"]})
            on_event(event)
        while not self.go_on.is_set():
            if cancelled():
                raise PlannerError("the run was cancelled; nothing was recorded.")
            time.sleep(0.01)
        if isinstance(self.end, Exception):
            raise self.end
        return self.end


@pytest.fixture
def probe(monkeypatch) -> Iterator[Callable[[Record | Exception], Probe]]:
    """`probe(record)`: a machine with a GPU on which a measurement ends like this."""
    monkeypatch.setenv("PLANNER_ALLOW_MEASURE", "1")
    monkeypatch.setattr(here, "gpus", Cached((GPU,)))
    made: list[Measurements] = []

    def install(end: Record | Exception) -> Probe:
        stand_in = Probe(end)
        made.append(Measurements(measure=stand_in))
        monkeypatch.setattr(here, "measurements", lambda: made[0])
        monkeypatch.setattr(here, "visitor", lambda: here.Visitor("anna", made[0]))
        return stand_in

    yield install
    for one in made:
        one.close()


def ended(made: Measurements) -> None:
    """Wait for the end of the run."""
    for _ in range(400):
        if made.last is not None and not made.last.active:
            return
        time.sleep(0.02)
    raise AssertionError("the measurement did not end")


def words(app) -> str:
    """Everything that the page says, without the marks of Markdown."""
    boxes = [*app.info, *app.warning, *app.error, *app.success, *app.markdown, *app.caption]
    tables = " ".join(one.proto.body for one in app.get("html"))
    return " ".join(box.value for box in boxes).replace("\\", "") + tables


def keys(app) -> list[str]:
    """Keys of the buttons that are there."""
    return [button.key for button in app.button]


# --- Measure ------------------------------------------------------------------------------------------


def test_without_permission_it_says_so_and_offers_the_rest(open_measure) -> None:
    app = open_measure()
    assert not app.exception
    assert [title.value for title in app.title] == ["What does it really take?"]
    said = words(app)
    assert "switched off on this server" in said
    assert "not measured" in said
    assert "_measure" not in keys(app)
    assert "_simulate" in keys(app)
    assert any(one.value.startswith("python -m planner measure --model meta-llama/") for one in app.code)


def test_permission_is_one_word_and_nothing_else(open_measure, monkeypatch) -> None:
    monkeypatch.setattr(here, "gpus", Cached((GPU,)))
    for value in ("0", "true", "yes", "", "1"):
        monkeypatch.setenv("PLANNER_ALLOW_MEASURE", value)
        assert ("_measure" in keys(open_measure(**PYTHIA))) == (value == "1")


def test_without_a_gpu_it_says_so(open_measure, monkeypatch) -> None:
    monkeypatch.setenv("PLANNER_ALLOW_MEASURE", "1")
    monkeypatch.setattr(here, "gpus", Cached(()))
    app = open_measure()
    assert "no NVIDIA GPU" in words(app)
    assert "_measure" not in keys(app)


@pytest.mark.parametrize(
    ("gpu", "said"),
    [
        (dataclasses.replace(GPU, used_bytes=5 * GIB), "other processes hold 5.0 GiB of Imaginary GPU"),
        (dataclasses.replace(GPU, total_bytes=GIB // 16), "Imaginary GPU is too small: it has 0.06 GiB"),
    ],
    ids=["busy", "too small"],
)
def test_a_gpu_that_will_not_do_is_named(gpu, said) -> None:
    line = blocked(allowed=True, gpus=(gpu,), predicted=estimate(SETUP))
    assert line is not None
    assert said in line
    assert blocked(allowed=True, gpus=(GPU,), predicted=estimate(SETUP)) is None


def test_a_run_shows_its_stages_then_its_figures_and_is_kept(open_measure, probe, records) -> None:
    record = made_record(estimate=1.02, simulation=1.0)
    stand_in = probe(record)
    app = open_measure(**PYTHIA)
    assert "Imaginary GPU" in words(app)
    app.button(key="_measure").click().run()
    assert not app.exception
    said = words(app)
    assert "Optimizer step 2" in said
    assert "Backward 1" in said
    assert "_cancel_measurement" in keys(app)
    stand_in.go_on.set()
    ended(here.measurements())
    app.run()
    assert not app.exception
    said = words(app)
    assert "Measured 0.10 GiB" in said
    assert "driver 0.0; torch 0.0.0+test" in said
    assert "by subtraction" in said
    assert len(records.read_text().splitlines()) == 1
    assert stand_in.calls == 1


def test_cancel_ends_the_run_and_records_nothing(open_measure, probe, records) -> None:
    probe(made_record())
    app = open_measure(**PYTHIA).button(key="_measure").click().run()
    app.button(key="_cancel_measurement").click().run()
    ended(here.measurements())
    app.run()
    assert "was cancelled; nothing was recorded" in words(app)
    assert not records.exists()
    assert "_measure" in keys(app)


@pytest.mark.parametrize(
    "error",
    [DeviceError("the GPU is busy: another process holds it."), PlannerError("it took longer than 600 s.")],
    ids=["unusable", "timed out"],
)
def test_a_run_that_fails_is_one_line(open_measure, probe, error) -> None:
    stand_in = probe(error)
    stand_in.go_on.set()
    app = open_measure(**PYTHIA).button(key="_measure").click().run()
    ended(here.measurements())
    app.run()
    assert not app.exception
    assert f"Not measured: {error}" in words(app)


def test_an_error_nobody_foresaw_shows_its_name_only(open_measure, probe) -> None:
    stand_in = probe(RuntimeError("/srv/secret"))
    stand_in.go_on.set()
    app = open_measure(**PYTHIA).button(key="_measure").click().run()
    ended(here.measurements())
    app.run()
    assert "failed (RuntimeError)" in words(app)
    assert "/srv" not in words(app)


def test_out_of_memory_is_a_result(open_measure, probe) -> None:
    record = made_record()
    full = OutOfMemory(phase="backward", requested_bytes=2 * GIB, free_bytes=GIB)
    stand_in = probe(
        dataclasses.replace(record, report=dataclasses.replace(record.report, out_of_memory=full))
    )
    stand_in.go_on.set()
    app = open_measure(**PYTHIA).button(key="_measure").click().run()
    ended(here.measurements())
    app.run()
    assert not app.exception
    assert "Out of memory in the backward pass: 2.0 GiB asked for, 1.0 GiB free" in words(app)


def test_one_measurement_at_a_time_and_only_its_own_session_cancels_it() -> None:
    stand_in = Probe(made_record())
    made = Measurements(measure=stand_in, keep=lambda _record: None)
    try:
        made.start(SETUP, "anna")
        with pytest.raises(PlannerError, match="Another measurement is running"):
            made.start(SETUP, "bert")
        made.cancel("bert")
        time.sleep(0.1)
        assert made.last.active
        made.cancel("anna")
        ended(made)
        assert made.last.state == "cancelled"
        stand_in.go_on.set()
        made.start(SETUP, "bert")
        ended(made)
        assert made.last.state == "done"
    finally:
        made.close()


def test_a_record_that_cannot_be_kept_is_said_and_shown(open_measure, monkeypatch, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    stand_in = Probe(made_record())
    stand_in.go_on.set()
    made = Measurements(
        measure=stand_in, keep=lambda record: append(record, tmp_path / "file" / "records.jsonl")
    )
    made.start(SETUP, "anna")
    ended(made)
    assert made.last.state == "done"
    assert "records.jsonl cannot be written" in made.last.note
    assert str(tmp_path) not in made.last.note


def test_the_driver_is_asked_in_another_process(monkeypatch) -> None:
    assert isinstance(driver_gpus(), tuple)
    monkeypatch.setattr(module, "_ASK_DRIVER", "import time; time.sleep(60)")
    monkeypatch.setattr(module, "_DRIVER_PATIENCE_S", 0.3)
    assert driver_gpus() == ()
    monkeypatch.setattr(module, "_DRIVER_PATIENCE_S", 10)
    monkeypatch.setattr(module, "_ASK_DRIVER", "raise SystemExit(1)")
    assert driver_gpus() == ()


def test_a_recorded_run_stands_beside_the_prediction(open_measure, open_app, records) -> None:
    append(made_record(estimate=1.01), records)
    said = words(open_measure(**PYTHIA))
    assert "Imaginary GPU" in said
    assert "Recorded here" in said
    near = words(open_measure(**{**PYTHIA, "seq_len": "64"}))
    assert "The nearest measured run differs: seq_len 16 instead of 64" in near
    plan = open_app(**PYTHIA)
    assert plan.metric[1].value == "0.10 GiB"
    spec = json.loads(plan.get("plotly_chart")[0].proto.spec)
    assert any("measured" in label for label in spec["data"][0]["y"])


def test_an_unreadable_line_is_named_without_its_folder(open_accuracy, records) -> None:
    append(made_record(), records)
    records.write_text(records.read_text() + "nonsense\n")
    said = words(open_accuracy())
    assert "Skipped, as they are no records: records.jsonl:2" in said
    assert str(records.parent) not in said


# --- Accuracy -----------------------------------------------------------------------------------------


def test_without_records_the_published_runs_are_shown_as_others(open_accuracy) -> None:
    app = open_accuracy()
    assert not app.exception
    said = words(app)
    assert "No measurement of our own yet" in said
    assert "Published by others" in said
    assert "fitcheck-llm 0.3.1" in said
    assert app.metric[0].value == str(len(KNOWN))
    assert len(app.get("plotly_chart")) == 2


def test_our_records_stand_first_and_apart(open_accuracy, records) -> None:
    for factor, seq_len in ((1.03, 16), (0.96, 32), (1.0, 64)):
        append(made_record(estimate=factor, simulation=1.001, seq_len=seq_len), records)
    app = open_accuracy()
    assert not app.exception
    assert "No measurement of our own" not in words(app)
    assert app.metric[0].value == "3"
    said = words(app)
    assert "Imaginary GPU" in said
    assert "fitcheck" not in said
    assert "+0.10 %" in said  # the simulation's median error
    app.segmented_control(key="_whose").set_value("published").run()
    assert "fitcheck-llm" in words(app)
    assert app.metric[0].value == str(len(KNOWN))


def test_a_filter_chooses_runs(open_accuracy, records) -> None:
    append(made_record(), records)
    append(made_record(precision="fp32"), records)
    app = open_accuracy()
    assert app.metric[0].value == "2"
    app.multiselect(key="_filter_ours_recipe").set_value(["fp32"]).run()
    assert app.metric[0].value == "1"


def test_runs_that_cannot_be_compared_are_said(open_accuracy, records) -> None:
    record = made_record()
    full = OutOfMemory(phase="load", requested_bytes=1, free_bytes=0)
    append(
        dataclasses.replace(record, report=dataclasses.replace(record.report, out_of_memory=full)), records
    )
    app = open_accuracy()
    assert not app.exception
    assert "None of these runs can be compared" in words(app)
    assert "1 of them ended out of memory and has no peak" in words(app)


def test_errors_are_shares_of_what_was_measured() -> None:
    factors = (1.04, 0.98, 1.01)
    runs = [recorded_run(made_record(estimate=factor, simulation=1.0)) for factor in factors]
    with_errors = [
        dataclasses.replace(
            run, predicted_bytes={**run.predicted_bytes, "estimate_now": run.predicted_bytes["estimate"]}
        )
        for run in runs
    ]
    found = spread(runs, "estimate")
    assert (found.runs, round(found.median, 6), round(found.over, 6), round(found.under, 6)) == (
        3,
        0.02,
        0.04,
        -0.02,
    )
    assert spread(runs, "simulation").over is None
    assert [round(run.error("estimate_now"), 6) for run in worst(with_errors, 2)] == [0.04, -0.02]
    assert spread([], "estimate").median is None


def test_the_downloads_hold_what_is_shown() -> None:
    runs = KNOWN
    lines = list(csv.DictReader(io.StringIO(runs_csv(runs))))
    assert [int(line["measured_bytes"]) for line in lines] == [run.measured_bytes for run in runs]
    assert {line["origin"] for line in lines} == {"published"}
    assert [float(line["estimate_now_error"]) for line in lines] == [
        run.error("estimate_now") for run in runs
    ]
    values = json.loads(runs_json(runs))
    assert [value["measured_bytes"] for value in values] == [run.measured_bytes for run in runs]
    assert set(values[0]["errors"]) == set(PREDICTIONS)


def test_a_text_in_a_spreadsheet_is_no_formula() -> None:
    run = dataclasses.replace(recorded_run(made_record()), setup={"model": "=HYPERLINK(1)", "method": "lora"})
    assert "'=HYPERLINK(1)" in runs_csv([run])


def test_the_published_runs_are_the_archives_figures() -> None:
    """fitcheck-llm 0.3.1, measurement archive: t4-sweep-2026-09-15-07 has 6536.748046875 MiB allocated."""
    runs = {run.id: run for run in published_runs()}
    assert len(runs) == 39
    first = runs["t4-sweep-2026-09-15-07"]
    assert first.peak_allocated_bytes == int(6536.748046875 * (1 << 20))
    assert first.peak_reserved_bytes == 7734 * (1 << 20)
    for run in runs.values():
        parameters = estimate(Setup.from_dict(run.setup)).parameters
        assert (parameters.trainable, parameters.total) == (run.trainable_params, run.total_params)
        assert run.url.startswith("https://")


def test_the_formula_is_within_its_promise_of_the_published_runs() -> None:
    errors = {run.source: run.error("estimate_now") for run in KNOWN}
    assert len(errors) >= 14
    assert all(abs(error) < 0.05 for error in errors.values()), errors


def test_the_packaged_simulations_are_within_their_promise_and_what_the_simulation_says() -> None:
    runs = {run.id: run for run in published_runs()}
    for run in runs.values():
        allowed = 0.0 if run.setup["method"] == "lora" else 0.0025
        assert abs(run.simulated_allocated_bytes / run.peak_allocated_bytes - 1) <= allowed, run.id
    small = runs["t4-sweep-2026-09-15-23"]  # SmolLM2-135M
    report = simulate(Setup.from_dict(small.setup), separate_labels=False)
    packaged = (small.simulated_allocated_bytes, small.simulated_reserved_bytes)
    assert (report.peak_allocated_bytes, report.peak_reserved_bytes) == packaged


def test_the_published_figures_are_those_the_simulation_is_tested_with() -> None:
    file = json.loads((Path(__file__).parents[1] / "data" / "published_t4_runs.json").read_text())
    tested = {run["id"]: run["measured_mib"]["peak_allocated"] for run in (*file["runs"], *file["nf4_runs"])}
    assert {run.id: run.peak_allocated_bytes / (1 << 20) for run in published_runs()} == tested
