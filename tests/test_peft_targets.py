"""The rule for a peft file's names and patterns beside peft's own."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from planner.peft_targets import file_adapts_experts, file_adapts_head, file_matches
from planner.spec import PeftConfig
from planner.training.run import TrainingRun
from tests.simulate.small import LLAMA, model_of, setup_of
from tests.training.test_liger_kernels import MODELS, _no_phases

MODULES = [  # of several models
    "lm_head",
    "model.embed_tokens",
    "model.norm",
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.11.mlp.down_proj",
    "transformer.h.1.attn.c_attn",
]
NAMES = st.sampled_from(
    ["q_proj", "down_proj", "lm_head", "c_attn", "proj", "layers.1.self_attn.q_proj", "model.embed_tokens"]
)
PATTERNS = st.sampled_from(
    [r".*\.(q|down)_proj", r"lm_head", r".*", r"model\.layers\.1\..*", r"q_proj", r".*(q_proj|lm_head)"]
)
LISTS = st.lists(NAMES, min_size=1, max_size=3)
FILES = st.fixed_dictionaries(
    {"target_modules": LISTS | PATTERNS},
    optional={
        "exclude_modules": LISTS | PATTERNS,
        "modules_to_save": st.lists(st.sampled_from(["lm_head", "embed_tokens", "norm"]), max_size=2),
        "layers_to_transform": st.integers(0, 11) | st.lists(st.sampled_from([0, 1, 11]), max_size=2),
        "layers_pattern": st.sampled_from(["layers", "h", ["layers", "h"]]),
    },
)


@given(values=FILES, module=st.sampled_from(MODULES))
@settings(max_examples=400, deadline=None)
def test_a_module_is_meant_where_peft_says_so(values: dict[str, Any], module: str) -> None:
    if isinstance(values["target_modules"], str):  # peft refuses layers beside a pattern
        values = {k: v for k, v in values.items() if not k.startswith("layers_")}
    if values.get("layers_to_transform") is None:  # and a pattern of layers without layers
        values = {k: v for k, v in values.items() if k != "layers_pattern"}
    theirs = bool(check_target_module_exists(LoraConfig(**values), module))
    assert file_matches(module, values, values["target_modules"]) == theirs


EXPERT_FILES: list[tuple[str, dict[str, Any], bool]] = [
    ("mixtral", {"target_modules": "all-linear"}, True),
    ("mixtral", {"target_modules": ["q_proj", "w1", "w3"]}, True),
    ("mixtral", {"target_modules": ["q_proj", "gate"]}, False),  # the router alone
    ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}, True),
    ("qwen3_moe", {"target_modules": r".*\.(up|gate)_proj"}, True),
    ("qwen3_moe", {"target_modules": r".*self_attn\.\w_proj"}, False),
    ("qwen3_moe", {"target_parameters": ["mlp.experts.gate_up_proj"], "target_modules": []}, True),
]


@pytest.mark.parametrize(("kind", "values", "meant"), EXPERT_FILES)
def test_experts_are_meant_where_peft_wraps_them(kind: str, values: dict[str, Any], meant: bool) -> None:
    file = {"peft_type": "LORA", **values}
    assert file_adapts_experts(model_of(MODELS[kind]), file) == meant
    setup = setup_of(MODELS[kind], PeftConfig(peft_config_json=json.dumps(file)))
    run = TrainingRun(setup, torch.device("meta"), _no_phases)
    run.prepare()
    assert any("experts" in name for name, p in run.net.named_parameters() if p.requires_grad) == meant


def test_a_kind_is_read_in_small_letters_too() -> None:
    tied = model_of(LLAMA, tie_word_embeddings=True)
    assert file_adapts_head(tied, {"peft_type": "trainable_tokens"})
    file = {"peft_type": "lora", "target_modules": "all-linear"}
    assert file_adapts_experts(model_of(MODELS["mixtral"]), file)


@pytest.mark.parametrize("targets", ["(", ["("], 7, [7]])
def test_what_cannot_be_read_is_left_to_peft(targets: Any) -> None:
    values = {"peft_type": "LORA", "target_modules": targets}
    assert not file_adapts_head(model_of(LLAMA), values)
    assert not file_adapts_experts(model_of(MODELS["mixtral"]), values)
