"""Every method on the Plan page: nothing before it is asked for, predicted at once, simulated one by one."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from planner.advise import method_table
from planner.advise.default_methods import default_methods
from planner.dashboard import every_method, simulating
from planner.dashboard.simulations import Simulations
from planner.dashboard.worker import Worker
from planner.report import PARTS
from planner.spec import Setup

STAND_IN = [sys.executable, str(Path(__file__).parent / "stand_in_worker.py")]
GPT2 = {"model": "openai-community/gpt2", "gpu": "t4"}
SWITCH, BUTTON, STOP = "_every_method", "_every_method_simulate", "_every_method_stop"


@pytest.fixture
def queue(monkeypatch) -> Iterator[Simulations]:
    """The page's queue, before a stand-in process whose reports are the formulas' own."""
    made = Simulations(start=lambda: Worker(STAND_IN), time_limit_s=20)
    monkeypatch.setattr(simulating, "simulations", lambda: made)
    monkeypatch.setattr(simulating, "_visitor", lambda: simulating._Visitor("anna", made))
    yield made
    made.close()


def tables(app) -> list[str]:
    return [each.proto.body for each in app.get("html") if "Every method" in each.proto.body]


def keys(app) -> list[str]:
    return [button.key for button in app.button]


def test_nothing_is_computed_before_it_is_asked_for(open_app, queue, monkeypatch) -> None:
    monkeypatch.setattr(every_method, "method_table", lambda *_: pytest.fail("it was computed"))
    app = open_app(**GPT2)
    assert not app.exception
    assert tables(app) == []
    assert BUTTON not in keys(app)


def test_the_switch_shows_what_the_formulas_know(open_app, queue) -> None:
    app = open_app(**GPT2).toggle(key=SWITCH).set_value(True).run()
    assert not app.exception
    (table,) = tables(app)
    assert table.index("Adapters, Pfeiffer") < table.index("Full fine-tuning") < table.index("VeRA, r = 256")
    assert "predicted" in table
    assert "simulated" not in table
    assert any("trainable parameters" in text.value for text in app.markdown)
    assert BUTTON in keys(app)


def test_every_method_is_simulated_in_turn_and_the_button_goes(open_app, queue) -> None:
    app = open_app(**GPT2).toggle(key=SWITCH).set_value(True).run()
    app = app.button(key=BUTTON).click().run()
    assert STOP in keys(app)
    for _ in range(400):
        if STOP not in keys(app):
            break
        app.run()
        time.sleep(0.02)
    assert not app.exception
    (table,) = tables(app)
    assert "predicted" not in table
    assert table.count("simulated") >= 7  # where the stand-in's formulas know all parts
    assert BUTTON not in keys(app)
    app.number_input(key="seq_len").set_value(64).run()
    assert BUTTON in keys(app)


def test_stop_ends_it_and_offers_the_rest(open_app, queue) -> None:
    app = open_app(**GPT2, seq_len="103").toggle(key=SWITCH).set_value(True).run()  # the stand-in hangs
    app = app.button(key=BUTTON).click().run()
    assert STOP in keys(app)
    app = app.button(key=STOP).click().run()
    assert not app.exception
    assert BUTTON in keys(app)
    assert STOP not in keys(app)


def test_a_failed_method_is_said_with_its_reason(open_app, queue) -> None:
    app = open_app(**GPT2, seq_len="104").toggle(key=SWITCH).set_value(True).run()
    app = app.button(key=BUTTON).click().run()
    for _ in range(400):
        if STOP not in keys(app):
            break
        app.run()
        time.sleep(0.02)
    assert sum("Without LoRA, r = 8" in caption.value for caption in app.caption) == 1
    assert "/srv" not in "".join(caption.value for caption in app.caption)


def test_the_file_has_every_part_in_bytes() -> None:
    setup = Setup(model="openai-community/gpt2")
    table = method_table(setup)
    head, *lines = every_method.table_csv(table).splitlines()
    assert head.split(",")[-len(PARTS) :] == [f"{name}_bytes" for name in PARTS]
    assert len(lines) == len(table.rows)
    assert len(table.rows) + len(table.left_out) == len(default_methods(setup))
