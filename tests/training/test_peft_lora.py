"""LoRALayer alone: its formula, its start, merging and back, dtypes, devices, and what it refuses."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from planner.errors import SetupError
from planner.training.peft import (
    LoRALayer,
    LoRASettings,
    attach,
    disabled,
    merge,
    trainable_count,
    trainable_parameters,
    unmerge,
)
from tests.training.peft_families import logits, tiny_model


def wrapped(kind: str, rank: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0) -> LoRALayer:
    """A layer of 10 inputs and 6 outputs with random A and B."""
    torch.manual_seed(seed)
    base = {"linear": nn.Linear(10, 6), "conv1d": Conv1D(6, 10), "embedding": nn.Embedding(10, 6)}[kind]
    layer = LoRALayer(base.to(dtype).requires_grad_(False), rank=rank, alpha=5.0)
    nn.init.normal_(layer.lora_B.weight)
    return layer


def inputs(kind: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.arange(10).view(2, 5) if kind == "embedding" else torch.randn(2, 5, 10).to(dtype)


KINDS = ("linear", "conv1d", "embedding")


@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_the_papers_formula(kind: str) -> None:
    layer, x = wrapped(kind), inputs(kind)
    one_hot = nn.functional.one_hot(x, 10).float() if kind == "embedding" else x
    update = one_hot @ layer.lora_A.weight.T @ layer.lora_B.weight.T * (5.0 / 3)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + update)


@pytest.mark.parametrize("kind", KINDS)
def test_starts_as_its_base_bit_for_bit(kind: str) -> None:
    layer, x = wrapped(kind), inputs(kind)
    nn.init.zeros_(layer.lora_B.weight)
    assert torch.equal(layer(x), layer.base_layer(x))


def test_a_is_gaussian_of_one_over_r_and_b_is_zero() -> None:
    torch.manual_seed(0)
    layer = LoRALayer(nn.Linear(4096, 64), rank=8, alpha=16)
    a = layer.lora_A.weight
    assert a.std().item() == pytest.approx(1 / 8, rel=0.02)
    assert a.mean().item() == pytest.approx(0, abs=0.003)
    kurtosis = (a**4).mean() / a.var() ** 2
    assert kurtosis.item() == pytest.approx(3, abs=0.1)  # a uniform distribution has 1.8
    assert not layer.lora_B.weight.any()


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    rank=st.integers(1, 6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_merge_and_unmerge_are_exact_and_safe_twice(
    kind: str, rank: int, dtype: torch.dtype, seed: int
) -> None:
    layer = wrapped(kind, rank, dtype, seed)
    x, before = inputs(kind, dtype), layer.base_layer.weight.clone()
    original, unmerged = layer.base_layer.weight, layer(x)
    layer.merge()
    once = layer.base_layer.weight.clone()
    layer.merge()
    assert torch.equal(layer.base_layer.weight, once)
    # The exact sum, rounded once to the weight's own dtype (half an ulp; fp32 in between adds a trifle).
    exact = before.double() + layer.delta().double()
    half_ulp = torch.finfo(dtype).eps / 2 * 1.001
    assert ((once.double() - exact).abs() <= half_ulp * exact.abs() + torch.finfo(dtype).tiny).all()
    loose = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(layer(x), unmerged, rtol=loose, atol=loose)
    layer.unmerge()
    layer.unmerge()
    assert layer.base_layer.weight is original
    assert torch.equal(original, before)
    assert torch.equal(layer(x), unmerged)


def test_subtracting_would_not_restore_the_weight() -> None:
    layer = wrapped("linear", dtype=torch.bfloat16)
    before = layer.base_layer.weight.clone()
    layer.merge()
    subtracted = (layer.base_layer.weight - layer.delta()).to(torch.bfloat16)
    assert not torch.equal(subtracted, before)


def test_a_merged_model_that_is_moved_unmerges_in_the_new_dtype() -> None:
    layer = wrapped("linear")
    before = layer.base_layer.weight.clone()
    layer.merge()
    layer.to(torch.bfloat16)
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, before.to(torch.bfloat16))


def test_an_original_weight_that_was_given_up_is_said_to_be_gone() -> None:
    layer = wrapped("linear")
    layer.merge(keep_original=False)
    with pytest.raises(SetupError, match="gave the original weight up"):
        layer.unmerge()


def test_quantized_weights_are_not_merged_into() -> None:
    layer = wrapped("linear")
    layer.base_layer.weight = nn.Parameter(torch.zeros(6, 10, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(SetupError, match=r"cannot merge into a weight of torch\.uint8"):
        layer.merge()


def test_disabled_is_the_base_model_merged_or_not() -> None:
    model = tiny_model("qwen2")
    base = logits(model)
    attach(model, LoRASettings(lora_rank=2, lora_alpha=4, target_modules=("all-linear",)))
    for name, parameter in trainable_parameters(model).items():
        nn.init.normal_(parameter, std=0.3 if "lora_B" in name else 0.1)
    adapted = logits(model)
    assert not torch.equal(adapted, base)
    with disabled(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), adapted)
    merge(model)
    merged = logits(model)
    with disabled(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), merged)
    unmerge(model)
    assert torch.equal(logits(model), adapted)


def test_a_tied_head_stays_as_it_is_when_the_embedding_is_merged() -> None:
    model = tiny_model("gemma3_text")
    attach(model, LoRASettings(lora_rank=4, lora_alpha=4, target_modules=("embed_tokens",)))
    nn.init.normal_(next(p for n, p in model.named_parameters() if "lora_B" in n))
    head, unmerged = model.lm_head.weight.clone(), logits(model)
    merge(model)
    assert torch.equal(model.lm_head.weight, head)
    torch.testing.assert_close(logits(model), unmerged, rtol=1e-4, atol=1e-4)
    unmerge(model)
    assert model.lm_head.weight is model.model.embed_tokens.base_layer.weight


def test_dropout_is_on_the_updates_input_and_only_in_training() -> None:
    layer = LoRALayer(nn.Linear(400, 6), rank=4, alpha=4, dropout=0.5)
    nn.init.normal_(layer.lora_B.weight)
    x = torch.randn(3, 400)
    assert torch.equal(layer.eval()(x), layer(x))
    torch.manual_seed(1)
    trained = layer.train()(x)
    torch.manual_seed(1)
    dropped = nn.functional.dropout(x, 0.5)
    expected = layer.base_layer(x) + layer.lora_B(layer.lora_A(dropped)) * layer.scaling
    assert torch.equal(trained, expected)


@pytest.mark.parametrize(
    ("base", "asked", "expected"),
    [
        (torch.bfloat16, None, torch.float32),
        (torch.float16, None, torch.float32),
        (torch.float32, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ],
)
def test_adapter_dtype(base: torch.dtype, asked: torch.dtype | None, expected: torch.dtype) -> None:
    layer = LoRALayer(nn.Linear(10, 6, dtype=base), rank=2, alpha=4, adapter_dtype=asked)
    assert layer.lora_A.weight.dtype == layer.lora_B.weight.dtype == expected
    assert layer(torch.randn(2, 10).to(base)).dtype == base


def test_meta_the_hand_worked_matrix_and_a_whole_model() -> None:
    with torch.device("meta"):
        matrix, model = nn.Linear(4096, 4096, bias=False), tiny_model("llama")
    layer = LoRALayer(matrix, rank=8, alpha=16)
    # design.md: 4096 x 4096, r = 8: 32,768 + 32,768 trained of 16,777,216
    assert layer.lora_A.weight.numel() + layer.lora_B.weight.numel() == 65_536
    attach(model, LoRASettings(lora_rank=2, lora_alpha=4, target_modules=("all-linear",)))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model(input_ids=torch.ones(2, 8, dtype=torch.long, device="meta")).logits.is_meta
    merge(model)
    unmerge(model)


def test_the_wrapped_layers_attributes_stay_reachable() -> None:
    layer = wrapped("linear")
    assert layer.weight is layer.base_layer.weight
    assert layer.bias is layer.base_layer.bias
    assert (layer.in_features, layer.out_features) == (10, 6)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = layer.no_such_thing


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_independent(copied: object) -> None:
    layer, x = wrapped("linear"), inputs("linear")
    other = copied(layer)
    assert torch.equal(other(x), layer(x))
    nn.init.zeros_(other.lora_B.weight)
    assert not torch.equal(other(x), layer(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_rank": 0}, "lora_rank must be a whole number of at least 1, got 0"),
        ({"lora_rank": True}, "lora_rank must be a whole number"),
        ({"lora_rank": 2.0}, "lora_rank must be a whole number"),
        ({"lora_alpha": 0}, "lora_alpha must be a number above 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a finite number"),
        ({"lora_dropout": 1.0}, "lora_dropout must be a number from 0 and below 1"),
        ({"lora_bias": "some"}, "lora_bias must be one of none, all, lora_only"),
        ({"target_modules": ()}, "target_modules is empty"),
        ({"target_modules": "q_proj"}, "target_modules must be a tuple"),
        ({"adapter_dtype": torch.int8}, "adapter_dtype must be one of"),
    ],
)
def test_settings_refuse_nonsense(change: dict[str, object], message: str) -> None:
    with pytest.raises(SetupError, match=message):
        LoRASettings(**{"lora_rank": 2, "lora_alpha": 4.0} | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_modules": ("qproj",)}, r"is named 'qproj'; did you mean .*q_proj"),
        ({"target_modules": ("q_proj", "proj")}, "is named 'proj'"),  # a part of a name is no suffix
        ({"target_modules": ("self_attn",)}, "is a LlamaAttention; LoRA takes Linear"),
        ({"lora_rank": 9, "target_modules": ("k_proj",)}, r"k_proj \(16 x 8\); give at most 8"),
        ({"lora_rank": 17, "target_modules": ("all-linear",)}, "give at most 8"),
    ],
)
def test_what_the_model_cannot_take_is_refused_and_changes_nothing(
    change: dict[str, object], message: str
) -> None:
    model = tiny_model("llama")
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(SetupError, match=message):
        attach(model, LoRASettings(**{"lora_rank": 2, "lora_alpha": 4.0} | change))
    assert [name for name, _ in model.named_parameters()] == names
    assert trainable_count(model) == sum(p.numel() for p in model.parameters())


def test_a_method_is_attached_once() -> None:
    model = attach(tiny_model("llama"), LoRASettings(lora_rank=2, lora_alpha=4))
    with pytest.raises(SetupError, match="has a PEFT method already"):
        attach(model, LoRASettings(lora_rank=2, lora_alpha=4))
