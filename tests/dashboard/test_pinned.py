"""Pinned setups: in the link and back, side by side, taken away; the files that the page packs."""

from __future__ import annotations

import csv
import io
import json
import zipfile

import pytest

from planner import catalog
from planner.dashboard.answers import setup_of
from planner.dashboard.links import PINS, link, link_problems, pin_text, pin_values
from planner.dashboard.packed import packed
from planner.dashboard.pinned import column, compared_csv, compared_table
from planner.errors import SetupError
from planner.estimate import estimate
from planner.export import exported
from planner.report import PARTS
from planner.spec import METHODS, FullFineTuning, LoRA, Setup, Training
from planner.units import gib
from tests.dashboard.test_links import flat

GPT2 = "model:openai-community/gpt2~method:lora~gpu:t4~lora_rank:16"
BERT = "model:google-bert/bert-base-uncased~method:full~gpu:24GiB~seq_len:128"
OPT = "model:facebook/opt-125m~method:bitfit~gpu:l4"


@pytest.mark.parametrize("method", METHODS)
def test_a_pin_brings_every_value_back(method: str) -> None:
    asked = flat(method)
    text = pin_text(asked)
    assert pin_values(text) == asked
    assert link_problems({"pin_1": [text]}) == {}
    assert setup_of(pin_values(text)) == setup_of(asked)


def test_a_pin_holds_only_what_is_not_the_page_s_default_and_stays_readable_in_a_link() -> None:
    assert pin_text(pin_values(GPT2)) == GPT2
    assert pin_text(pin_values(GPT2 + "~seq_len:512~precision:bf16")) == GPT2
    address = link("http://planner.example", {"model": "gpt2", "pin_1": GPT2})
    assert address == f"http://planner.example?v=1&model=gpt2&pin_1={GPT2}"


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "needs a model and a method"),
        ("model:gpt2", "needs a model and a method"),
        ("model:gpt2~method:lorra", "did you mean lora, qlora?"),
        ("model:params:7e9~method:lora", "number of parameters"),
        ("model:gpt2~method:lora~gpu:nonsense", "unknown GPU"),
        ("model:gpt2~method:lora~lora_rank:-1", "at least 1"),
        ("model:gpt2~method:full~lora_rank:8", "no setting 'lora_rank'"),
        ("model:gpt2~method:full~seq_len", "must be a number"),
        ("model:gpt2~method:full~pin_1:x", "no setting 'pin_1'"),
        ("model:gpt2~method:full~precision:fp8", "must be one of"),
        ("model:gpt2~method:full~" + "x" * 1000, "too long"),
    ],
)
def test_a_wrong_pin_is_named_in_one_line(text: str, says: str) -> None:
    with pytest.raises(SetupError, match=says):
        pin_values(text)
    problems = link_problems({"pin_2": [text]})
    assert list(problems) == ["pin_2"]
    assert says in problems["pin_2"]
    assert "\n" not in problems["pin_2"]


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", "100001", "", "\N{SUPERSCRIPT TWO}"])
def test_a_wrong_number_of_tasks_is_named(text: str) -> None:
    assert "whole number from 1 to 100,000" in link_problems({"tasks": [text]})["tasks"]
    assert link_problems({"tasks": ["7"]}) == {}


def test_the_table_and_the_file_say_what_the_reports_say() -> None:
    training = Training(seq_len=128)
    setups = [
        Setup(model="gpt2", method=LoRA(), training=training, gpu="t4"),
        Setup(model="gpt2", method=FullFineTuning(), training=training),
    ]
    columns = [column("This setup", setups[0]), column("Pin 1", setups[1])]
    table = compared_table(columns)
    for setup in setups:
        assert gib(estimate(setup).peak_allocated_bytes) in table
    assert "Sequence length" not in table, "a setting that is the same everywhere"
    assert "Rank r" not in table, "one of them has it"
    lines = {line[0]: line[1:] for line in csv.reader(io.StringIO(compared_csv(columns)))}
    assert lines[""] == ["This setup", "Pin 1"]
    assert lines["seq_len"] == ["128", "128"]
    assert lines["lora_rank"] == ["8", ""]
    assert lines["verdict"] == ["fits", ""]
    for part in PARTS:
        assert lines[f"{part}_bytes"] == [str(getattr(one.report.parts, part)) for one in columns]
    sums = [sum(int(lines[f"{part}_bytes"][at]) for part in PARTS) for at in (0, 1)]
    assert [int(peak) for peak in lines["peak_allocated_bytes"]] == sums


def test_pin_plan_another_compare_and_unpin(open_app) -> None:
    app = open_app(seq_len="256")
    assert "Side by side" not in [one.value for one in app.subheader]
    first = app.metric[0].value
    app.button(key="_pin").click().run()
    assert not app.exception
    assert app.button(key="_pin").disabled, "pinned already"
    app.session_state["method"] = "full"
    app.run()
    assert "Side by side" in [one.value for one in app.subheader]
    assert any(
        first in one.value.replace("\\", "") for one in app.markdown if one.value.startswith("**Pin 1")
    )
    assert app.query_params["pin_1"] == "model:meta-llama/Llama-3.1-8B~method:lora~gpu:rtx-4090~seq_len:256"
    app.button(key="_plan_1").click().run()
    assert app.session_state["method"] == "lora"
    assert app.metric[0].value == first
    app.button(key="_unpin_1").click().run()
    assert "Side by side" not in [one.value for one in app.subheader]
    assert not set(app.query_params) & set(PINS)


def test_pins_come_from_the_link_and_three_are_the_most(open_app) -> None:
    app = open_app(pin_1=GPT2, pin_2=BERT, pin_3=OPT)
    assert not app.warning or not any("The link" in box.value for box in app.warning)
    assert app.button(key="_pin").disabled
    found = [one.value.replace("\\", "") for one in app.markdown if one.value.startswith("**Pin ")]
    assert [text.split(",")[0] for text in found] == [
        "**Pin 1.** openai-community/gpt2",
        "**Pin 2.** google-bert/bert-base-uncased",
        "**Pin 3.** facebook/opt-125m",
    ]
    app.button(key="_unpin_2").click().run()
    assert [app.query_params[key] for key in ("pin_1", "pin_2")] == [GPT2, OPT]
    assert "pin_3" not in app.query_params
    assert not app.button(key="_pin").disabled
    app.button(key="_reset").click().run()
    assert app.query_params["pin_1"] == GPT2, "Reset is for the inputs"


def test_a_wrong_pin_is_warned_of_and_one_that_makes_no_sense_can_be_taken_away(open_app) -> None:
    app = open_app(
        pin_1="model:gpt2~method:lorra", pin_2="model:openai-community/gpt2~method:full~seq_len:5000"
    )
    assert "did you mean lora" in " ".join(box.value for box in app.warning)
    said = [one.value.replace("\\", "") for one in app.markdown if one.value.startswith("**Pin 1")]
    assert "beyond the 1,024 positions" in said[0]
    app.button(key="_unpin_1").click().run()
    assert not app.exception
    assert not set(app.query_params) & set(PINS)


def test_what_makes_no_sense_and_an_own_config_cannot_be_pinned(open_app) -> None:
    app = open_app()
    app.number_input(key="lora_rank").set_value(5000).run()
    assert app.button(key="_pin").disabled
    app.number_input(key="lora_rank").set_value(8).run()
    assert not app.button(key="_pin").disabled
    app.session_state["_config_text"] = json.dumps(catalog.catalogue_entry("openai-community/gpt2")["config"])
    app.run()
    assert not app.error
    assert app.button(key="_pin").disabled


def test_the_number_of_tasks_is_in_the_link(open_app) -> None:
    app = open_app(tasks="12")
    assert app.number_input(key="tasks").value == 12
    assert any("12 full copies" in one.value for one in app.markdown)
    app.switch_page("planner/dashboard/method.py").run()
    assert any("&tasks=12" in code.value for code in app.code)
    app.switch_page("planner/dashboard/plan.py").run()
    assert app.number_input(key="tasks").value == 12
    bad = open_app(tasks="0")
    assert bad.number_input(key="tasks").value == 5
    assert any("tasks must be" in box.value for box in bad.warning)


def test_a_zip_is_the_same_bytes_every_time_and_unpacks_into_one_folder(tmp_path) -> None:
    files = exported(Setup(model="gpt2", method=LoRA()))
    data = packed(files)
    assert packed(dict(reversed(files.items()))) == data
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        assert {name: archive.read(name).decode() for name in archive.namelist()} == {
            f"vram-plan/{name}": text for name, text in files.items()
        }
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_the_page_offers_the_script_where_there_is_one(open_app) -> None:
    app = open_app()
    (button,) = [one for one in app.get("download_button") if one.proto.label == "Training script"]
    assert not button.proto.disabled
    bare = open_app(model="params:7e9", method="peft", trainable_params="4000000")
    (button,) = [one for one in bare.get("download_button") if one.proto.label == "Training script"]
    assert button.proto.disabled
    assert "no layers to run" in button.proto.help
