"""The formulas of the page Method: each optimizer has its own, and results are the report's."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from planner.dashboard.formulas import terms
from planner.estimate import estimate
from planner.optimizers import Optimizer
from planner.spec import Setup, Training
from planner.units import gib

GPT2 = "openai-community/gpt2"
WORDS = {
    "adamw": "two moments",
    "adamw-fused": "two moments",
    "adamw-single": "two moments",
    "adamw-8bit": "an fp32 scale for each 256",
    "paged-adamw-8bit": "are paged",
    "adafactor": "by rows and by columns",
    "sgd": "keeps no state",
    "sgd-momentum": "One momentum",
    "lion-8bit": "an fp32 scale for each 256",
    "paged-adamw-32bit": "2 fp32 states each",
    "lion-32bit": "1 fp32 state each",
    "paged-lion-8bit": "are paged",
    "paged-lion-32bit": "are paged",
}


@pytest.mark.parametrize("optimizer", get_args(Optimizer))
def test_each_optimizer_has_its_formula(optimizer: Any) -> None:
    setup = Setup(model=GPT2, training=Training(optimizer=optimizer))
    report = estimate(setup)
    found = {term.part: term for term in terms(setup, report)}
    states, step = found["optimizer_states"], found["temporaries"]
    assert WORDS[optimizer] in states.numbers
    assert states.result == gib(report.parts.optimizer_states)
    assert f"in the step of {optimizer} " in step.numbers
    for term in (states, step):
        assert term.formula.count("{") == term.formula.count("}")
        assert term.source


@pytest.mark.parametrize(
    ("loss", "precision", "words"),
    [
        ("full", "bf16", "b s v = 4 x 1,024 x 151,936"),
        ("chunked", "bf16", "n v = 1,024 x 151,936"),
        ("liger", "bf16", "n v = 32 x 151,936, 2 bytes each"),  # 4,096 tokens in 170 pieces: 25, so 32
        ("liger", "fp32", "n v = 32 x 151,936, 4 bytes each"),
        ("liger", "bf16-mixed", "n v = 32 x 151,936, 2 bytes each"),
    ],
)
def test_each_loss_has_its_formula(loss: Any, precision: Any, words: str) -> None:
    training = Training(micro_batch_size=4, seq_len=1024, loss=loss, precision=precision)
    setup = Setup(model="Qwen/Qwen2.5-0.5B", training=training)
    report = estimate(setup)
    (row,) = (term for term in terms(setup, report) if term.part == "logits_and_loss")
    assert words in row.numbers
    assert row.formula.count("{") == row.formula.count("}")
    assert row.source


def test_what_is_paged_is_named_with_its_size() -> None:
    setup = Setup(model=GPT2, training=Training(optimizer="paged-adamw-8bit"))
    report = estimate(setup)
    (states,) = (term for term in terms(setup, report) if term.part == "optimizer_states")
    assert gib(report.provenance["paged_bytes"]) in states.numbers
    assert gib(report.provenance["paged_bytes"]) in report.notes[0]


def test_states_that_follow_from_shapes_are_not_known_of_a_number() -> None:
    setup = Setup(model="params:7e9", training=Training(optimizer="adafactor"))
    (states,) = (term for term in terms(setup, estimate(setup)) if term.part == "optimizer_states")
    assert states.result == "not known"


@pytest.mark.parametrize(
    "training, mask",
    [
        ({}, ""),
        ({"batching": "padded"}, "Samples are padded: attention has a mask of 4 x 512 x 512."),
        ({"batching": "packed"}, "Samples are packed: attention has a mask of 1 x 2,048 x 2,048."),
        ({"batching": "packed", "attention": "flash"}, ""),
    ],
)
def test_a_mask_of_the_batch_is_named_with_its_shape(training: dict[str, Any], mask: str) -> None:
    setup = Setup(model=GPT2, training=Training(micro_batch_size=4, **training))
    (found,) = (term for term in terms(setup, estimate(setup)) if term.part == "activations")
    assert ("mask" in found.numbers) == bool(mask)
    assert found.numbers.endswith(mask)
