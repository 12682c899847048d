"""The decoder that most families share: token embedding, blocks of attention and MLP, norm, head.

`architecture` reads the numbers, a family says with `dataclasses.replace` what is different, and
`decoder` lists the tensors. Module names and shapes: transformers 5.23, models/llama/modeling_llama.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from planner.catalog.families.fields import Fields
from planner.catalog.families.tensors import embedding, head, linear, norm, parameter
from planner.model import Architecture, WeightTensor

__all__ = ["FamilyModel", "Layout", "all_but_every", "architecture", "decoder", "with_sliding"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FamilyModel:
    """What a family makes of a config.json; `max_positions` None: no limit on the sequence."""

    tensors: tuple[WeightTensor, ...]
    architecture: Architecture
    max_positions: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How a family names its modules, and the parameters Architecture's numbers do not tell."""

    output_bias: bool = False  # bias of attention's output projection
    block_norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    norm_leaves: tuple[str, ...] = ("weight",)
    qk_norms: tuple[str, str] = ("q_norm", "k_norm")
    final_norm: str = "norm"
    mlp_inputs: tuple[str, ...] = ("gate_proj", "up_proj")
    head_bias: bool = False
    router: str = "gate"
    router_bias: bool = False
    experts_bias: bool = False
    experts_transposed: bool = False  # [experts, inputs, outputs] instead of [experts, outputs, inputs]
    sinks: bool = False  # one learned attention sink for each head


def architecture(
    fields: Fields,
    *,
    layer_class: str,
    tied: bool = False,
    key_value_heads: int | None = None,
    head_dim: int | None = None,
    activation: str = "silu",
    activation_key: str = "hidden_act",
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm",
    hidden_is_a_multiple: bool = False,
) -> Architecture:
    """The numbers of a llama-like config; arguments are the family's defaults in transformers 5.23.

    `key_value_heads` None: as many as attention heads. `head_dim` None: hidden_size / heads.
    `hidden_is_a_multiple`: transformers refuses a hidden_size that is not a multiple of the heads
    even where head_dim is given.
    """
    hidden = fields.size("hidden_size")
    heads = fields.size("num_attention_heads")
    given = fields.optional_size("head_dim") or head_dim
    if hidden % heads and (given is None or hidden_is_a_multiple):
        raise fields.error(
            f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}; correct config.json."
        )
    explicit = "num_key_value_heads" in fields.config
    groups = fields.size("num_key_value_heads", default=heads if explicit else key_value_heads or heads)
    if heads % groups:
        raise fields.error(
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}; "
            "correct config.json."
        )
    return Architecture(
        family=fields.family,
        hidden_size=hidden,
        num_layers=fields.layer_count("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=given or hidden // heads,
        intermediate_size=fields.size("intermediate_size"),
        vocab_size=fields.size("vocab_size"),
        norm=norm,
        activation=fields.text(activation_key, default=activation),
        attention_dropout=fields.share("attention_dropout"),
        tied_head=fields.flag("tie_word_embeddings", default=tied),
        attention_output="self_attn.o_proj",
        mlp_output="mlp.down_proj",
        layer_class=layer_class,
    )


def with_sliding(
    fields: Fields, shape: Architecture, *, window: int | None, layers: Sequence[int] | None = None
) -> Architecture:
    """`shape` with its sliding window; `window` is the family's default, `sliding_window: null` is off.

    `layers` None: the window holds everywhere and `layer_types` is not read. Otherwise `layer_types`
    decides, and `layers` are those that have the window where it is absent.
    """
    size = fields.size("sliding_window", default=window, least=1) if _has_window(fields, window) else None
    if size is None:
        return shape
    chosen = tuple(range(shape.num_layers))
    if layers is not None:
        listed = fields.sliding_layers(shape.num_layers)
        chosen = tuple(layers) if listed is None else listed
    return replace(shape, sliding_window=size if chosen else None, sliding_layers=chosen)


def all_but_every(count: int, layers: int) -> tuple[int, ...]:
    """All of `layers` but each `count`-th: the layers with a window where the others see everything."""
    return tuple(layer for layer in range(layers) if (layer + 1) % count)


def _has_window(fields: Fields, window: int | None) -> bool:
    if "sliding_window" in fields.config:
        return fields.config["sliding_window"] is not None
    return window is not None


def decoder(fields: Fields, shape: Architecture, layout: Layout, *, max_positions: int) -> FamilyModel:
    """Every parameter of `XForCausalLM`; `max_positions` is the family's default."""
    hidden, vocab = shape.hidden_size, shape.vocab_size
    everywhere = tuple(range(shape.num_layers))
    tensors = [
        *embedding("model.embed_tokens", vocab, hidden),
        *_attention(shape, layout, everywhere),
        *_mlp(shape, layout, everywhere),
    ]
    for name in layout.block_norms:
        tensors += norm(f"model.layers.*.{name}", hidden, layers=everywhere, leaves=layout.norm_leaves)
    tensors += norm(f"model.{layout.final_norm}", hidden, leaves=layout.norm_leaves)
    tied_to = "model.embed_tokens.weight" if shape.tied_head else None
    tensors += head("lm_head", vocab, hidden, tied_to=tied_to, bias=layout.head_bias)
    return FamilyModel(
        tensors=tuple(tensors),
        architecture=shape,
        max_positions=fields.size("max_position_embeddings", default=max_positions),
    )


def _attention(shape: Architecture, layout: Layout, layers: tuple[int, ...]) -> list[WeightTensor]:
    prefix = "model.layers.*.self_attn"
    hidden, head_dim = shape.hidden_size, shape.head_dim
    queries = shape.num_attention_heads * head_dim
    keys = shape.num_key_value_heads * head_dim
    tensors: list[WeightTensor] = []
    if layout.sinks:
        tensors += parameter(f"{prefix}.sinks", (shape.num_attention_heads,), "attention", layers=layers)
    projections = (
        (("qkv_proj", queries + 2 * keys),)
        if shape.fused_qkv
        else (("q_proj", queries), ("k_proj", keys), ("v_proj", keys))
    )
    for name, outputs in projections:
        tensors += linear(
            f"{prefix}.{name}", outputs, hidden, "attention", layers=layers, bias=shape.attention_bias
        )
    tensors += linear(
        f"model.layers.*.{shape.attention_output}",
        hidden,
        queries,
        "attention",
        layers=layers,
        bias=layout.output_bias,
    )
    if shape.qk_norm != "none":
        by_head = shape.qk_norm == "head"
        for name, width in zip(layout.qk_norms, (queries, keys), strict=True):
            tensors += norm(
                f"{prefix}.{name}", head_dim if by_head else width, layers=layers, leaves=layout.norm_leaves
            )
    return tensors


def _mlp(shape: Architecture, layout: Layout, layers: tuple[int, ...]) -> list[WeightTensor]:
    if shape.mlp != "experts":
        return _dense_mlp(shape, layout, layers)
    dense = shape.dense_layers
    routed = tuple(layer for layer in layers if layer not in set(dense))
    tensors = _dense_mlp(shape, layout, dense) if dense else []
    return tensors + (_experts(shape, layout, routed) if routed else [])


def _dense_mlp(shape: Architecture, layout: Layout, layers: tuple[int, ...]) -> list[WeightTensor]:
    hidden, inner = shape.hidden_size, shape.intermediate_size
    outputs = 2 * inner if shape.fused_gate_up else inner
    output = "mlp.down_proj" if shape.mlp == "experts" else shape.mlp_output
    tensors: list[WeightTensor] = []
    for name in layout.mlp_inputs:
        tensors += linear(
            f"model.layers.*.mlp.{name}", outputs, hidden, "mlp", layers=layers, bias=shape.mlp_bias
        )
    return tensors + linear(
        f"model.layers.*.{output}", hidden, inner, "mlp", layers=layers, bias=shape.mlp_bias
    )


def _experts(shape: Architecture, layout: Layout, layers: tuple[int, ...]) -> list[WeightTensor]:
    """Fused expert weights, one tensor for all experts of a layer (transformers 5 and later)."""
    experts, hidden, inner = shape.num_experts, shape.hidden_size, shape.expert_intermediate_size
    prefix = "model.layers.*.mlp"
    router = f"{prefix}.{layout.router}"
    tensors = parameter(f"{router}.weight", (experts, hidden), "router", layers=layers)
    if layout.router_bias:
        tensors += parameter(f"{router}.bias", (experts,), "router", layers=layers)
    for name, outputs, inputs in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
        size = (inputs, outputs) if layout.experts_transposed else (outputs, inputs)
        tensors += parameter(f"{prefix}.experts.{name}", (experts, *size), "experts", layers=layers)
        if layout.experts_bias:
            tensors += parameter(
                f"{prefix}.experts.{name}_bias", (experts, outputs), "experts", layers=layers
            )
    return tensors
