"""What an adapter_config.json trains, by formula and by peft itself, tensor by tensor, at full size."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft.utils import constants
from torch import nn

from planner import catalog
from planner.estimate import peft_defaults
from planner.estimate.parameters import parameters, trained_tensors
from planner.estimate.peft_form import peft_form
from planner.estimate.traits import TRAITS
from planner.spec import PeftConfig, Setup
from planner.training.attach import attached
from planner.training.build import skeleton

MODELS = (
    "meta-llama/Llama-3.2-1B",
    "Qwen/Qwen2.5-0.5B",
    "Qwen/Qwen3-0.6B",
    "mistralai/Mistral-7B-v0.1",
    "google/gemma-2b",
    "google/gemma-2-2b",
    "google/gemma-3-1b-pt",
    "microsoft/phi-1_5",
    "EleutherAI/pythia-410m",
    "openai-community/gpt2-medium",
    "facebook/opt-125m",
    "bigscience/bloom-560m",
    "google-bert/bert-large-uncased",
    "FacebookAI/roberta-large",
    "mistralai/Mixtral-8x7B-v0.1",
)
LLAMA = MODELS[0]


@pytest.fixture(autouse=True)
def no_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """On `meta` there is nothing to initialize; skipping it saves time."""
    monkeypatch.setattr(nn.Linear, "reset_parameters", lambda self: None)


def default_configs() -> Iterator[tuple[str, dict[str, Any]]]:
    """Each method on each model for which peft knows its targets, without naming any."""
    for name in MODELS:
        family = catalog.model(name).architecture.family
        for kind, table in (("IA3", peft_defaults.IA3), ("LN_TUNING", peft_defaults.LN_TUNING)):
            if family in table:
                yield name, {"peft_type": kind}
        if family in peft_defaults.LORA and family != "mixtral":  # peft wants experts named
            yield name, {"peft_type": "LORA", "r": 4, "use_dora": True, "init_lora_weights": False}
        if catalog.model(name).task == "causal-lm":
            yield name, {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 7}
            if family not in ("bloom", "gemma2", "gemma3_text"):
                yield name, {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 7}


IA3 = {"peft_type": "IA3"}
LORA = {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj", "v_proj"]}
OPTIONS: list[dict[str, Any]] = [
    {"target_modules": "all-linear"},
    {"target_modules": "ALL-LINEAR", "exclude_modules": ["down_proj"]},
    {"target_modules": r".*layers\.(1|2)\.self_attn\.(q|k)_proj"},
    {"target_modules": r"layers\.1\.self_attn\.q_proj|.*o_proj", "exclude_modules": r".*layers\.0\..*"},
    {"target_modules": ["q_proj", "embed_tokens"]},
    {"target_modules": ["model.layers.3.mlp.up_proj", "o_proj"], "layers_to_transform": 2},
    {"layers_to_transform": [0, 5], "layers_pattern": "layers"},
    {"layers_to_transform": [0, 5], "layers_pattern": ["blocks", "layers"]},
    {"layers_to_transform": []},
    {"rank_pattern": {"q_proj": 2, r"layers\.[0-3]\..*v_proj": 3}, "alpha_pattern": {"q_proj": 1}},
    {"rank_pattern": {"^model.layers.0.self_attn.q_proj": 5}},
    {"modules_to_save": ["lm_head"]},
    {"modules_to_save": ["embed_tokens", "lm_head"], "use_dora": True},
    {"target_modules": "all-linear", "modules_to_save": ["norm"]},
    {"use_rslora": True, "use_dora": True, "init_lora_weights": "gaussian"},
]


def assert_same(name: str, config: dict[str, Any]) -> None:
    model = catalog.model(name)
    method = PeftConfig(peft_config_json=json.dumps(config))
    setup = Setup(model=model, method=method)
    assert peft_form(model, method) is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = attached(skeleton(model, dtype=torch.bfloat16), model, method, low_memory=True)
    shapes: Counter[tuple[tuple[int, ...], int]] = Counter()
    for tensor in trained_tensors(setup):
        shapes[tensor.shape, tensor.element_bytes] += tensor.count
    trained = [p for p in net.parameters() if p.requires_grad]
    assert shapes == Counter((tuple(p.shape), p.element_size()) for p in trained)
    counted = parameters(setup)
    total = sum(p.numel() for p in net.parameters())
    assert (counted.total, counted.trainable) == (total, sum(p.numel() for p in trained))


@pytest.mark.parametrize(("name", "config"), list(default_configs()), ids=str)
def test_a_method_with_pefts_defaults_trains_what_peft_trains(name: str, config: dict[str, Any]) -> None:
    assert_same(name, config)


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_loras_options_train_what_peft_trains(option: dict[str, Any]) -> None:
    assert_same(LLAMA, LORA | option)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        (LLAMA, IA3 | {"target_modules": ["q_proj", "up_proj"], "feedforward_modules": ["up_proj"]}),
        (LLAMA, IA3 | {"target_modules": ".*(k|down)_proj", "feedforward_modules": ".*down_proj"}),
        (LLAMA, IA3 | {"target_modules": ["k_proj"], "feedforward_modules": []}),
        (LLAMA, {"peft_type": "LN_TUNING", "target_modules": ["norm"], "modules_to_save": ["lm_head"]}),
        (MODELS[2], {"peft_type": "LN_TUNING", "target_modules": ["q_norm", "k_norm"]}),
        (MODELS[8], {"peft_type": "LN_TUNING", "target_modules": ["input_layernorm"]}),
        (MODELS[9], {"peft_type": "LORA", "target_modules": ["c_attn"], "bias": "all", "use_dora": True}),
        (MODELS[9], {"peft_type": "LORA", "target_modules": ["c_attn"], "bias": "lora_only"}),
    ],
    ids=str,
)
def test_what_a_configuration_names_is_what_peft_trains(name: str, config: dict[str, Any]) -> None:
    assert_same(name, config)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (peft_defaults.LORA, constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING),
        (peft_defaults.IA3, constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING),
        (peft_defaults.FEEDFORWARD, constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING),
        (peft_defaults.LN_TUNING, constants.TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING),
    ],
    ids=["lora", "ia3", "feedforward", "ln_tuning"],
)
def test_default_targets_are_pefts(ours: dict[str, tuple[str, ...]], theirs: dict[str, list[str]]) -> None:
    families = set(TRAITS) | set(ours)
    assert ours == {name: tuple(targets) for name, targets in theirs.items() if name in families}
