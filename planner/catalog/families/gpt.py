"""Decoders with their own layout: GPT-2, GPT-NeoX, OPT, BLOOM, Falcon.

Modules, defaults and names: transformers 5.23, models/<family>/modeling_<family>.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from planner.catalog.families.decoder import FamilyModel
from planner.catalog.families.fields import Fields
from planner.catalog.families.tensors import conv1d, embedding, head, linear, norm
from planner.model import Architecture, WeightTensor

__all__ = ["FAMILIES"]

_AFFINE = ("weight", "bias")


def gpt2(fields: Fields) -> FamilyModel:
    """GPT-2 (Radford et al. 2019): Conv1D layers, weights stored `[in, out]`."""
    if fields.flag("add_cross_attention"):
        raise fields.unknown("has cross attention")
    sizes = _sizes(fields, "n_embd", "hidden_size", heads=("n_head", "num_attention_heads"))
    hidden = sizes["hidden_size"]
    inner = fields.size("n_inner", default=4 * hidden)
    layers = _layers(fields, "n_layer", "num_hidden_layers")
    shape = Architecture(
        **sizes,
        **_dropouts(
            fields, attention="attn_pdrop", hidden="resid_pdrop", embedding="embd_pdrop", default=0.1
        ),
        num_layers=len(layers),
        intermediate_size=inner,
        activation=fields.text("activation_function", default="gelu_new"),
        positions="learned",
        attention_bias=True,
        mlp_bias=True,
        tied_head=fields.flag("tie_word_embeddings", default=True),
        attention_output="attn.c_proj",
        mlp_output="mlp.c_proj",
        layer_class="GPT2Block",
    )
    positions = fields.size("n_positions", "max_position_embeddings", default=1024)
    block = "transformer.h.*"
    tensors = [
        *embedding("transformer.wte", shape.vocab_size, hidden),
        *embedding("transformer.wpe", positions, hidden, "position"),
        *norm(f"{block}.ln_1", hidden, layers=layers, leaves=_AFFINE),
        *conv1d(f"{block}.attn.c_attn", 3 * hidden, hidden, "attention", layers=layers),
        *conv1d(f"{block}.attn.c_proj", hidden, hidden, "attention", layers=layers),
        *norm(f"{block}.ln_2", hidden, layers=layers, leaves=_AFFINE),
        *conv1d(f"{block}.mlp.c_fc", inner, hidden, "mlp", layers=layers),
        *conv1d(f"{block}.mlp.c_proj", hidden, inner, "mlp", layers=layers),
        *norm("transformer.ln_f", hidden, leaves=_AFFINE),
        *_head(shape, "transformer.wte"),
    ]
    return FamilyModel(tensors=tuple(tensors), architecture=shape, max_positions=positions)


def gpt_neox(fields: Fields) -> FamilyModel:
    """GPT-NeoX-20B (arXiv:2204.06745) and Pythia: parallel attention and MLP, a quarter rotary."""
    sizes = _sizes(fields, "hidden_size", heads=("num_attention_heads",))
    hidden = sizes["hidden_size"]
    layers = _layers(fields, "num_hidden_layers")
    bias = fields.flag("attention_bias", default=True)
    share = fields.rotary_share("rotary_pct", default=0.25)
    shape = Architecture(
        **sizes,
        **_dropouts(
            fields, attention="attention_dropout", hidden="hidden_dropout", embedding="hidden_dropout"
        ),
        num_layers=len(layers),
        intermediate_size=fields.size("intermediate_size"),
        activation=fields.text("hidden_act", default="gelu"),
        rotary_dim=None if share == 1 else int(sizes["head_dim"] * share),
        parallel_residual=fields.flag("use_parallel_residual", default=True),
        attention_bias=bias,
        mlp_bias=True,
        tied_head=fields.flag("tie_word_embeddings"),
        attention_output="attention.dense",
        mlp_output="mlp.dense_4h_to_h",
        layer_class="GPTNeoXLayer",
    )
    block, inner = "gpt_neox.layers.*", shape.intermediate_size
    tensors = [
        *embedding("gpt_neox.embed_in", shape.vocab_size, hidden),
        *norm(f"{block}.input_layernorm", hidden, layers=layers, leaves=_AFFINE),
        *norm(f"{block}.post_attention_layernorm", hidden, layers=layers, leaves=_AFFINE),
        *linear(
            f"{block}.attention.query_key_value", 3 * hidden, hidden, "attention", layers=layers, bias=bias
        ),
        *linear(f"{block}.attention.dense", hidden, hidden, "attention", layers=layers, bias=bias),
        *_plain_mlp(block, hidden, inner, layers, bias=True),
        *norm("gpt_neox.final_layer_norm", hidden, leaves=_AFFINE),
        *_head(shape, "gpt_neox.embed_in"),
    ]
    positions = fields.size("max_position_embeddings", default=2048)
    return FamilyModel(tensors=tuple(tensors), architecture=shape, max_positions=positions)


def opt(fields: Fields) -> FamilyModel:
    """OPT (arXiv:2205.01068); OPT-350m projects its embeddings and normalizes after each block."""
    sizes = _sizes(fields, "hidden_size", heads=("num_attention_heads",))
    hidden = sizes["hidden_size"]
    layers = _layers(fields, "num_hidden_layers")
    bias = fields.flag("enable_bias", default=True)
    pre = fields.flag("do_layer_norm_before", default=True)
    shape = Architecture(
        **sizes,
        **_dropouts(fields, attention="attention_dropout", hidden="dropout"),
        num_layers=len(layers),
        intermediate_size=fields.size("ffn_dim"),
        norm_placement="pre" if pre else "post",
        activation=fields.text("activation_function", default="relu"),
        positions="learned",
        attention_bias=bias,
        mlp_bias=bias,
        tied_head=fields.flag("tie_word_embeddings", default=True),
        attention_output="self_attn.out_proj",
        mlp_output="fc2",
        layer_class="OPTDecoderLayer",
    )
    leaves = _AFFINE if fields.flag("layer_norm_elementwise_affine", default=True) else ()
    positions = fields.size("max_position_embeddings", default=2048)
    width = fields.size("word_embed_proj_dim", default=hidden)
    block, inner = "model.decoder.layers.*", shape.intermediate_size
    tensors = [
        *embedding("model.decoder.embed_tokens", shape.vocab_size, width),
        # OPTLearnedPositionalEmbedding keeps an offset of two rows
        *embedding("model.decoder.embed_positions", positions + 2, hidden, "position"),
    ]
    if width != hidden:
        tensors += linear("model.decoder.project_out", width, hidden, "other")
        tensors += linear("model.decoder.project_in", hidden, width, "other")
    if pre and not fields.flag("_remove_final_layer_norm"):
        tensors += norm("model.decoder.final_layer_norm", hidden, leaves=leaves)
    for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
        tensors += linear(f"{block}.self_attn.{name}", hidden, hidden, "attention", layers=layers, bias=bias)
    tensors += [
        *norm(f"{block}.self_attn_layer_norm", hidden, layers=layers, leaves=leaves),
        *linear(f"{block}.fc1", inner, hidden, "mlp", layers=layers, bias=bias),
        *linear(f"{block}.fc2", hidden, inner, "mlp", layers=layers, bias=bias),
        *norm(f"{block}.final_layer_norm", hidden, layers=layers, leaves=leaves),
        *head(
            "lm_head",
            shape.vocab_size,
            width,
            tied_to="model.decoder.embed_tokens.weight" if shape.tied_head else None,
        ),
    ]
    return FamilyModel(tensors=tuple(tensors), architecture=shape, max_positions=positions)


def bloom(fields: Fields) -> FamilyModel:
    """BLOOM (arXiv:2211.05100): ALiBi positions (arXiv:2108.12409), so no limit on the sequence."""
    sizes = _sizes(fields, "n_embed", "hidden_size", heads=("n_head", "num_attention_heads"))
    hidden = sizes["hidden_size"]
    layers = _layers(fields, "n_layer", "num_hidden_layers")
    shape = Architecture(
        **sizes,
        **_dropouts(fields, attention="attention_dropout", hidden="hidden_dropout"),
        num_layers=len(layers),
        intermediate_size=4 * hidden,
        activation="gelu",
        positions="alibi",
        attention_bias=True,
        mlp_bias=True,
        tied_head=fields.flag("tie_word_embeddings", default=True),
        attention_output="self_attention.dense",
        mlp_output="mlp.dense_4h_to_h",
        layer_class="BloomBlock",
    )
    block = "transformer.h.*"
    tensors = [
        *embedding("transformer.word_embeddings", shape.vocab_size, hidden),
        *norm("transformer.word_embeddings_layernorm", hidden, leaves=_AFFINE),
        *norm(f"{block}.input_layernorm", hidden, layers=layers, leaves=_AFFINE),
        *linear(
            f"{block}.self_attention.query_key_value",
            3 * hidden,
            hidden,
            "attention",
            layers=layers,
            bias=True,
        ),
        *linear(f"{block}.self_attention.dense", hidden, hidden, "attention", layers=layers, bias=True),
        *norm(f"{block}.post_attention_layernorm", hidden, layers=layers, leaves=_AFFINE),
        *_plain_mlp(block, hidden, 4 * hidden, layers, bias=True),
        *norm("transformer.ln_f", hidden, leaves=_AFFINE),
        *_head(shape, "transformer.word_embeddings"),
    ]
    return FamilyModel(tensors=tuple(tensors), architecture=shape, max_positions=None)


def falcon(fields: Fields) -> FamilyModel:
    """Falcon 7B and 40B (arXiv:2311.16867): one or few key-value heads, parallel attention and MLP."""
    sizes = _sizes(fields, "n_embed", "hidden_size", heads=("num_attention_heads", "n_head"))
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    layers = _layers(fields, "num_hidden_layers", "n_layer")
    grouped = fields.flag("new_decoder_architecture")
    single = fields.flag("multi_query", default=True) and not grouped
    groups = 1 if single else fields.size("num_kv_heads", "n_head_kv", default=heads) if grouped else heads
    if heads % groups:
        raise fields.error(f"num_attention_heads {heads} is not a multiple of num_kv_heads {groups}.")
    parallel = fields.flag("parallel_attn", default=True)
    alibi = fields.flag("alibi")
    bias = fields.flag("bias")
    inner = fields.size("ffn_hidden_size", default=4 * hidden)
    shape = Architecture(
        **{**sizes, "num_key_value_heads": groups},
        **_dropouts(fields, attention="attention_dropout", hidden="hidden_dropout"),
        num_layers=len(layers),
        intermediate_size=inner,
        activation=fields.text("activation", default="gelu"),
        positions="alibi" if alibi else "rope",
        parallel_residual=parallel or grouped,
        attention_bias=bias,
        mlp_bias=bias,
        tied_head=fields.flag("tie_word_embeddings", default=True),
        attention_output="self_attention.dense",
        mlp_output="mlp.dense_4h_to_h",
        layer_class="FalconDecoderLayer",
    )
    norms = ["input_layernorm"]
    if not parallel:
        norms = ["post_attention_layernorm", "input_layernorm"]
    elif fields.size("num_ln_in_parallel_attn", default=2 if grouped else 1) == 2:
        norms = ["ln_attn", "ln_mlp"]
    block, fused = "transformer.h.*", (heads + 2 * groups) * shape.head_dim
    tensors = [
        *embedding("transformer.word_embeddings", shape.vocab_size, hidden),
        *linear(
            f"{block}.self_attention.query_key_value", fused, hidden, "attention", layers=layers, bias=bias
        ),
        *linear(f"{block}.self_attention.dense", hidden, hidden, "attention", layers=layers, bias=bias),
        *_plain_mlp(block, hidden, inner, layers, bias=bias),
    ]
    for name in norms:
        tensors += norm(f"{block}.{name}", hidden, layers=layers, leaves=_AFFINE)
    tensors += norm("transformer.ln_f", hidden, leaves=_AFFINE)
    tensors += _head(shape, "transformer.word_embeddings")
    positions = None if alibi else fields.size("max_position_embeddings", default=2048)
    return FamilyModel(tensors=tuple(tensors), architecture=shape, max_positions=positions)


def _sizes(fields: Fields, *width: str, heads: tuple[str, ...]) -> dict[str, Any]:
    """What all five share: full multi-head attention, layer norms, a plain MLP."""
    hidden, count = fields.size(*width), fields.size(*heads)
    if hidden % count:
        raise fields.error(
            f"{width[-1]} {hidden} is not a multiple of {heads[-1]} {count}; correct config.json."
        )
    return {
        "family": fields.family,
        "hidden_size": hidden,
        "num_attention_heads": count,
        "num_key_value_heads": count,
        "head_dim": hidden // count,
        "vocab_size": fields.size("vocab_size"),
        "norm": "layernorm",
        "fused_qkv": fields.family != "opt",
        "mlp": "plain",
    }


def _dropouts(
    fields: Fields, *, attention: str, hidden: str, embedding: str | None = None, default: float = 0.0
) -> dict[str, Any]:
    hidden_default = 0.1 if fields.family == "opt" else default
    return {
        "attention_dropout": fields.share(attention, default=default),
        "hidden_dropout": fields.share(hidden, default=hidden_default),
        "embedding_dropout": fields.share(embedding, default=default) if embedding else 0.0,
    }


def _layers(fields: Fields, *names: str) -> tuple[int, ...]:
    return tuple(range(fields.layer_count(*names)))


def _plain_mlp(
    block: str, hidden: int, inner: int, layers: tuple[int, ...], *, bias: bool
) -> list[WeightTensor]:
    return [
        *linear(f"{block}.mlp.dense_h_to_4h", inner, hidden, "mlp", layers=layers, bias=bias),
        *linear(f"{block}.mlp.dense_4h_to_h", hidden, inner, "mlp", layers=layers, bias=bias),
    ]


def _head(shape: Architecture, tokens: str) -> list[WeightTensor]:
    tied_to = f"{tokens}.weight" if shape.tied_head else None
    return head("lm_head", shape.vocab_size, shape.hidden_size, tied_to=tied_to)


FAMILIES: dict[str, Callable[[Fields], FamilyModel]] = {
    "bloom": bloom,
    "falcon": falcon,
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
    "opt": opt,
}
