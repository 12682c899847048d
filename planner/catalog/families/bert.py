"""Encoders trained on masked tokens: BERT, RoBERTa, DistilBERT, with their language-model heads.

Modules, defaults and names: transformers 5.23, models/<family>/modeling_<family>.py, XForMaskedLM.
"""

from __future__ import annotations

from collections.abc import Callable

from planner.catalog.families.decoder import FamilyModel
from planner.catalog.families.fields import Fields
from planner.catalog.families.tensors import embedding, linear, norm, parameter
from planner.model import Architecture, WeightTensor

__all__ = ["FAMILIES"]

_AFFINE = ("weight", "bias")


def bert(fields: Fields) -> FamilyModel:
    """BERT (arXiv:1810.04805); the head's bias is shared with its decoder layer."""
    head_of = ("cls.predictions", "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm")
    return _bert_like(fields, "bert", "BertLayer", positions=512, first_position=0, head_of=head_of)


def roberta(fields: Fields) -> FamilyModel:
    """RoBERTa (arXiv:1907.11692): positions are counted from the padding index + 1, so 514 rows hold 512."""
    first = fields.size("pad_token_id", default=1, least=0) + 1
    head_of = ("lm_head", "lm_head.dense", "lm_head.layer_norm")
    return _bert_like(fields, "roberta", "RobertaLayer", positions=512, first_position=first, head_of=head_of)


def _bert_like(
    fields: Fields,
    prefix: str,
    layer_class: str,
    *,
    positions: int,
    first_position: int,
    head_of: tuple[str, str, str],
) -> FamilyModel:
    if fields.flag("is_decoder") or fields.flag("add_cross_attention"):
        raise fields.unknown(f"is a {prefix} used as a decoder")
    dropout = fields.share("hidden_dropout_prob", default=0.1)
    shape = _shape(
        fields,
        hidden=fields.size("hidden_size"),
        heads=fields.size("num_attention_heads"),
        layers=fields.layer_count("num_hidden_layers"),
        inner=fields.size("intermediate_size"),
        activation=fields.text("hidden_act", default="gelu"),
        attention_dropout=fields.share("attention_probs_dropout_prob", default=0.1),
        dropout=dropout,
        outputs=("attention.output.dense", "output.dense"),
        layer_class=layer_class,
    )
    hidden, inner, vocab = shape.hidden_size, shape.intermediate_size, shape.vocab_size
    rows = fields.size("max_position_embeddings", default=positions)
    if rows <= first_position:
        raise fields.error(f"max_position_embeddings {rows} leaves no position after pad_token_id.")
    layers = tuple(range(shape.num_layers))
    words, block = f"{prefix}.embeddings.word_embeddings", f"{prefix}.encoder.layer.*"
    tensors = [
        *embedding(words, vocab, hidden),
        *embedding(f"{prefix}.embeddings.position_embeddings", rows, hidden, "position"),
        *embedding(
            f"{prefix}.embeddings.token_type_embeddings", fields.size("type_vocab_size", default=2), hidden
        ),
        *norm(f"{prefix}.embeddings.LayerNorm", hidden, leaves=_AFFINE),
    ]
    for name in ("query", "key", "value"):
        tensors += linear(
            f"{block}.attention.self.{name}", hidden, hidden, "attention", layers=layers, bias=True
        )
    tensors += [
        *linear(f"{block}.attention.output.dense", hidden, hidden, "attention", layers=layers, bias=True),
        *norm(f"{block}.attention.output.LayerNorm", hidden, layers=layers, leaves=_AFFINE),
        *linear(f"{block}.intermediate.dense", inner, hidden, "mlp", layers=layers, bias=True),
        *linear(f"{block}.output.dense", hidden, inner, "mlp", layers=layers, bias=True),
        *norm(f"{block}.output.LayerNorm", hidden, layers=layers, leaves=_AFFINE),
    ]
    head, dense, layer_norm = head_of
    tied = shape.tied_head
    tensors += [
        *parameter(f"{head}.bias", (vocab,), "head"),
        *linear(dense, hidden, hidden, "head", bias=True),
        *norm(layer_norm, hidden, leaves=_AFFINE),
        *_output(f"{head}.decoder", vocab, hidden, words if tied else None, f"{head}.bias" if tied else None),
    ]
    return FamilyModel(tensors=tuple(tensors), architecture=shape, max_positions=rows - first_position)


def distilbert(fields: Fields) -> FamilyModel:
    """DistilBERT (arXiv:1910.01108): no token types, half the layers."""
    if fields.flag("sinusoidal_pos_embds"):
        raise fields.unknown("has sinusoidal positions")
    shape = _shape(
        fields,
        hidden=fields.size("dim", "hidden_size"),
        heads=fields.size("n_heads", "num_attention_heads"),
        layers=fields.layer_count("n_layers", "num_hidden_layers"),
        inner=fields.size("hidden_dim"),
        activation=fields.text("activation", default="gelu"),
        attention_dropout=fields.share("attention_dropout", default=0.1),
        dropout=fields.share("dropout", default=0.1),
        outputs=("attention.out_lin", "ffn.lin2"),
        layer_class="TransformerBlock",
    )
    hidden, inner, vocab = shape.hidden_size, shape.intermediate_size, shape.vocab_size
    rows = fields.size("max_position_embeddings", default=512)
    layers = tuple(range(shape.num_layers))
    words, block = "distilbert.embeddings.word_embeddings", "distilbert.transformer.layer.*"
    tensors = [
        *embedding(words, vocab, hidden),
        *embedding("distilbert.embeddings.position_embeddings", rows, hidden, "position"),
        *norm("distilbert.embeddings.LayerNorm", hidden, leaves=_AFFINE),
    ]
    for name in ("q_lin", "k_lin", "v_lin", "out_lin"):
        tensors += linear(f"{block}.attention.{name}", hidden, hidden, "attention", layers=layers, bias=True)
    tensors += [
        *norm(f"{block}.sa_layer_norm", hidden, layers=layers, leaves=_AFFINE),
        *linear(f"{block}.ffn.lin1", inner, hidden, "mlp", layers=layers, bias=True),
        *linear(f"{block}.ffn.lin2", hidden, inner, "mlp", layers=layers, bias=True),
        *norm(f"{block}.output_layer_norm", hidden, layers=layers, leaves=_AFFINE),
        *linear("vocab_transform", hidden, hidden, "head", bias=True),
        *norm("vocab_layer_norm", hidden, leaves=_AFFINE),
        *_output("vocab_projector", vocab, hidden, words if shape.tied_head else None, None),
    ]
    return FamilyModel(tensors=tuple(tensors), architecture=shape, max_positions=rows)


def _shape(
    fields: Fields,
    *,
    hidden: int,
    heads: int,
    layers: int,
    inner: int,
    activation: str,
    attention_dropout: float,
    dropout: float,
    outputs: tuple[str, str],
    layer_class: str,
) -> Architecture:
    if hidden % heads:
        raise fields.error(f"the width {hidden} is not a multiple of the {heads} heads; correct config.json.")
    return Architecture(
        family=fields.family,
        hidden_size=hidden,
        num_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=inner,
        vocab_size=fields.size("vocab_size"),
        norm="layernorm",
        norm_placement="post",
        attention_bias=True,
        positions="learned",
        mlp="plain",
        mlp_bias=True,
        activation=activation,
        attention_dropout=attention_dropout,
        hidden_dropout=dropout,
        embedding_dropout=dropout,
        tied_head=fields.flag("tie_word_embeddings", default=True),
        attention_output=outputs[0],
        mlp_output=outputs[1],
        layer_class=layer_class,
    )


def _output(
    name: str, vocab: int, hidden: int, words: str | None, bias_tied_to: str | None
) -> list[WeightTensor]:
    """The output layer with its bias, either of them tied."""
    tied_to = f"{words}.weight" if words else None
    return [
        WeightTensor(
            name=f"{name}.weight", shape=(vocab, hidden), role="head", kind="linear", tied_to=tied_to
        ),
        WeightTensor(name=f"{name}.bias", shape=(vocab,), role="head", kind="linear", tied_to=bias_tied_to),
    ]


FAMILIES: dict[str, Callable[[Fields], FamilyModel]] = {
    "bert": bert,
    "distilbert": distilbert,
    "roberta": roberta,
}
