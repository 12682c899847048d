"""Mixtures of experts. In transformers 5 the experts of a layer are one 3-D parameter each for
gate_up and down, not linear modules: models/mixtral/modeling_mixtral.py, class MixtralExperts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from planner.catalog.families.decoder import (
    FamilyModel,
    Layout,
    all_but_every,
    architecture,
    decoder,
    with_sliding,
)
from planner.catalog.families.fields import Fields
from planner.model import Architecture

__all__ = ["FAMILIES"]


def mixtral(fields: Fields) -> FamilyModel:
    """Mixtral 8x7B and 8x22B (arXiv:2401.04088)."""
    shape = architecture(fields, layer_class="MixtralDecoderLayer", key_value_heads=8)
    shape = _routed(fields, with_sliding(fields, shape, window=None), experts=8, chosen=2)
    return decoder(fields, shape, Layout(), max_positions=131072)


def qwen3_moe(fields: Fields) -> FamilyModel:
    """Qwen3 30B-A3B and 235B-A22B (arXiv:2505.09388); `mlp_only_layers` keep a plain MLP."""
    shape = architecture(fields, layer_class="Qwen3MoeDecoderLayer", key_value_heads=4)
    bias = fields.flag("attention_bias")
    if fields.flag("use_sliding_window"):
        shape = with_sliding(fields, shape, window=4096)
    step = fields.size("decoder_sparse_step", default=1)
    plain = set(fields.layer_list("mlp_only_layers", shape.num_layers))
    dense = tuple(i for i in range(shape.num_layers) if i in plain or (i + 1) % step)
    shape = _routed(
        fields, shape, experts=128, chosen=8, inner=fields.size("moe_intermediate_size", default=768)
    )
    shape = replace(shape, attention_bias=bias, qk_norm="head", dense_layers=dense)
    return decoder(fields, shape, Layout(output_bias=bias), max_positions=32768)


def gpt_oss(fields: Fields) -> FamilyModel:
    """gpt-oss 20b and 120b (arXiv:2508.10925): attention sinks, biases, a window in every other layer."""
    shape = architecture(fields, layer_class="GptOssDecoderLayer", key_value_heads=8, head_dim=64)
    shape = _routed(
        fields,
        with_sliding(fields, shape, window=128, layers=all_but_every(2, shape.num_layers)),
        experts=128,
        chosen=4,
    )
    bias = fields.flag("attention_bias", default=True)
    layout = Layout(
        output_bias=bias,
        sinks=True,
        router="router",
        router_bias=True,
        experts_bias=True,
        experts_transposed=True,
    )
    return decoder(fields, replace(shape, attention_bias=bias, mlp_bias=True), layout, max_positions=131072)


def _routed(
    fields: Fields, shape: Architecture, *, experts: int, chosen: int, inner: int | None = None
) -> Architecture:
    number = fields.size("num_local_experts", "num_experts", default=experts)
    per_token = fields.size("num_experts_per_tok", "experts_per_token", default=chosen)
    if per_token > number:
        raise fields.error(f"num_experts_per_tok {per_token} is above the number of experts {number}.")
    return replace(
        shape,
        mlp="experts",
        num_experts=number,
        experts_per_token=per_token,
        expert_intermediate_size=inner or shape.intermediate_size,
        mlp_output="mlp",
    )


FAMILIES: dict[str, Callable[[Fields], FamilyModel]] = {
    "gpt_oss": gpt_oss,
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
}
