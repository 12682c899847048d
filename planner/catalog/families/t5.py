"""T5 (arXiv:1910.10683): encoder and decoder with relative positions and RMS norms.

Modules, defaults and names: transformers 5.23, models/t5/modeling_t5.py, T5ForConditionalGeneration.
T5Config ties the head to the embedding whatever `tie_word_embeddings` says; a checkpoint that
stores both with different values (T5 1.1, Flan-T5) is untied again only while its weights load.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from planner.catalog.families.decoder import FamilyModel
from planner.catalog.families.fields import Fields
from planner.catalog.families.tensors import embedding, head, linear, norm
from planner.model import Architecture, WeightTensor

__all__ = ["FAMILIES"]


def t5(fields: Fields) -> FamilyModel:
    """T5 and its successors of the same class; `max_positions` is None, positions are relative."""
    hidden, heads = fields.size("d_model", "hidden_size"), fields.size("num_heads", "num_attention_heads")
    encoder = fields.layer_count("num_layers", "num_hidden_layers")
    feed_forward = fields.text("feed_forward_proj", default="relu")
    gate, _, activation = feed_forward.rpartition("-")
    if gate not in ("", "gated") or not activation:
        raise fields.error(
            f"feed_forward_proj must be an activation or gated- and one, got {feed_forward!r}."
        )
    dropout = fields.share("dropout_rate", default=0.1)
    shape = Architecture(
        family=fields.family,
        hidden_size=hidden,
        num_layers=encoder if fields.value("num_decoder_layers") is None else _decoder_layers(fields),
        encoder_layers=encoder,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=fields.size("d_kv", "head_dim", default=64),
        intermediate_size=fields.size("d_ff"),
        vocab_size=fields.size("vocab_size"),
        norm="rmsnorm",
        positions="relative",
        mlp="gated" if gate else "plain",
        activation="gelu_new" if feed_forward == "gated-gelu" else activation,
        attention_dropout=dropout,
        hidden_dropout=dropout,
        embedding_dropout=dropout,
        attention_output="SelfAttention.o",
        mlp_output="DenseReluDense.wo",
        layer_class="T5Block",
        cross_attention="EncDecAttention",
        scaled_head_input=fields.value("tie_word_embeddings") is not False,  # configuration_t5.py
    )
    buckets = fields.size("relative_attention_num_buckets", default=32)
    tensors = [
        *embedding("shared", shape.vocab_size, hidden),
        *_stack("encoder", shape, shape.encoder_layers, buckets),
        *_stack("decoder", shape, shape.num_layers, buckets),
        *head("lm_head", shape.vocab_size, hidden, tied_to="shared.weight"),
    ]
    return FamilyModel(tensors=tuple(tensors), architecture=shape, max_positions=None)


def _decoder_layers(fields: Fields) -> int:
    return fields.layer_count("num_decoder_layers")


def _stack(stack: str, shape: Architecture, depth: int, buckets: int) -> list[WeightTensor]:
    """The blocks of `encoder` or `decoder`; the first block alone holds the relative positions."""
    hidden, layers, block = shape.hidden_size, tuple(range(depth)), f"{stack}.block.*"
    tensors = [
        WeightTensor(
            name=f"{stack}.embed_tokens.weight",
            shape=(shape.vocab_size, hidden),
            role="embedding",
            kind="embedding",
            tied_to="shared.weight",
        ),
        *_attention(f"{block}.layer.0.SelfAttention", shape, layers),
        *embedding(
            f"{block}.layer.0.SelfAttention.relative_attention_bias",
            buckets,
            shape.num_attention_heads,
            "position",
            layers=(0,),
        ),
        *norm(f"{block}.layer.0.layer_norm", hidden, layers=layers),
    ]
    last = 1
    if stack == "decoder":
        last = 2
        tensors += _attention(f"{block}.layer.1.{shape.cross_attention}", shape, layers)
        tensors += norm(f"{block}.layer.1.layer_norm", hidden, layers=layers)
    mlp = f"{block}.layer.{last}.DenseReluDense"
    for name in ("wi_0", "wi_1") if shape.mlp == "gated" else ("wi",):
        tensors += linear(f"{mlp}.{name}", shape.intermediate_size, hidden, "mlp", layers=layers)
    out = linear(f"{mlp}.wo", hidden, shape.intermediate_size, "mlp", layers=layers)
    tensors += [replace(tensor, wide=True) for tensor in out]  # T5PreTrainedModel._keep_in_fp32_modules
    tensors += norm(f"{block}.layer.{last}.layer_norm", hidden, layers=layers)
    return tensors + norm(f"{stack}.final_layer_norm", hidden)


def _attention(name: str, shape: Architecture, layers: tuple[int, ...]) -> list[WeightTensor]:
    width = shape.num_attention_heads * shape.head_dim
    tensors: list[WeightTensor] = []
    for projection in ("q", "k", "v"):
        tensors += linear(f"{name}.{projection}", width, shape.hidden_size, "attention", layers=layers)
    return tensors + linear(f"{name}.o", shape.hidden_size, width, "attention", layers=layers)


FAMILIES: dict[str, Callable[[Fields], FamilyModel]] = {"t5": t5}
