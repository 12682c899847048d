"""Kernels asked for by name: refused in the setup exactly where torch's own choice takes none of them."""

from __future__ import annotations

import itertools
import json
from importlib import import_module
from random import Random
from typing import Any

import pytest

from planner import attention as kernels, spec
from planner.advise.changes import changes
from planner.advise.limits import grid, largest_seq_len, verdicts
from planner.catalog.gpus import gpus
from planner.compare import full_of
from planner.errors import SetupError, TraceError
from planner.estimate.traits import TRAITS
from planner.simulate import simulate
from planner.spec import LoRA, PeftConfig, QLoRA, Setup, Training
from tests.estimate.shapes import shortened

PREFIX, PROMPT = (
    PeftConfig(peft_config_json=f'{{"num_virtual_tokens": {count}, "peft_type": "{kind}"}}')
    for kind, count in (("PREFIX_TUNING", 8), ("PROMPT_TUNING", 30))
)
MODELS = [  # heads of 64, 256, 96 and 80; key heads shared, or a single one; windows; a mask always there
    *("openai-community/gpt2", "meta-llama/Llama-3.2-1B", "google/gemma-2b", "google/gemma-3-1b-pt"),
    *("microsoft/phi-2", "microsoft/Phi-3-mini-4k-instruct", "tiiuae/falcon-7b", "tiiuae/falcon-40b"),
]
CARDS = ["v100-16gb", "t4", "a100-40gb", "rtx-4090", "h200", "b200"]
ALL = list(
    itertools.product(
        MODELS,
        [None, LoRA(), QLoRA(), PREFIX, PROMPT],
        CARDS,
        ["flash", "efficient", "cudnn"],
        ["fp32", "bf16", "fp16", "bf16-mixed", "fp16-mixed"],
        [64, 512, 2020],
    )
)


@pytest.mark.parametrize("number", range(8))
def test_refused_where_no_kernel_takes_the_step(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample of all that may be asked for."""
    check = kernels.check_kernel
    for module in (spec, import_module("planner.simulate.run")):
        monkeypatch.setattr(module, "check_kernel", lambda *_, **__: None)
    answers = set()
    for model, method, card, attention, precision, seq_len in Random(number).sample(ALL, 30):
        training = {"attention": attention, "precision": precision, "seq_len": seq_len}
        try:
            setup = Setup(model=shortened(model, 1), method=method, training=Training(**training), gpu=card)
        except SetupError:
            continue  # for a reason of its own
        early = _refusal(lambda setup=setup: check(setup.model, setup.method, setup.training, setup.gpu))
        late = _refusal(lambda setup=setup: simulate(setup, steps=1))
        assert bool(early) == bool(late), (early, late, setup)
        answers.add(bool(early))
    assert answers == {False, True}


def _refusal(run: Any) -> str:
    try:
        run()
    except (SetupError, TraceError) as error:
        return str(error)
    return ""


LLAMA, GEMMA3 = "meta-llama/Llama-3.2-1B", "google/gemma-3-1b-pt"
REFUSED = [
    (LLAMA, "t4", {"attention": "efficient"},
     "attention efficient needs capability 8.0 for bfloat16, t4 has 7.5; choose attention sdpa or eager."),
    (LLAMA, "t4", {"attention": "cudnn", "precision": "fp16"},
     "attention cudnn needs capability 8.0, t4 has 7.5; choose attention sdpa, efficient or eager."),
    ("google/gemma-2b", "a100-40gb", {"attention": "cudnn", "precision": "fp16"},
     "attention cudnn takes heads of a multiple of 8 up to 128 on a100-40gb, google/gemma-2b has 256; choose "
     "attention sdpa, efficient or eager."),
    (GEMMA3, None, {"attention": "flash", "precision": "fp16", "seq_len": 512},
     "attention flash takes no mask, and google/gemma-3-1b-pt has one here: 512 tokens reach its sliding "
     "window of 512; choose attention sdpa, efficient or eager."),
    ("tiiuae/falcon-7b", None, {"attention": "efficient"},
     "attention efficient takes as many key heads as heads, tiiuae/falcon-7b has a single one and does not "
     "repeat it; choose attention sdpa or eager."),
]  # fmt: skip


@pytest.mark.parametrize(("model", "card", "training", "words"), REFUSED)
def test_the_refusal_says_what_is_there_and_what_to_do(
    model: str, card: str | None, training: dict[str, Any], words: str
) -> None:
    with pytest.raises(SetupError) as refusal:
        Setup(model=model, gpu=card, training=Training(**{"precision": "bf16", **training}))
    assert str(refusal.value) == words


def test_a_prefix_is_a_mask() -> None:
    with pytest.raises(SetupError, match="PREFIX_TUNING puts keys before the queries"):
        Setup(model=LLAMA, method=PREFIX, training=Training(attention="flash"))


def test_families_that_always_make_a_mask_are_those_of_the_formulas() -> None:
    always = {name for name, traits in TRAITS.items() if traits.always_masked}
    named = {*kernels._ALWAYS_MASKED, *kernels._BIASED}
    assert always == named & set(TRAITS)


def test_cards_that_have_no_such_kernel_are_none_that_fit() -> None:
    setup = Setup(model=LLAMA, training=Training(attention="flash"), gpu="a100-40gb")
    cards = {card.name for card, _ in verdicts(setup)}
    old = {card.name for card in gpus() if card.capability and card.capability < (8, 0)}
    assert "t4" in old
    assert cards == {card.name for card in gpus()} - old


def test_the_longest_sequence_ends_where_the_kernel_takes_no_more() -> None:
    setup = Setup(
        model=GEMMA3, training=Training(attention="flash", seq_len=64), method=LoRA(), gpu="a100-40gb"
    )
    assert largest_seq_len(setup) == 511
    ((short, long),) = grid(setup, [1], [256, 1024])
    assert short.verdict is not None
    assert long.verdict is None


def test_full_fine_tuning_beside_a_method_goes_without_the_kernel_where_it_must() -> None:
    t5 = Setup(model="google-t5/t5-base", method=LoRA(), training=Training(attention="cudnn"), gpu="h200")
    assert full_of(t5).training.attention == "sdpa"
    llama = Setup(model=LLAMA, method=LoRA(), training=Training(attention="cudnn"), gpu="h200")
    assert full_of(llama).training.attention == "cudnn"


def test_a_change_that_would_be_refused_is_not_advised() -> None:
    """A checkpoint asks for the gradient of T5's biases, which cuDNN does not give (sdp_utils.cpp)."""
    checkpoints = {}
    for attention in ("sdpa", "cudnn"):
        training = Training(micro_batch_size=8, attention=attention)
        found = changes(Setup(model="google-t5/t5-base", method=LoRA(), gpu="h200", training=training))
        checkpoints[attention] = any("activation_checkpointing" in change.keys for change in found)
    assert checkpoints == {"sdpa": True, "cudnn": False}


@pytest.mark.parametrize(
    ("model", "values", "words"),
    [
        (
            "facebook/opt-350m",
            {"peft_type": "P_TUNING"},
            "1,024 wide, and the embeddings of",
        ),
        ("tiiuae/falcon-7b", {"peft_type": "PREFIX_TUNING"}, "which has a single key head"),
        ("google-bert/bert-base-uncased", {"peft_type": "PROMPT_TUNING"}, "is neither; choose lora"),
        ("google-t5/t5-base", {"peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM"}, "SEQ_2_SEQ_LM"),
    ],
)
def test_prompts_that_would_fail_in_the_first_forward_pass_are_refused(
    model: str, values: dict[str, Any], words: str
) -> None:
    method = PeftConfig(peft_config_json=json.dumps({"num_virtual_tokens": 8, **values}))
    with pytest.raises(SetupError, match=words) as refusal:
        Setup(model=model, method=method)
    assert "\n" not in str(refusal.value)


def test_a_width_that_is_no_number_is_left_to_peft() -> None:
    values = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 8, "token_dim": "wide"}
    setup = Setup(model=LLAMA, method=PeftConfig(peft_config_json=json.dumps(values)))
    with pytest.raises(SetupError, match="peft"):
        simulate(setup, steps=1)
