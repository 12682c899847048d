"""What the estimate does not know it names, and counts as 0."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from planner import catalog
from planner.estimate import estimate
from planner.report import PARTS, MemoryReport
from planner.spec import LoRA, PeftConfig, PeftOfSize, Setup, Training
from planner.units import MIB

MODEL = catalog.model("Qwen/Qwen3-0.6B")


def _named(report: MemoryReport) -> None:
    assert report.notes
    assert all(getattr(report.parts, part) == 0 for part in report.not_known)
    assert report.peak_allocated_bytes == sum(getattr(report.parts, part) for part in PARTS)


def test_an_architecture_without_formulas_leaves_activations_to_the_simulation() -> None:
    model = dataclasses.replace(MODEL, architecture=None)
    report = estimate(Setup(model=model, method=LoRA(target_modules=("q_proj",))))
    assert report.not_known == ("activations", "logits_and_loss", "temporaries")
    assert "simulate" in report.notes[0]
    assert report.parts.adapter_weights > 0
    assert report.parts.workspace > 0
    _named(report)


def test_a_family_whose_layers_are_not_described_is_not_guessed() -> None:
    shape = MODEL.architecture
    assert shape is not None
    model = dataclasses.replace(MODEL, architecture=dataclasses.replace(shape, family="unheard_of"))
    assert estimate(Setup(model=model)).not_known == ("activations", "logits_and_loss", "temporaries")


def test_a_method_known_by_its_size_has_weights_gradients_and_states() -> None:
    report = estimate(Setup(model=MODEL, method=PeftOfSize(trainable_params=25 * MIB)))
    assert report.parts.adapter_weights == report.parts.gradients == 4 * 25 * MIB
    assert report.parts.optimizer_states == 8 * 25 * MIB
    assert "activations" in report.not_known


@pytest.mark.parametrize(
    "config",
    [
        {"peft_type": "VERA"},
        {"peft_type": "LORA", "target_modules": ["q_proj"], "init_lora_weights": "pissa"},
        {"peft_type": "LORA", "target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 3]]},
        {"peft_type": "LORA", "target_modules": ["q_proj"], "some_option_of_tomorrow": 1},
        {"peft_type": "LORA", "target_modules": ["no_such_layer"]},
        {"peft_type": "LORA", "target_modules": ["q_proj"], "modules_to_save": ["mlp"]},
        {"peft_type": "LN_TUNING", "target_modules": ["q_proj"]},
        {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4, "prefix_projection": True},
        {"peft_type": "PROMPT_TUNING"},
    ],
    ids=str,
)
def test_what_a_peft_configuration_asks_beyond_the_formulas_is_left_to_the_simulation(
    config: dict[str, Any],
) -> None:
    method = PeftConfig(peft_config_json=json.dumps(config))
    report = estimate(Setup(model=MODEL, method=method))
    assert {"adapter_weights", "gradients", "optimizer_states", "activations"} <= set(report.not_known)
    _named(report)


def test_a_mixture_of_experts_says_what_its_router_can_change() -> None:
    """Gate and up [n, 2 x 14,336] and the answer [n, 4,096] in bf16: n = 4,096 x 2 / 8 tokens, or all."""
    setup = Setup(model="mistralai/Mixtral-8x7B-v0.1", method=LoRA(), training=Training(seq_len=4096))
    (note,) = estimate(setup).notes
    row_bytes = (2 * 14_336 + 4_096) * 2
    assert "8,192 token-expert pairs" in note
    assert f"from {1024 * row_bytes / MIB:.1f} MiB (1,024 tokens, even)" in note
    assert f"to {4096 * row_bytes / MIB:.1f} MiB (all 4,096 tokens)" in note


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_phases_end_where_the_next_begins(precision: str) -> None:
    report = estimate(
        Setup(model=MODEL, training=Training(precision=precision, micro_batch_size=2, seq_len=256))
    )
    names = [(phase.name, phase.step) for phase in report.phases]
    assert names == [
        ("load", None),
        ("attach", None),
        *[(name, step) for step in (1, 2) for name in ("forward", "backward", "optimizer_step")],
    ]
    assert all(phase.peak_allocated_bytes >= phase.allocated_bytes for phase in report.phases)
    assert max(p.peak_allocated_bytes for p in report.phases) == report.peak_allocated_bytes
