"""What LoRA's target names mean where peft's rule is more than the end of a module's name."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, strategies as st
from peft.utils import transformers_weight_conversion as conversion
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from planner import catalog
from planner.errors import SetupError
from planner.estimate.parameters import trained_tensors
from planner.model import Model, WeightTensor
from planner.spec import LoRA, Setup
from planner.targets import (
    OLD_EXPERT_NAMES,
    LoRATarget,
    adapted_weights,
    adapts_experts,
    bias_tensors,
    lora_targets,
    module_matches,
)
from planner.training.attach import attached
from planner.training.inventory import tensors_of

RANK = 3
_WIDTHS = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "head_dim": 4,
    "vocab_size": 48,
    "moe_intermediate_size": 12,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# model type: what differs from the above; dense layers are those that peft loses
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "minimax_m2": {},
    "qwen3_moe": {"mlp_only_layers": [0]},
    "olmoe": {},
    "deepseek_v3": {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4},
    "glm4_moe": {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "qwen2_moe": {"shared_expert_intermediate_size": 12},  # peft 0.21 does not convert it
    "gpt_oss": {},
    "granitemoe": {},
}
CONVERTED = [model_type for model_type in MIXTURES if model_type in OLD_EXPERT_NAMES]


def tiny(model_type: str) -> tuple[nn.Module, Model]:
    """A mixture of three layers on `meta`, and the planner's list of its tensors."""
    config = CONFIG_MAPPING[model_type](**_WIDTHS | MIXTURES.get(model_type, {}))
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sizes that no published model has
        net = AutoModelForCausalLM.from_config(config)
    entries = [
        WeightTensor(**{**entry, "shape": tuple(entry["shape"]), "layers": tuple(entry["layers"])})
        for entry in tensors_of(net)
    ]
    config_json = json.dumps({"model_type": model_type})
    return net, Model(id=f"tiny-{model_type}", config_json=config_json, tensors=tuple(entries))


def shapes_of_peft(net: nn.Module, targets: str | list[str]) -> Counter[tuple[int, ...]]:
    config = peft.LoraConfig(r=RANK, target_modules=targets)
    with warnings.catch_warnings():  # names of experts match no module
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(net, config)
    return Counter(tuple(p.shape) for p in theirs.parameters() if p.requires_grad)


def shapes_by_rule(model: Model, targets: tuple[str, ...]) -> Counter[tuple[int, ...]]:
    found: Counter[tuple[int, ...]] = Counter()
    for target in lora_targets(model, targets):
        for shape in target.shapes(RANK):
            found[shape] += target.weight.count
    return found


@pytest.mark.parametrize("model_type", MIXTURES)
def test_all_linear_in_a_mixture_of_experts(model_type: str) -> None:
    net, model = tiny(model_type)
    assert shapes_by_rule(model, ("all-linear",)) == shapes_of_peft(net, "all-linear")
    assert adapts_experts(model, ("all-linear",)) == (model_type in OLD_EXPERT_NAMES)
    assert not adapts_experts(model, ("attention",))


@pytest.mark.parametrize("model_type", CONVERTED)
def test_experts_by_their_old_names(model_type: str) -> None:
    gate, up, down = OLD_EXPERT_NAMES[model_type]
    attention = "kv_a_proj_with_mqa" if model_type == "deepseek_v3" else "q_proj"
    for targets in (
        (attention, gate, up, down),
        (gate, up),
        (attention, down),
        (attention, "gate"),
        (attention, f"layers.1.mlp.experts.0.{down}"),  # one layer's name is every layer's
    ):
        net, model = tiny(model_type)
        assert shapes_by_rule(model, targets) == shapes_of_peft(net, list(targets))
        assert adapts_experts(model, targets)
        weights = adapted_weights(model, targets)
        assert {t.module.rpartition(".")[2] for t in weights} == {attention} & set(targets)


@pytest.mark.parametrize("model_type", CONVERTED)
def test_half_of_a_fused_tensor_is_refused_as_peft_refuses_it(model_type: str) -> None:
    gate, up, _ = OLD_EXPERT_NAMES[model_type]
    for given_name in (gate, up):
        net, model = tiny(model_type)
        with pytest.raises(SetupError, match=f"{given_name} alone.*name both or neither"):
            lora_targets(model, ("q_proj", given_name))
        with pytest.raises(ValueError, match="without also targeting"):
            shapes_of_peft(net, ["q_proj", given_name])


def test_the_table_of_old_names_is_pefts() -> None:
    """Model types in small letters; the rest are names of classes."""
    theirs = {
        model_type: tuple(old for name in ("gate_up_proj", "down_proj") for old in _old_names(base, name))
        for model_type, base in conversion._MODEL_TO_CONVERSION_PATTERN.items()
        if base in conversion._MOE_TARGET_MODULE_MAPPING and model_type.islower()
    }
    assert theirs == OLD_EXPERT_NAMES
    routers = {mapping["gate"] for mapping in conversion._MOE_TARGET_MODULE_MAPPING.values()}
    assert routers == {"gate.weight"}


def _old_names(base: str, fused: str) -> list[str]:
    return [old for old, new in conversion._MOE_TARGET_MODULE_MAPPING[base].items() if new == fused]


def test_a_dense_model_has_no_experts_to_adapt() -> None:
    net, model = tiny("llama")
    targets = ("q_proj", "gate_proj", "down_proj")
    assert shapes_by_rule(model, targets) == shapes_of_peft(net, list(targets))
    assert not adapts_experts(model, ("all-linear",))
    for name in ("gate", "w1", "experts", "norm"):
        with pytest.raises(SetupError, match=f"no linear layer named '{name}'"):
            lora_targets(model, (name,))


def test_mamba_without_what_peft_refuses_there() -> None:
    config = CONFIG_MAPPING["mamba"](hidden_size=16, num_hidden_layers=2, vocab_size=48, state_size=4)
    with torch.device("meta"):
        net = AutoModelForCausalLM.from_config(config)
    entries = [
        WeightTensor(**{**entry, "shape": tuple(entry["shape"]), "layers": tuple(entry["layers"])})
        for entry in tensors_of(net)
    ]
    model = Model(id="tiny-mamba", config_json='{"model_type":"mamba"}', tensors=tuple(entries))
    with pytest.raises(SetupError, match="peft adapts no out_proj"):
        lora_targets(model, ("all-linear",))
    method = LoRA(lora_rank=RANK, target_modules=("out_proj",))
    with pytest.raises(SetupError, match=r"peft .* adds no such LoRA to tiny-mamba: .*incompatible"):
        attached(net, model, method)
    assert shapes_by_rule(model, ("in_proj", "x_proj")) == shapes_of_peft(net, ["in_proj", "x_proj"])


@pytest.mark.parametrize(
    "name, before_the_output",
    [
        ("google-bert/bert-base-uncased", "cls.predictions.transform.dense"),
        ("FacebookAI/roberta-base", "lm_head.dense"),
        ("distilbert/distilbert-base-uncased", "vocab_transform"),
    ],
)
def test_all_linear_leaves_out_the_output_embedding_alone(name: str, before_the_output: str) -> None:
    model = catalog.model(name)
    left_out = {t.module for t in model.linear_weights} - {
        t.module for t in adapted_weights(model, ("all-linear",))
    }
    assert left_out == {[t.module for t in model.linear_weights if t.role == "head"][-1]}
    assert before_the_output in {t.module for t in adapted_weights(model, ("all-linear",))}


def test_lora_bias_all_is_the_parameters_named_bias() -> None:
    """gpt-oss also has gate_up_proj_bias and down_proj_bias, which peft leaves frozen."""
    model = catalog.model("openai/gpt-oss-20b")
    assert any(t.name.endswith("_bias") for t in model.tensors)
    setup = Setup(model=model, method=LoRA(lora_bias="all"))
    trained = [t.name for t in trained_tensors(setup) if not t.added]
    assert trained == [t.name for t in bias_tensors(model)]
    assert trained
    assert all(name.endswith(".bias") for name in trained)


def test_one_layer_by_its_full_name() -> None:
    model = catalog.model("google/gemma-2b")
    (only,) = adapted_weights(model, ("layers.7.self_attn.v_proj",))
    assert (only.layers, only.shape) == ((7,), (256, 2048))
    both = adapted_weights(model, ("layers.7.self_attn.v_proj", "model.layers.12.self_attn.v_proj"))
    assert [t.layers for t in both] == [(7, 12)]


@given(rank=st.integers(1, 256), experts=st.integers(1, 64), fused=st.integers(1, 2))
def test_added_parameters_are_linear_in_the_rank(rank: int, experts: int, fused: int) -> None:
    for shape in ((10, 6), (experts, 10, 6)):
        weight = WeightTensor(name="experts.weight", shape=shape, role="experts", kind="parameter")
        (a_rows, inputs), (outputs, b_columns) = LoRATarget(weight=weight, fused=fused).shapes(rank)
        assert (inputs, outputs) == (6, 10)
        assert a_rows == b_columns == (rank * experts * fused if len(shape) == 3 else rank)


@given(st.lists(st.sampled_from("abc."), min_size=1).map("".join), st.sampled_from(["a", "b.a", "ab"]))
def test_a_name_matches_whole_parts_from_the_end(module: str, target: str) -> None:
    parts, wanted = module.split("."), target.split(".")
    assert module_matches(module, target) == (parts[-len(wanted) :] == wanted)
