"""The pages without a browser: first load, changed inputs, wrong links, impossible setups, own models."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from planner import catalog
from planner.advise import verdicts
from planner.dashboard import answers, grid as squares
from planner.dashboard.links import DEFAULTS
from planner.spec import METHODS, Setup

VERDICTS = ("fits", "tight", "does not fit", "not known", "whether it fits")
HOSTILE = {
    "nested": "[" * 100_000,
    "not a number": '{"model_type": "llama", "hidden_size": NaN}',
    "huge": json.dumps({"model_type": "llama", "hidden_size": 10**30, "num_hidden_layers": 32}),
    "many layers": json.dumps({"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 10**9}),
    "remote code": '{"model_type": "foo", "auto_map": {"AutoModel": "x.y"}}',
    "a path": '{"model_type": "../../etc/passwd"}',
    "a list": "[1]",
    "no JSON": "hello",
    "large": '{"a": "' + "x" * 2_000_000 + '"}',
}


def verdict(app) -> str:
    """The verdict's sentence, in lower case."""
    boxes = [*app.success, *app.warning, *app.error, *app.info]
    found = [
        box.value.replace("*", "") for box in boxes if box.value.replace("*", "").lower().startswith(VERDICTS)
    ]
    assert len(found) == 1, [box.value for box in boxes]
    return found[0].lower()


def change(app, **values: object):
    """Set inputs as a visitor does, and run again."""
    for name, value in values.items():
        app.session_state[name] = value
    return app.run()


def test_the_first_load_answers_without_a_click(open_app) -> None:
    app = open_app()
    assert not app.exception
    assert [title.value for title in app.title] == ["Does it fit?"]
    assert "rtx 4090" in verdict(app)
    assert [card.label for card in app.metric] == [
        "Predicted peak", "Measured peak", "Trainable parameters", "Largest micro batch",
    ]  # fmt: skip
    assert app.metric[0].value.endswith(" GiB")
    assert app.metric[1].value == "Not measured"


def test_the_inputs_are_the_fields_of_the_specification(open_app) -> None:
    app = open_app()
    setup = answers.setup_of({key: app.session_state[key] for key in ("model", "method", "gpu")})
    assert setup == Setup(model=DEFAULTS["model"], method=METHODS["lora"](), gpu=DEFAULTS["gpu"])
    for name in setup.to_dict():
        assert name in app.session_state, name


def test_a_peak_before_the_first_step_is_said_beside_the_bars(open_app) -> None:
    app = open_app()
    words = "The peak is before the first step"
    assert not any(words in caption.value for caption in app.caption)
    small = {"model": "meta-llama/Llama-3.2-1B", "method": "qlora", "seq_len": 128, "gpu": "t4"}
    change(app, **small, micro_batch_size=1, activation_checkpointing=True, precision="bf16")
    assert not app.exception
    assert sum(words in caption.value for caption in app.caption) == 1


def test_a_changed_input_changes_the_verdict(open_app) -> None:
    app = open_app()
    before = verdict(app)
    app.number_input(key="seq_len").set_value(8192).run()
    assert verdict(app) != before


def test_a_link_sets_the_inputs(open_app) -> None:
    app = open_app(
        v="1", model="openai-community/gpt2", method="adapter", adapter_size="32", seq_len="256", gpu="24GiB",
        precision="fp32", activation_checkpointing="true",
    )  # fmt: skip
    assert not app.warning
    assert "24gib" in verdict(app)
    assert app.number_input(key="adapter_size").value == 32
    assert app.toggle(key="activation_checkpointing").value is True
    assert app.selectbox(key="precision").value == "fp32"


def test_without_checkpoints_there_is_none_to_choose(open_app) -> None:
    app = open_app(activation_checkpointing="true", checkpoint_offload="true", checkpoint_every="2")
    assert not app.warning
    assert any("wait in pinned memory of the host" in note.value for note in app.caption)
    app = app.toggle(key="activation_checkpointing").set_value(False).run()
    assert not app.exception
    assert app.toggle(key="checkpoint_offload").value is False
    assert app.number_input(key="checkpoint_every").value == 1
    app = app.toggle(key="checkpoint_offload").set_value(True).run()
    assert any("turn that on" in box.value for box in app.error)


def test_a_wrong_link_warns_and_keeps_the_defaults(open_app) -> None:
    app = open_app(gpu="nonsense", seq_len="-5", method="lorra", precision="fp8", micro_batch="3")
    said = " ".join(box.value.replace("\\", "") for box in app.warning)
    for part in (
        "unknown GPU",
        "seq_len must be",
        "did you mean lora",
        "precision must be",
        "micro_batch_size",
    ):
        assert part in said
    assert "rtx 4090" in verdict(app)
    assert app.number_input(key="seq_len").value == 512
    app.number_input(key="seq_len").set_value(640).run()
    assert not [box for box in app.warning if "link" in box.value]


@pytest.mark.parametrize(
    "model", ["/etc/passwd", "../secret", "planner/dashboard", "nobody/nothing", "Llama"]
)
def test_an_unknown_model_is_refused_and_a_good_plan_is_shown(open_app, model, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    app = open_app(model=model)
    assert not app.exception
    assert len(app.error) == 1
    assert verdict(app) == verdict(open_app())
    assert any("last setup that made sense" in caption.value for caption in app.caption)


def test_an_impossible_setup_keeps_the_last_good_plan_marked(open_app) -> None:
    app = open_app(seq_len="256")
    before = verdict(app)
    app.number_input(key="lora_rank").set_value(5000).run()
    assert "lora_rank 5000 is above" in app.error[0].value.replace("\\", "")
    assert verdict(app) == before
    app.number_input(key="lora_rank").set_value(16).run()
    assert not app.error


def test_the_settings_of_a_hidden_method_come_back(open_app) -> None:
    app = open_app()
    app.number_input(key="lora_rank").set_value(32).run()
    app = change(app, method="full")
    assert "lora_rank" not in [one.key for one in app.number_input]
    app = change(app, method="lora")
    assert app.number_input(key="lora_rank").value == 32


def test_reset_brings_every_default_back(open_app) -> None:
    app = open_app()
    first = verdict(app)
    app = change(app, model="openai-community/gpt2", gpu="t4", seq_len=64, lora_rank=4, precision="fp32")
    assert verdict(app) != first
    app.button(key="_reset").click().run()
    assert verdict(app) == first
    assert not [name for name in app.query_params if name in METHODS["lora"].__dataclass_fields__]


@pytest.mark.parametrize("button", ["_reset", "_apply_0"])
def test_a_button_that_sets_inputs_takes_the_links_warnings_away(open_app, button: str) -> None:
    app = open_app(seq_len="-5", micro_batch_size="2")
    assert app.warning
    app.button(key=button).click().run()
    assert not [box for box in app.warning if "The link" in box.value]


def test_apply_sets_the_inputs_of_the_advice(open_app) -> None:
    app = open_app(seq_len="4096", gpu="t4", model="meta-llama/Llama-3.2-1B")
    before = app.metric[0].value
    app.button(key="_apply_0").click().run()
    assert not app.exception
    assert app.metric[0].value != before


def test_full_fine_tuning_that_does_not_fit_is_offered_a_way_out(open_app) -> None:
    app = open_app(method="full")
    assert verdict(app).startswith("does not fit")
    app.button(key="_apply_nearest").click().run()
    assert verdict(app).startswith("fits")


def test_a_bare_parameter_count_says_what_it_does_not_know(open_app) -> None:
    app = open_app(model="params:7e9", method="peft", trainable_params="4000000", precision="textbook")
    assert "not known" in verdict(app)
    assert app.metric[3].value == "Not known"
    assert app.session_state["method"] == "peft"


def test_a_config_json_of_ones_own_is_planned(open_app) -> None:
    config = catalog.catalogue_entry("openai-community/gpt2")["config"]
    app = open_app(model="openai-community/gpt2")
    peak = app.metric[0].value
    app = change(app, model=DEFAULTS["model"])
    assert app.metric[0].value != peak
    app = change(app, _config_text=json.dumps(config))
    assert not app.error
    assert app.metric[0].value == peak
    assert app.selectbox(key="model").disabled


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_config_json_ends_in_one_clear_line(open_app, name: str) -> None:
    app = change(open_app(), _config_text=HOSTILE[name])
    assert not app.exception
    assert len(app.error) == 1
    line = app.error[0].value
    assert len(line) < 400
    assert "Traceback" not in line
    assert "site-packages" not in line


def test_a_visitors_words_are_not_markup(open_app) -> None:
    app = open_app(gpu="[here](https://evil.example)")
    assert r"\[here\]\(" in app.warning[0].value


def test_paged_states_are_named_with_their_bytes(open_app) -> None:
    gpt2 = {"model": "openai-community/gpt2", "method": "full"}
    app = open_app(**gpt2, optimizer="paged-adamw-8bit", zero_grad="zero")
    assert not app.exception
    text = " ".join(one.value for one in app.markdown)
    assert "are paged by bitsandbytes" in text
    assert "To resume a task's run, its optimizer states take" in text
    assert app.selectbox(key="zero_grad").value == "zero"
    plain = open_app(**gpt2, optimizer="adamw-8bit")
    assert not any("paged by bitsandbytes" in one.value for one in plain.markdown)


def test_samples_are_held_as_the_sidebar_says(open_app) -> None:
    app = open_app(model="openai-community/gpt2", batching="packed", attention="flash")
    assert not app.exception
    assert app.selectbox(key="batching").value == "packed"
    app.selectbox(key="batching").set_value("padded").run()
    assert not app.exception
    assert not app.error
    app = open_app(model="tiiuae/falcon-7b", batching="padded", attention="flash")
    assert "known to take the padding out" in app.error[0].value
    app.selectbox(key="attention").set_value("sdpa").run()
    assert not app.exception
    assert not app.error


def test_the_method_page_puts_the_current_numbers_into_the_formulas(open_app) -> None:
    app = open_app(model="openai-community/gpt2")
    app.switch_page("planner/dashboard/method.py").run()
    assert not app.exception
    text = " ".join(one.value for one in app.markdown)
    assert "124,439,808 parameters" in text  # transformers, GPT2LMHeadModel of openai-community/gpt2
    assert "**83.3 %** less" in text  # the hand-worked example
    assert "70 GB" in text
    assert "14.04 GB" in text


@pytest.mark.parametrize("method", ["full", "lora", "qlora", "adapter", "bitfit"])
def test_every_model_of_the_catalogue_gets_a_verdict_or_a_clear_refusal(
    open_app, method, monkeypatch
) -> None:
    monkeypatch.setattr(
        squares, "axis", lambda name, current, limit=None: (current,)
    )  # the grid has its own tests
    monkeypatch.setattr(answers, "verdicts", lambda setup: verdicts(setup)[:2])
    app = open_app(method=method)
    for model in catalog.models():
        app = change(app, model=model)
        assert not app.exception, model
        assert len(app.metric) == 4, model
        if app.error and not app.error[0].value.startswith("**"):
            refusal = app.error[0].value.replace("\\", "")
            assert model in refusal, (model, refusal)
            assert any(known in refusal for known in REFUSALS), (model, refusal)
        else:
            assert verdict(app), model


REFUSALS = (
    "BitFit trains bias terms",
    "matches no linear layer",
    "beyond the",  # sequence longer than the model's positions
    "where bottleneck adapters go",
    "has no module",
    "finds nothing to quantize",  # Falcon: a linear class of its own
)


def test_the_pages_import_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\n"
        "from streamlit.testing.v1 import AppTest\n"
        "app = AppTest.from_file('app.py', default_timeout=60).run()\n"
        "app.switch_page('planner/dashboard/method.py').run()\n"
        "assert not app.exception\n"
        "print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert answer.stdout.strip() == "[]"
