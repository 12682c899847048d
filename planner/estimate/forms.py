"""What a model's layers are made of, read off its tensors and the method: the formulas' input.

Layers of one form need the same memory, so that each form is described once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from planner.estimate.marks import Marks, marks_of
from planner.estimate.recipes import recipe_of
from planner.estimate.traits import TRAITS
from planner.model import Architecture, WeightTensor
from planner.spec import Setup

__all__ = ["LayerForm", "LinearForm", "ModelForm", "NormForm", "TableForm", "model_form"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearForm:
    """A linear layer and what the method does to it. `rank` 0: no LoRA; `bottleneck` 0: no adapter.

    `transposed`: the weight is [inputs, outputs], as in transformers' Conv1D.
    `scaled`: IA3 multiplies its "inputs" or "outputs". `element` is the bytes of a number of its weight, None
    for the recipe's own.
    """

    name: str
    inputs: int
    outputs: int
    bias: bool = False
    transposed: bool = False
    weight_trained: bool = False
    bias_trained: bool = False
    rank: int = 0
    lora_dropout: float = 0.0
    dora: bool = False
    scaled: Literal["", "inputs", "outputs"] = ""
    bottleneck: int = 0
    quantized: bool = False
    element: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class NormForm:
    """A normalization over `width`."""

    width: int
    weight_trained: bool = False
    bias_trained: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class TableForm:
    """An embedding table: `rows` x `width`, trained itself or through LoRA of `rank`."""

    rows: int
    width: int
    trained: bool = False
    rank: int = 0
    position: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerForm:
    """One layer. `attention_inputs` are q, k, v or one fused layer, `mlp_inputs` gate and up, or one.

    `norms` are the layer's own, `head_norms` those of queries and keys. `experts` are the shapes of
    fused expert weights, `experts_biased` where they have biases; `bottleneck` is an adapter behind the
    whole MLP block. `sinks`: heads with a learned sink. A decoder behind an encoder has `cross_inputs` and
    `cross_output`; `position_table` [buckets, heads] is in the first layer alone.
    """

    attention_inputs: tuple[LinearForm, ...]
    attention_output: LinearForm
    mlp_inputs: tuple[LinearForm, ...]
    mlp_output: LinearForm | None
    norms: tuple[NormForm, ...]
    head_norms: tuple[NormForm, ...]
    experts: tuple[tuple[int, ...], ...] = ()
    router: LinearForm | None = None
    experts_biased: bool = False
    experts_trained: bool = False
    experts_added: tuple[tuple[int, int], ...] = ()
    bottleneck: int = 0
    sliding: bool = False
    rotary: bool = True
    sinks: int = 0
    sinks_trained: bool = False
    cross_inputs: tuple[LinearForm, ...] = ()
    cross_output: LinearForm | None = None
    position_table: TableForm | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelForm:
    """`runs`: consecutive equal layers with their number, first layer first; the rest by position.

    `encoder_runs` are those of an encoder, where there is one beside the decoder. Equal forms are the same
    object.
    """

    runs: tuple[tuple[LayerForm, int], ...]
    tables: tuple[TableForm, ...]
    outer_norms: tuple[NormForm, ...]
    outer_linears: tuple[LinearForm, ...]
    head: LinearForm
    head_table_trained: bool = False  # the head's weight is the embedding's
    encoder_runs: tuple[tuple[LayerForm, int], ...] = ()


def model_form(setup: Setup) -> ModelForm:
    """The forms of all layers and of what surrounds them; cached with the model for each method."""
    cache = setup.model.__dict__.setdefault("_forms", {})
    key = setup.method, recipe_of(setup).wide
    form = cache.get(key)
    if form is None:
        form = cache[key] = _model_form(setup)
    return form  # type: ignore[no-any-return]


def _model_form(setup: Setup) -> ModelForm:
    model, shape = setup.model, setup.model.architecture
    assert shape is not None  # the caller asks for closed-form families only
    marks = marks_of(setup, shape)
    inner = [t for t in model.tensors if "*" in t.name]
    outer = [t for t in model.tensors if "*" not in t.name]
    encoder = [t for t in inner if t.name.startswith("encoder.")] if shape.encoder_layers else []
    decoder = [t for t in inner if t not in encoder] if encoder else inner
    # a norm without weights (OLMo); a layer that ends with its own (OPT-350m) has none behind the last
    unweighted = () if shape.norm_placement == "post" else (NormForm(width=shape.hidden_size),)
    head = [t for t in outer if t.role == "head" and t.kind == "linear" and t.leaf == "weight"]
    return ModelForm(
        runs=_runs(decoder, shape.num_layers, shape, marks),
        encoder_runs=_runs(encoder, shape.encoder_layers, shape, marks) if encoder else (),
        tables=tuple(_table(t, marks) for t in outer if t.kind == "embedding" and not t.tied_to),
        outer_norms=_norms([t for t in outer if t.kind == "norm"], None, marks) or unweighted,
        outer_linears=tuple(
            _linear(t, None, marks)
            for t in outer
            if t.kind in ("linear", "conv1d") and t.leaf == "weight" and t is not head[-1]
        ),
        head=_linear(head[-1], None, marks),
        head_table_trained=marks.storage(head[-1]) != head[-1].name
        and marks.is_trained(marks.storage(head[-1]), None),
    )


def _runs(
    tensors: list[WeightTensor], layers: int, shape: Architecture, marks: Marks
) -> tuple[tuple[LayerForm, int], ...]:
    runs: list[tuple[LayerForm, int]] = []
    kinds: dict[LayerForm, LayerForm] = {}
    for layer in range(layers):
        form = _layer_form(tensors, layer, shape, marks)
        form = kinds.setdefault(form, form)
        if runs and runs[-1][0] == form:
            runs[-1] = (form, runs[-1][1] + 1)
        else:
            runs.append((form, 1))
    return tuple(runs)


def _layer_form(tensors: list[WeightTensor], layer: int, shape: Architecture, marks: Marks) -> LayerForm:
    present = [t for t in tensors if layer in t.layers]
    linears = [t for t in present if t.kind in ("linear", "conv1d") and t.leaf == "weight"]
    cross = [t for t in linears if shape.cross_attention and f".{shape.cross_attention}." in t.module]
    attention = [t for t in linears if t.role == "attention" and t not in cross]
    mlp = [t for t in linears if t.role == "mlp"]
    output = _ending(attention, shape.attention_output)
    down = _ending(mlp, shape.mlp_output) or (mlp[-1] if mlp else None)
    experts = [t for t in present if t.role == "experts"]
    norms = [t for t in present if t.kind == "norm"]
    sinks = [t for t in present if t.leaf == "sinks"]
    of_heads = [t for t in norms if t.module.rpartition(".")[2] in _HEAD_NORMS]
    traits = TRAITS.get(shape.family)
    skips = traits.rope_skips_every if traits else 0
    plain = NormForm(width=shape.hidden_size)  # a norm without weights
    block = {t.module.split(".mlp")[0] + ".mlp" for t in experts}
    return LayerForm(
        attention_inputs=tuple(
            _linear(t, layer, marks) for t in sorted(attention, key=_query_key_value) if t is not output
        ),
        attention_output=_linear(output or attention[-1], layer, marks),
        mlp_inputs=tuple(_linear(t, layer, marks) for t in mlp if t is not down),
        mlp_output=_linear(down, layer, marks) if down else None,
        norms=_norms([t for t in norms if t not in of_heads], layer, marks) or 2 * (plain,),
        head_norms=_norms(of_heads, layer, marks),
        experts=tuple(t.shape for t in experts if len(t.shape) == 3),
        router=_router([t for t in present if t.role == "router"], layer, marks),
        experts_biased=any(len(t.shape) == 2 for t in experts),
        experts_trained=any(marks.is_trained(t.name, layer) for t in experts),
        experts_added=tuple(marks.added_to(t.name, layer) for t in experts if len(t.shape) == 3),
        bottleneck=sum(marks.bottleneck_behind(module) for module in block),
        sliding=layer in shape.sliding_layers,
        rotary=not skips or (layer + 1) % skips != 0,
        sinks=sum(t.numel for t in sinks),
        sinks_trained=any(marks.is_trained(t.name, layer) for t in sinks),
        cross_inputs=tuple(_linear(t, layer, marks) for t in cross[:-1]),
        cross_output=_linear(cross[-1], layer, marks) if cross else None,
        position_table=next((_table(t, marks, layer) for t in present if t.kind == "embedding"), None),
    )


_HEAD_NORMS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm")


def _query_key_value(tensor: WeightTensor) -> int:
    """Models list q, k and v in several orders and run them in this one."""
    return {"q": 0, "k": 1, "v": 2}.get(tensor.module.rpartition(".")[2][0], 3)


def _ending(tensors: Iterable[WeightTensor], suffix: str) -> WeightTensor | None:
    found = [t for t in tensors if t.module == suffix or t.module.endswith("." + suffix)]
    return found[-1] if found else None


def _linear(tensor: WeightTensor, layer: int | None, marks: Marks) -> LinearForm:
    change = marks.change_of(tensor, layer)
    return LinearForm(
        name=tensor.module.rpartition(".")[2],
        inputs=tensor.in_features,
        outputs=tensor.out_features,
        bias=tensor.module in marks.biased,
        transposed=tensor.kind == "conv1d",
        weight_trained=marks.is_trained(marks.storage(tensor), layer),
        bias_trained=marks.is_trained(tensor.module + ".bias", layer),
        rank=change.rank,
        lora_dropout=change.dropout,
        dora=change.dora,
        scaled=change.scaled,
        bottleneck=marks.bottleneck_behind(tensor.module),
        quantized=marks.is_quantized(tensor.name, layer),
        element=marks.wide_bytes if tensor.wide else None,
    )


def _router(tensors: list[WeightTensor], layer: int, marks: Marks) -> LinearForm | None:
    """The scores of the experts: parameters of a module of its own, no linear layer that a method finds."""
    weight = next((t for t in tensors if t.leaf == "weight"), None)
    if weight is None:
        return None
    return LinearForm(
        name=weight.module.rpartition(".")[2],
        inputs=weight.in_features,
        outputs=weight.out_features,
        bias=weight.module in marks.biased,
        weight_trained=marks.is_trained(weight.name, layer) or marks.added_to(weight.name, layer)[0] > 0,
        bias_trained=marks.is_trained(weight.module + ".bias", layer),
    )


def _table(tensor: WeightTensor, marks: Marks, layer: int | None = None) -> TableForm:
    return TableForm(
        rows=tensor.in_features,
        width=tensor.out_features,
        trained=marks.is_trained(tensor.name, layer),
        rank=marks.change_of(tensor, layer).rank,
        position=tensor.role == "position",
    )


def _norms(tensors: list[WeightTensor], layer: int | None, marks: Marks) -> tuple[NormForm, ...]:
    return tuple(
        NormForm(
            width=t.shape[0],
            weight_trained=marks.is_trained(t.name, layer),
            bias_trained=marks.is_trained(f"{t.module}.bias", layer),
        )
        for t in tensors
        if t.leaf == "weight"
    )
