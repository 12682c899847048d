"""Bottleneck adapters: parameters by formula, the identity at the start, and where they sit."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from planner.catalog.outputs import OUTPUTS
from planner.errors import SetupError
from planner.training.peft import (
    AdapterSettings,
    BottleneckAdapter,
    attach,
    disabled,
    merge_and_unload,
    trainable_count,
    trainable_parameters,
)
from tests.training.peft_families import FAMILIES, batch, logits, tiny_model

H, M = 16, 5
LAYERS = {"t5": 4}  # encoder and decoder; every other family here has 2


def adapter(model_type: str, kind: str, **changes: object) -> AdapterSettings:
    attention, mlp = OUTPUTS[model_type]
    given = {"adapter_kind": kind, "adapter_size": M, "attention_outputs": attention, "mlp_outputs": mlp}
    return AdapterSettings(**given | changes)


@pytest.mark.parametrize(("kind", "in_a_layer"), [("houlsby", 2), ("pfeiffer", 1)])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_counts_by_formula_and_an_identical_start(model_type: str, kind: str, in_a_layer: int) -> None:
    model = tiny_model(model_type)
    names, base = [name for name, _ in model.named_parameters()], logits(model)
    attach(model, adapter(model_type, kind))
    adapters = LAYERS.get(model_type, 2) * in_a_layer
    assert trainable_count(model) == adapters * (2 * H * M + M + H)
    assert torch.equal(logits(model), base)
    # The base model's own parameters keep their names.
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == names

    model(**batch(model)).loss.backward()
    reached = [n for n, p in trainable_parameters(model).items() if n.endswith("up.bias") and p.grad.any()]
    assert len(reached) == adapters

    for part in trainable_parameters(model).values():
        nn.init.normal_(part, std=0.5)
    assert not torch.allclose(logits(model), base, atol=1e-3)
    with disabled(model):
        assert torch.equal(logits(model), base)


def test_forward_is_the_residual_bottleneck() -> None:
    torch.manual_seed(0)
    for activation, function in (
        ("relu", torch.relu),
        ("gelu", nn.GELU()),
        ("tanh", torch.tanh),
        ("silu", nn.SiLU()),
    ):
        layer, x = BottleneckAdapter(H, M, activation), torch.randn(3, H)
        nn.init.normal_(layer.up.weight)
        nn.init.normal_(layer.up.bias)
        inner = function(x @ layer.down.weight.T + layer.down.bias)
        torch.testing.assert_close(layer(x), x + inner @ layer.up.weight.T + layer.up.bias)


def test_the_start_is_houlsbys() -> None:
    torch.manual_seed(0)
    layer = BottleneckAdapter(512, 128)
    weight = layer.down.weight
    assert weight.abs().max().item() <= 0.02
    # A Gaussian cut at two standard deviations has 0.8796 of its standard deviation.
    assert weight.std().item() == pytest.approx(0.8796e-2, rel=0.02)
    assert not any(part.any() for part in (layer.up.weight, layer.up.bias, layer.down.bias))


def test_the_adapter_comes_before_the_residual_is_added() -> None:
    """In a pre-norm block, output = x + adapter(attention) + ...: an adapter of -1 cancels attention."""
    model = tiny_model("llama", num_hidden_layers=1)
    attach(model, adapter("llama", "houlsby", adapter_size=H, activation="relu"))
    block = model.model.layers[0]
    seen: dict[str, torch.Tensor] = {}
    block.self_attn.register_forward_hook(lambda _m, _i, out: seen.update(attention=out[0]))
    block.register_forward_pre_hook(lambda _m, args: seen.update(residual=args[0]))
    block.post_attention_layernorm.register_forward_pre_hook(lambda _m, args: seen.update(sum=args[0]))
    nn.init.constant_(block.self_attn.o_proj.adapter.up.bias, 0.25)
    raw = torch.zeros(())
    with disabled(model):
        logits(model)
        raw = seen["attention"]
    logits(model)
    torch.testing.assert_close(seen["attention"], raw + 0.25)
    torch.testing.assert_close(seen["sum"], seen["residual"] + raw + 0.25)


def test_bert_gets_its_mlp_adapter_after_the_mlp_only() -> None:
    model = attach(tiny_model("bert"), adapter("bert", "pfeiffer"))
    places = {name.partition(".adapter.")[0] for name in trainable_parameters(model)}
    assert places == {f"bert.encoder.layer.{layer}.output.dense" for layer in range(2)}


class Block(nn.Module):
    """Answers with a tuple, as attention and some expert blocks do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(H, H)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, str]:
        return self.inner(x), "router"


def test_the_first_of_a_tuple_is_adapted() -> None:
    class Model(nn.Module):
        class config:
            @staticmethod
            def get_text_config(decoder: bool) -> object:
                return type("Config", (), {"hidden_size": H})

        def __init__(self) -> None:
            super().__init__()
            self.mlp = Block()

    model = Model()
    attach(model, adapter("mixtral", "pfeiffer"))
    nn.init.ones_(model.mlp.adapter.up.bias)
    x = torch.randn(2, H)
    adapted, other = model.mlp(x)
    assert torch.equal(adapted, model.mlp.inner(x) + 1)
    assert other == "router"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_keep_the_adapters(copied: object) -> None:
    model = attach(tiny_model("gpt2"), adapter("gpt2", "houlsby"))
    other = copied(model)
    for part in trainable_parameters(other).values():
        nn.init.normal_(part)
    assert not torch.allclose(logits(other), logits(model))


def test_fp32_adapters_over_a_bf16_base() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    base = logits(model)
    attach(model, adapter("llama", "houlsby"))
    assert {p.dtype for p in trainable_parameters(model).values()} == {torch.float32}
    assert torch.equal(logits(model), base)
    model = attach(tiny_model("llama"), adapter("llama", "houlsby", adapter_dtype=torch.float64))
    assert {p.dtype for p in trainable_parameters(model).values()} == {torch.float64}


def test_meta() -> None:
    with torch.device("meta"):
        model = tiny_model("mixtral")
    attach(model, adapter("mixtral", "houlsby"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert trainable_count(model) == 4 * (2 * H * M + M + H)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapter_kind": "parallel"}, "adapter_kind must be one of houlsby, pfeiffer"),
        ({"adapter_size": 0}, "adapter_size must be a whole number of at least 1"),
        ({"activation": "swish"}, "activation must be one of relu, gelu, silu, tanh"),
        ({"mlp_outputs": ()}, "mlp_outputs is empty"),
        ({"attention_outputs": ()}, "attention_outputs is empty"),
        ({"mlp_outputs": ("downproj",)}, "no output named 'downproj'; did you mean down_proj"),
        ({"mlp_outputs": ("layers",)}, r"model\.layers \(ModuleList\) cannot take an adapter"),
        ({"adapter_size": H + 1}, f"adapter_size must be from 1 to the width {H}, got {H + 1}"),
    ],
)
def test_nonsense_is_refused_and_changes_nothing(change: dict[str, object], message: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(SetupError, match=message):
        attach(model, adapter("llama", "houlsby", **change))
    assert trainable_count(model) == sum(p.numel() for p in model.parameters())


def test_adapters_cannot_be_merged() -> None:
    with pytest.raises(SetupError, match="not linear and cannot be merged"):
        merge_and_unload(attach(tiny_model("llama"), adapter("llama", "pfeiffer")))
