"""A transformer layer and what surrounds it: norms, attention, MLP and residuals in the models' order.

Read off transformers 5.23, models/*/modeling_*.py; the family decides the order, its numbers the sizes.
"""

from __future__ import annotations

from planner.estimate.attention import attention
from planner.estimate.experts import experts
from planner.estimate.forms import LayerForm, ModelForm, TableForm
from planner.estimate.nodes import Tensor
from planner.estimate.operations import Operations
from planner.estimate.resident import block_bytes
from planner.model import Architecture
from planner.spec import Setup

__all__ = ["embedded", "layer", "looked_up", "mlp", "prefix_of", "sorted_sums_bytes"]

def embedded(
    ops: Operations, form: ModelForm, shape: Architecture, *, inputs_need_grad: bool, prompts: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Token embeddings, these behind prompts, and with positions, types, norm and dropout the first input.

    `inputs_need_grad`: the token embeddings' output is made to require gradients. Of a sample's positions the
    first `prompts` are trained vectors (peft_model.py, PeftModelForCausalLM.forward).
    """
    tokens: Tensor | None = None
    given: Tensor | None = None
    x: Tensor | None = None
    for table in form.tables:
        count = ops.seq_len if table.position else ops.tokens
        if tokens is None:
            count -= prompts * (ops.tokens // ops.seq_len)
        tied = form.head_table_trained and not table.position and x is None
        rows = looked_up(ops, table, count, tied=tied)
        if tokens is None and shape.embedding_scale and ops.traits.embedding_scales:
            rows = ops.scaled(rows)
        if tokens is None:
            tokens = rows
            rows.needs_grad = rows.needs_grad or inputs_need_grad
            if prompts:
                rows = _prompted(ops, rows, prompts, table.width)
            given = rows
        if table.width != shape.hidden_size:  # OPT-350m
            rows = ops.linear(rows, next(t for t in form.outer_linears if t.name == "project_in"))
        element = max(rows.element, x.element if x is not None else 0)
        x = rows if x is None else ops.op((x, rows), x.numel, element, aliases=True)
    assert x is not None  # every model has a token embedding
    assert tokens is not None
    assert given is not None
    if shape.embedding_scale and not ops.traits.embedding_scales:
        x = ops.scaled(x)
    if ops.traits.normed_embeddings:
        x = ops.norm(x, form.outer_norms[0], shape.norm)
    return tokens, given, ops.dropout(x, shape.embedding_dropout)


def _prompted(ops: Operations, rows: Tensor, prompts: int, width: int) -> Tensor:
    """Trained vectors [n, h] in the adapter's type, for each sample, converted and joined to its tokens."""
    count = prompts * (ops.tokens // ops.seq_len)
    gradient = block_bytes(prompts * width * ops.recipe.adapter)
    vectors = ops.op((), count * width, ops.recipe.adapter, weight_bytes=gradient)
    converted = ops.cast(vectors, rows.element)
    joined = ops.joined((converted, rows))
    ops.hold(rows, converted)
    return joined


def prefix_of(ops: Operations, shape: Architecture) -> None:
    """Keys and values of the prefix for all layers, for each sample, converted, and copied for the cache."""
    width = 2 * shape.num_layers * shape.num_key_value_heads * shape.head_dim
    rows = ops.tokens // ops.seq_len * ops.prefix
    gradient = block_bytes(ops.prefix * width * ops.recipe.adapter)
    vectors = ops.op((), rows * width, ops.recipe.adapter, weight_bytes=gradient)
    cached = ops.op((ops.cast(vectors, ops.recipe.base),), rows * width, ops.recipe.base)
    ops.copied_bytes += cached.size_bytes


def looked_up(ops: Operations, table: TableForm, tokens: int, *, tied: bool) -> Tensor:
    """Rows of an embedding table. Keeps nothing; a trained table's gradient is dense, [rows, width].

    `tied`: another use of the table has made that gradient already, and this one lives until it is added.
    """
    numel = tokens * table.width
    gradient = block_bytes(table.rows * table.width * ops.recipe.base) if table.trained else 0
    sorting = sorted_sums_bytes(tokens, table)
    rows = ops.op(
        (),
        numel,
        ops.recipe.base,
        weight_bytes=0 if tied else gradient,
        scratch_bytes=sorting + (gradient if tied else 0),
        trained=table.trained,
    )
    return ops.lora_rows(rows, table.rows, table.width, table.rank) if table.rank else rows


def sorted_sums_bytes(tokens: int, table: TableForm) -> int:
    """What the gradient of a table takes for itself: EmbeddingBackwardKernel.cu, above 3,072 indices.

    Indices sorted, their origin and where a row begins; for each row that may be hit, and every 10 indices
    more, a partial sum in fp32.
    """
    if tokens <= 3072:
        return 0
    hit = min(tokens, table.rows)
    partial = tokens // 10 + hit
    by_row = 2 * block_bytes(8 * hit) + block_bytes(8 * partial) + 2 * block_bytes(8)
    return 3 * block_bytes(8 * tokens) + by_row + block_bytes(4 * partial * table.width)


def layer(ops: Operations, x: Tensor, shape: Architecture, form: LayerForm, setup: Setup) -> Tensor:
    """One layer of x [T, h]."""
    if shape.parallel_residual:
        block = _parallel
    elif shape.norm_placement == "pre":
        block = _pre_norm
    else:
        block = _sandwich if shape.norm_placement == "sandwich" else _post_norm
    out = block(ops, x, shape, form, setup)
    ops.hold(*ops.handed_out)
    return out


def _pre_norm(ops: Operations, x: Tensor, shape: Architecture, form: LayerForm, setup: Setup) -> Tensor:
    """x + attention(norm(x)), then x + mlp(norm(x))."""
    before, after = form.norms
    normed = ops.norm(x, before, shape.norm)
    inner = attention(ops, normed, shape, form, setup)
    falcon = ops.traits.fused_qkv == "groups"  # names what parallel blocks need: it is there to the end
    held = (normed, inner) if falcon else ()
    dropout = shape.attention_dropout if falcon else shape.hidden_dropout
    x = ops.add(x, _branch(ops, inner, dropout))
    inner = mlp(ops, ops.norm(x, after, shape.norm), shape, form)
    out = ops.add(x, _branch(ops, inner, shape.hidden_dropout))
    ops.hold(*held)
    return out


def _branch(ops: Operations, x: Tensor, dropout: float) -> Tensor:
    """What is added to the residual stream."""
    x = ops.dropout(x, dropout)
    return ops.scaled(x) if ops.traits.scaled_residual else x


def _sandwich(ops: Operations, x: Tensor, shape: Architecture, form: LayerForm, setup: Setup) -> Tensor:
    """x + norm(attention(norm(x))), then x + norm(mlp(norm(x))): Gemma 2 and 3."""
    norms = form.norms
    inner = attention(ops, ops.norm(x, norms[0], shape.norm), shape, form, setup)
    x = ops.add(x, ops.norm(inner, norms[1], shape.norm))
    inner = mlp(ops, ops.norm(x, norms[2], shape.norm), shape, form)
    return ops.add(x, ops.norm(inner, norms[3], shape.norm))


def _post_norm(ops: Operations, x: Tensor, shape: Architecture, form: LayerForm, setup: Setup) -> Tensor:
    """norm(x + attention(x)) (BERT, OPT-350m), or x + norm(attention(x)) (OLMo 2)."""
    after_attention, after_mlp = form.norms
    if shape.norm == "rmsnorm":
        x = ops.add(x, ops.norm(attention(ops, x, shape, form, setup), after_attention, shape.norm))
        return ops.add(x, ops.norm(mlp(ops, x, shape, form), after_mlp, shape.norm))
    dropout = shape.hidden_dropout if ops.traits.dropout_after_attention else 0.0
    inner = ops.dropout(attention(ops, x, shape, form, setup), dropout)
    x = ops.norm(ops.add(inner, x), after_attention, shape.norm)
    inner = ops.dropout(mlp(ops, x, shape, form), shape.hidden_dropout)
    return ops.norm(ops.add(inner, x), after_mlp, shape.norm)


def _parallel(ops: Operations, x: Tensor, shape: Architecture, form: LayerForm, setup: Setup) -> Tensor:
    """x + attention(norm(x)) + mlp(norm(x)), the norm shared or one for each (GPT-NeoX, Phi, Falcon)."""
    normed = ops.norm(x, form.norms[0], shape.norm)
    inner = ops.dropout(attention(ops, normed, shape, form, setup), shape.hidden_dropout)
    if len(form.norms) > 1:
        normed = ops.norm(x, form.norms[1], shape.norm)
    outer = ops.dropout(mlp(ops, normed, shape, form), shape.hidden_dropout)
    return ops.add(ops.add(outer, inner), x)


def mlp(ops: Operations, x: Tensor, shape: Architecture, form: LayerForm) -> Tensor:
    """down(act(gate(x)) * up(x)), down(act(up(x))), or a mixture of experts."""
    if form.mlp_output is None:
        return experts(ops, x, shape, form)
    held: tuple[Tensor, ...] = ()
    if shape.mlp == "plain":
        inner = ops.activation(ops.linear(x, form.mlp_inputs[0]), shape.activation)
    else:
        inner, held = ops.gated(x, form, shape.activation, fused=shape.fused_gate_up)
    out = ops.linear(inner, form.mlp_output)
    ops.hold(x, *held)
    return out
