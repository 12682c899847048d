"""The simulation on the pages without a browser: button, rows, failures. The process is a stand-in."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from planner.dashboard import answers, simulating
from planner.dashboard.simulations import Simulated, Simulations
from planner.dashboard.worker import Worker
from planner.estimate import estimate
from planner.report import LoadingBand
from planner.spec import Setup
from planner.units import MIB

STAND_IN = [sys.executable, str(Path(__file__).parent / "stand_in_worker.py")]
GPT2 = {"model": "openai-community/gpt2", "gpu": "t4"}


def use(monkeypatch, made: Simulations) -> None:
    """Put a queue in place of the server's. A session-scoped cache is the browser tests' business."""
    monkeypatch.setattr(simulating, "simulations", lambda: made)
    monkeypatch.setattr(simulating, "_visitor", lambda: simulating._Visitor("anna", made))


@pytest.fixture
def queue(monkeypatch) -> Iterator[Simulations]:
    """The page's queue, before a stand-in process."""
    made = Simulations(start=lambda: Worker(STAND_IN), time_limit_s=20)
    use(monkeypatch, made)
    yield made
    made.close()


def keys(app) -> list[str]:
    """Keys of the buttons that are there."""
    return [button.key for button in app.button]


def rows(app) -> list[str]:
    """The labels of the bars."""
    chart = app.get("plotly_chart")[0]
    return [label.replace("<br>", " ") for label in json.loads(chart.proto.spec)["data"][0]["y"]]


def finished(app, queue):
    """Run again until nothing is simulated any more."""
    for _ in range(200):
        app.run()
        if "_cancel_simulation" not in keys(app):
            return app
        time.sleep(0.05)
    raise AssertionError("the simulation did not end")


def test_the_button_adds_a_row_for_each_method_and_the_timeline(open_app, queue) -> None:
    app = open_app(**GPT2)
    assert len(rows(app)) == 2
    app.button(key="_simulate").click().run()
    assert not app.exception
    app = finished(app, queue)
    assert not app.exception
    assert [row.split(" <b>")[0] for row in rows(app)] == [
        "Full fine-tuning predicted", "Full fine-tuning simulated", "LoRA predicted", "LoRA simulated",
    ]  # fmt: skip
    assert any("Simulated peak" in caption.value for caption in app.caption)
    assert "_simulate" not in keys(app)


def test_the_sentence_gives_the_band_of_a_quantized_load() -> None:
    setup = Setup.from_dict(GPT2)
    report = dataclasses.replace(estimate(setup), source="simulation")
    band = LoadingBand(
        resident_bytes=(0, MIB),
        step_bytes=(1838 * MIB, 1853 * MIB),
        peak_allocated_bytes=(1839 * MIB, 1853 * MIB),
        orders=15,
    )
    banded = dataclasses.replace(report, loading_band=band)
    said = [
        simulating.summary(Simulated(setup=setup, state="done", report=one), report)
        for one in (report, banded)
    ]
    assert "weights arrive" not in said[0]
    assert "; 1,839 to 1,853 MiB by the order in which the weights arrive." in said[1]


def test_full_fine_tuning_is_simulated_once(open_app, queue) -> None:
    app = finished(open_app(**GPT2, method="full").button(key="_simulate").click().run(), queue)
    assert [row.split(" <b>")[0] for row in rows(app)] == [
        "Full fine-tuning predicted", "Full fine-tuning simulated",
    ]  # fmt: skip


def test_another_input_hides_the_simulation_and_the_first_brings_it_back(open_app, queue) -> None:
    app = finished(open_app(**GPT2).button(key="_simulate").click().run(), queue)
    app.number_input(key="seq_len").set_value(64).run()
    assert len(rows(app)) == 2
    assert "_simulate" in keys(app)
    app.number_input(key="seq_len").set_value(512).run()
    assert len(rows(app)) == 4


def test_cancel_brings_the_button_back(open_app, queue) -> None:
    app = open_app(**GPT2, seq_len="103").button(key="_simulate").click().run()
    assert "_cancel_simulation" in keys(app)
    app.button(key="_cancel_simulation").click().run()
    app = finished(app, queue)
    assert "_simulate" in keys(app)
    assert len(rows(app)) == 2


@pytest.mark.parametrize("seq_len", ["101", "102", "104"])
def test_a_failure_is_one_line_with_another_try(open_app, queue, seq_len) -> None:
    app = finished(open_app(**GPT2, seq_len=seq_len).button(key="_simulate").click().run(), queue)
    assert not app.exception
    said = [box.value for box in app.warning if "simulation failed" in box.value]
    assert len(said) == 1
    assert "/srv" not in said[0]
    assert [button.label for button in app.button if button.key == "_simulate"] == ["Try again"]


def test_a_model_without_formulas_is_offered_the_simulation_which_then_decides(
    open_app, queue, monkeypatch
) -> None:
    def unknown(setup):
        return dataclasses.replace(estimate(setup), not_known=("activations",))

    monkeypatch.setattr(answers, "estimate", unknown)
    app = open_app(**GPT2)
    assert any("not known" in box.value for box in app.info)
    app = finished(app.button(key="_simulate").click().run(), queue)
    assert not any("is not known" in box.value for box in app.info)
    assert any("simulated peak" in box.value for box in (*app.success, *app.error, *app.warning))


@pytest.mark.parametrize(
    ("link", "word"),
    [
        ({"model": "params:7e9", "method": "full"}, "no step to simulate"),
        ({**GPT2, "precision": "textbook"}, "textbook"),
    ],
    ids=["bare", "textbook"],
)
def test_what_no_library_runs_offers_no_button(open_app, queue, link, word) -> None:
    app = open_app(**link)
    assert "_simulate" not in keys(app)
    assert any(word in caption.value for caption in app.caption)


def test_too_many_waiting_is_said(open_app, monkeypatch) -> None:
    made = Simulations(start=lambda: Worker(STAND_IN), most_waiting=0)
    use(monkeypatch, made)
    try:
        app = open_app(**GPT2).button(key="_simulate").click().run()
        assert any("simulations are waiting already" in box.value for box in app.warning)
    finally:
        made.close()
