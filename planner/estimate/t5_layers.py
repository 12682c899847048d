"""T5's layers: norms, attention with position biases to itself and to the encoder, feed-forward.

Letters: T = b s tokens, `h` hidden, `a` heads, `s` sequence. Read off transformers 5.23,
models/t5/modeling_t5.py, and integrations/sdpa_attention.py, `create_position_bias_mask`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from planner.estimate.attention import KERNELS
from planner.estimate.attention_plan import AttentionPlan, attention_plan
from planner.estimate.blocks import sorted_sums_bytes
from planner.estimate.forms import LayerForm, NormForm
from planner.estimate.nodes import Tensor, kept_factors
from planner.estimate.operations import Operations
from planner.estimate.resident import block_bytes
from planner.model import Architecture
from planner.spec import Setup

__all__ = ["Given", "t5_layer", "t5_norm"]

# `_relative_position_bucket` [s, s]: five tensors of int64 at once and one of bools; an encoder's signs too.
_BUCKETS_BYTES = 5 * 8 + 1
_SIGNS_BYTES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Given:
    """What the layers of a stack share: `bias` [1, a, s, s], made by the first.

    A decoder's also share the encoder's output `memory` [T, h] and the empty bias `zeros` of their attention
    to it. None: not made yet, or never.
    """

    memory: Tensor | None = None
    bias: Tensor | None = None
    zeros: Tensor | None = None

    def tensors(self) -> tuple[Tensor, ...]:
        """Those that are there."""
        return tuple([t for t in (self.memory, self.bias, self.zeros) if t is not None])


def t5_layer(
    ops: Operations, x: Tensor, shape: Architecture, form: LayerForm, setup: Setup, given: Given
) -> tuple[Tensor, Given]:
    """One layer of x [T, h], and what it shares with the next."""
    linears = (*form.attention_inputs, form.attention_output)
    normed = t5_norm(ops, x, form.norms[0])
    q, k, v = (ops.linear(normed, linear) for linear in linears[:3])
    decodes = given.memory is not None
    bias = given.bias or _bias(ops, form, causal=decodes)
    inner, weights = _attended(ops, (q, k, v), shape, form, setup, bias, causal=decodes)
    x = _added(ops, x, ops.linear(inner, linears[3]), shape, hold=(normed, q, k, v))
    x = _clamped(ops, x)
    zeros = given.zeros
    if given.memory is not None and form.cross_output is not None:
        normed = t5_norm(ops, x, form.norms[1])
        sources = (normed, given.memory, given.memory)
        q, k, v = (ops.linear(t, linear) for t, linear in zip(sources, form.cross_inputs, strict=True))
        zeros = zeros or _zeros(ops, q, shape, trained=setup.training.activation_checkpointing)
        inner, others = _attended(ops, (q, k, v), shape, form, setup, zeros, causal=False, ready=True)
        x = _added(ops, x, ops.linear(inner, form.cross_output), shape, hold=(normed, q, k, v, *weights))
        x, weights = _clamped(ops, x), others
    normed = t5_norm(ops, x, form.norms[-1])
    x = _added(ops, x, _fed_forward(ops, normed, shape, form), shape)
    out = _clamped(ops, x)
    ops.hold(*weights, *[t for t in (bias, zeros) if t is not None])
    return out, replace(given, bias=bias, zeros=zeros)


def t5_norm(ops: Operations, x: Tensor, form: NormForm) -> Tensor:
    """w * x / sqrt(mean(x^2) + eps): the mean from an fp32 copy of x, the product with x itself.

    Keeps x, the copy, 1 / sqrt(...), and where w is trained the product in w's type. Backward of the mean, in
    fp32: its gradient spread over x, x^1, 2 x^1 and their product (FunctionsManual.cpp, pow_backward).
    """
    wide = block_bytes(4 * x.numel)
    single = ops.cast(x, 4)
    inverse = ops.op(
        (single,),
        x.numel // form.width,
        4,
        (single,),
        keeps_output=True,
        work_bytes=wide,
        scratch_bytes=3 * wide,
    )
    kept = (x, inverse) if x.needs_grad else ()
    scratch = wide * (1 if x.element == 4 else 2)
    normed = ops.op((x, inverse), x.numel, 4, kept, scratch_bytes=scratch)
    base = ops.recipe.base
    if base == 2:
        normed = ops.cast(normed, base)
    trained = form.weight_trained
    return ops.op(
        (normed,),
        x.numel,
        base,
        (normed,) if trained else (),
        weight_bytes=block_bytes(form.width * base) if trained else 0,
        scratch_bytes=block_bytes(x.numel * base) if trained else 0,
    )


def _added(
    ops: Operations, x: Tensor, branch: Tensor, shape: Architecture, hold: tuple[Tensor, ...] = ()
) -> Tensor:
    """x + dropout(branch), with the variables that a sub-layer holds until then."""
    ops.hold(*hold[1:])
    out = ops.add(x, ops.dropout(branch, shape.hidden_dropout))
    ops.hold(*hold[:1], branch)
    return out


def _clamped(ops: Operations, x: Tensor) -> Tensor:
    """In fp16 infinities are cut off, whether there are any or not: `clamp` keeps x and its two bounds.

    Backward: where x is above one bound, below the other, and both: bools [T, h] (clamp_backward).
    """
    if not ops.fp16 or x.element != 2:
        return x
    bounds = (Tensor(1, 4, False), Tensor(1, 4, False))
    return ops.op((x,), x.numel, x.element, (x, *bounds), scratch_bytes=3 * block_bytes(x.numel))


def _fed_forward(ops: Operations, x: Tensor, shape: Architecture, form: LayerForm) -> Tensor:
    """wo(dropout(act(wi(x)))), gated or not; wo gets its input in its own type, which may be fp32."""
    inner = ops.activation(ops.linear(x, form.mlp_inputs[0]), shape.activation)
    held: tuple[Tensor, ...] = ()
    if shape.mlp == "gated":
        linear = ops.linear(x, form.mlp_inputs[1])
        held = (inner, linear)
        inner = ops.product(inner, linear)
    assert form.mlp_output is not None
    inner = ops.dropout(inner, shape.hidden_dropout)
    inner = ops.cast(inner, form.mlp_output.element or ops.recipe.base)
    out = ops.linear(inner, form.mlp_output)
    ops.hold(x, inner, *held)
    return out


def _bias(ops: Operations, form: LayerForm, *, causal: bool) -> Tensor:
    """The position bias [1, a, s, s], looked up in its table by the bucket of each distance (int64, kept)."""
    table = form.position_table
    assert table is not None  # the first layer of a stack has one
    s = ops.seq_len
    pairs = s * s
    made = pairs * (_BUCKETS_BYTES + (0 if causal else _SIGNS_BYTES))
    numel = pairs * table.width
    element = ops.recipe.base
    work = max(0, made - numel * element)
    return ops.op(
        (),
        numel,
        element,
        (Tensor(pairs, 8, False),),
        weight_bytes=block_bytes(table.rows * table.width * element) if table.trained else 0,
        scratch_bytes=sorted_sums_bytes(pairs, table) if table.trained else 0,
        work_bytes=work,
    )


def _zeros(ops: Operations, q: Tensor, shape: Architecture, *, trained: bool) -> Tensor:
    """The empty bias of the attention to the encoder's output; checkpointing asks for its gradient."""
    return ops.op((), shape.num_attention_heads * ops.seq_len**2, q.element, trained=trained)


def _attended(
    ops: Operations,
    queries_keys_values: tuple[Tensor, Tensor, Tensor],
    shape: Architecture,
    form: LayerForm,
    setup: Setup,
    bias: Tensor,
    *,
    causal: bool,
    ready: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What attention answers before its output layer, and the weights that an eager layer hands out.

    `ready`: the bias is a mask as it is.
    """
    q, k, v = queries_keys_values
    if ops.recipe.autocast:
        q, k, v = (ops.cast(t, ops.recipe.compute) for t in (q, k, v))
    plan = attention_plan(shape, form, setup, v.element)
    if plan.kernel == "eager":
        return _eager(ops, q, k, v, plan, bias, setup, causal=causal)
    if plan.kernel == "cudnn" and bias.needs_grad:  # check_attn_mask_shape: flash takes no mask either
        plan = replace(plan, kernel="efficient")
    mask = bias if ready else _mask(ops, bias, causal=causal)
    made = mask
    if ops.recipe.autocast:
        mask = ops.cast(mask, ops.recipe.compute)
    if plan.kernel == "efficient":
        mask = _spread(ops, mask, plan)
    out = KERNELS[plan.kernel](ops, q, k, v, plan, mask)
    if made is not bias:
        ops.hold(made)
    return out, ()


def _mask(ops: Operations, bias: Tensor, *, causal: bool) -> Tensor:
    """The bias as a mask: made contiguous, in a decoder with the future cut off before."""
    if causal:
        future = Tensor(ops.seq_len**2, 1, False)
        bias = ops.op((bias,), bias.numel, bias.element, (future,))
    return ops.op((bias,), bias.numel, bias.element, aliases=True)


def _spread(ops: Operations, mask: Tensor, plan: AttentionPlan) -> Tensor:
    """The mask padded to a multiple of 16 (attention.cpp, pad_bias) and spread over all samples.

    The kernel's gradient of it is as large as the spread mask (attention_backward.cu, grad_bias).
    """
    columns = -(-plan.keys // 16) * 16
    rows = mask.numel // plan.keys
    if columns != plan.keys:
        mask = ops.op((mask,), rows * columns, mask.element)
    return ops.view(mask, plan.b * mask.numel) if plan.b > 1 and mask.needs_grad else mask


def _eager(
    ops: Operations,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    bias: Tensor,
    setup: Setup,
    *,
    causal: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Scores, softmax and dropout as [b, a, s, s] each, in the scores' own type; the bias is added to them.

    Under autocast the softmax answers in fp32 and so does the dropout, which the product with v converts.
    """
    n = plan.b * plan.a * plan.s * plan.keys
    element = q.element
    if plan.b > 1:  # matmul folds b and a
        q, k, v = (ops.op((t,), t.numel, t.element, aliases=True) for t in (q, k, v))
    scores = ops.scaled(ops.op((q, k), n, element, kept_factors(q, k)))
    scores = ops.op((scores, bias), n, max(element, bias.element), aliases=bias.element <= element)
    if causal:
        scores = ops.op((scores,), n, max(scores.element, ops.recipe.base), aliases=True)
    single = 4 if ops.recipe.autocast else scores.element
    converted = scores if setup.training.precision == "fp16-mixed" else ops.cast(scores, single)
    weights = ops.op((converted,), n, single, keeps_output=True, scratch_bytes=block_bytes(n * single))
    ops.hold(scores)
    dropped = ops.dropout(weights, plan.dropout)
    multiplied = ops.cast(dropped, element)
    out = ops.op((multiplied, v), v.numel, element, kept_factors(multiplied, v))
    return ops.op((out,), out.numel, out.element, aliases=True), (dropped,)
