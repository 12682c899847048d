"""LoRA held against the peft library on tiny models of many families: same tensors, same answers."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from planner.training.peft import LoRASettings, attach, merge, merge_and_unload, trainable_count, unmerge
from tests.training.peft_families import FAMILIES, batch, logits, tiny_model

# peft 0.21 still asks transformers for the attribute's old name, and looks for fused experts in vain.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
]

RANK, ALPHA = 3, 7.0
FUSED_EXPERTS = ("mixtral", "qwen3_moe")


def attention_names(model: nn.Module) -> list[str]:
    """The preset `attention`, found by the classes of the enclosing modules and not by names."""
    return [
        f"{block}.{name}"
        for block, outer in model.named_modules()
        if "Attention" in type(outer).__name__
        for name, inner in outer.named_modules()
        if isinstance(inner, (nn.Linear, Conv1D))
    ]


def linear_names(model: nn.Module) -> list[str]:
    """Every Linear and Conv1D but the output head."""
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    ]


def pair(model_type: str, targets: tuple[str, ...], bias: str = "none") -> tuple[nn.Module, peft.PeftModel]:
    """Our model and peft's with the same base weights and the same random A and B."""
    base = tiny_model(model_type)
    names: str | list[str] = list(targets)
    if targets == ("attention",):
        names = attention_names(base)
    elif targets == ("all-linear",):
        # See test_what_pefts_all_linear_adds_in_a_mixture_of_experts.
        names = linear_names(base) if model_type in FUSED_EXPERTS else "all-linear"
    # peft warns of tied embeddings among the targets and asks for fan_in_fan_out on Conv1D.
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=names, bias=bias, fan_in_fan_out=model_type == "gpt2"
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    ours = attach(
        base, LoRASettings(lora_rank=RANK, lora_alpha=ALPHA, target_modules=targets, lora_bias=bias)
    )
    theirs_by_name = dict(theirs.named_parameters())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "lora_" not in name:
                continue
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
            theirs_by_name[their_name(name, theirs_by_name)].copy_(parameter)
    return ours, theirs


def their_name(name: str, known: dict[str, nn.Parameter]) -> str:
    """peft's name of our tensor; an embedding's pair is called otherwise there."""
    module, _, leaf = name.removesuffix(".weight").rpartition(".")
    if leaf in ("lora_A", "lora_B"):
        linear = f"base_model.model.{module}.{leaf}.default.weight"
        return linear if linear in known else f"base_model.model.{module}.lora_embedding_{leaf[-1]}.default"
    return f"base_model.model.{name}"


def preset_or_names(model_type: str, preset: str) -> tuple[str, ...]:
    return FAMILIES[model_type][1] if preset == "names" else (preset,)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("preset", ["names", "attention", "all-linear"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_counts_forward_gradients_and_merged_weights_are_pefts(model_type: str, preset: str) -> None:
    base = logits(tiny_model(model_type))
    ours, theirs = pair(model_type, preset_or_names(model_type, preset))
    assert trainable_count(ours) == theirs.get_nb_trainable_parameters()[0] > 0

    adapted = logits(ours)
    assert not torch.allclose(adapted, base, atol=1e-4)
    torch.testing.assert_close(adapted, logits(theirs), rtol=1e-5, atol=1e-6)

    for model in (ours, theirs):
        model(**batch(model)).loss.backward()
    theirs_by_name = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            other = theirs_by_name[their_name(name, theirs_by_name)]
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-6)

    tied = preset == "names" and {"wte", "embed_tokens", "lm_head"} & set(FAMILIES[model_type][1])
    merge_and_unload(ours)
    torch.testing.assert_close(logits(ours), adapted, rtol=1e-4, atol=1e-5)
    if not tied:  # peft adds an embedding's update to the tied head too, which changes the model
        merged = dict(theirs.merge_and_unload().named_parameters())
        assert {name for name, _ in ours.named_parameters()} == set(merged)
        for name, parameter in ours.named_parameters():
            torch.testing.assert_close(parameter, merged[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("model_type", "inner"), [("mixtral", 24), ("qwen3_moe", 12)])
def test_what_pefts_all_linear_adds_in_a_mixture_of_experts(model_type: str, inner: int) -> None:
    """peft 0.21 adapts fused experts and the router too (`_convert_peft_config_moe`); ours are linear layers.

    Rank 2 r for the fused gate and up, times the experts; the difference is exactly this and no more.
    """
    base = tiny_model(model_type)
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    )
    ours = attach(base, LoRASettings(lora_rank=RANK, lora_alpha=ALPHA, target_modules=("all-linear",)))
    layers, hidden, experts = 2, 16, 4
    gate_up = 2 * RANK * experts * (hidden + 2 * inner)
    down = RANK * experts * (inner + hidden)
    router = RANK * (hidden + experts)
    fused = layers * (gate_up + down + router)
    assert theirs.get_nb_trainable_parameters()[0] == trainable_count(ours) + fused


def test_autocast_is_pefts() -> None:
    """The bf16-mixed recipe: fp32 weights, products in bf16."""
    ours, theirs = pair("llama", ("all-linear",))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(ours), logits(theirs))
        for model in (ours, theirs):
            model(**batch(model)).loss.backward()
    theirs_by_name = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, theirs_by_name[their_name(name, theirs_by_name)].grad)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("model_type", ["qwen2", "gpt2", "opt", "bloom", "bert", "phi", "llama"])
def test_trained_biases_are_pefts(model_type: str, bias: str) -> None:
    ours, theirs = pair(model_type, ("attention",), bias)
    assert trainable_count(ours) == theirs.get_nb_trainable_parameters()[0]
    trained = {name.replace("base_layer.", "") for name, p in ours.named_parameters() if p.requires_grad}
    assert any(name.endswith(".bias") for name in trained) == (model_type != "llama")


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "falcon", "t5"])
def test_a_16_bit_base_keeps_pefts_dtypes_and_answers(model_type: str) -> None:
    base = tiny_model(model_type).to(torch.bfloat16)
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules="all-linear", fan_in_fan_out=model_type == "gpt2"
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    ours = attach(base, LoRASettings(lora_rank=2, lora_alpha=4, target_modules=("all-linear",)))
    theirs_by_name = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "lora_" in name:
                other = theirs_by_name[their_name(name, theirs_by_name)]
                assert parameter.dtype == other.dtype == torch.float32
                other.copy_(parameter.normal_(std=0.2))
    assert torch.equal(logits(ours), logits(theirs))
    before = {name: p.clone() for name, p in ours.named_parameters() if "base_layer" in name}
    merge(ours)
    theirs.merge_adapter()
    for name, parameter in ours.named_parameters():
        if "base_layer" in name:
            assert torch.equal(parameter, theirs_by_name[f"base_model.model.{name}"])
    unmerge(ours)
    assert all(torch.equal(dict(ours.named_parameters())[name], old) for name, old in before.items())
