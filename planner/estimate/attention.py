"""Attention: its projections, and what the kernel that runs keeps and takes.

Letters: `b` micro batch, `s` sequence, `a` heads, `k` key-value heads, `d` head width. Source: torch 2.13,
aten/src/ATen/native/transformers; transformers 5.23, each model's attention module.
"""

from __future__ import annotations

from functools import partial

from planner.estimate.attention_plan import AttentionPlan, attention_plan
from planner.estimate.eager_forms import attention_with_alibi, attention_with_sinks
from planner.estimate.forms import LayerForm
from planner.estimate.masks import mask_of_layer
from planner.estimate.nodes import Tensor, kept_factors
from planner.estimate.operations import Operations
from planner.estimate.resident import block_bytes
from planner.estimate.unpadding import padded, unpadded
from planner.model import Architecture
from planner.spec import Setup, Training

__all__ = ["KERNELS", "attention"]

def attention(ops: Operations, x: Tensor, shape: Architecture, form: LayerForm, setup: Setup) -> Tensor:
    """Attention of x [T, h] over itself: projections, positions, the kernel, the output projection."""
    q, k, v = _queries_keys_values(ops, x, shape, form)
    if form.head_norms and shape.qk_norm != "none":
        q = ops.head_norm(q, form.head_norms[0], shape.norm)
        k = ops.head_norm(k, form.head_norms[1], shape.norm)
    element = ops.recipe.compute if ops.recipe.autocast else v.element
    plan = attention_plan(shape, form, setup, element, prefix=ops.prefix)
    if shape.positions == "rope" and form.rotary:
        share = (shape.rotary_dim or shape.head_dim) / shape.head_dim
        plain = q, k
        q, k = ops.turned(q, k, share, plan)
        ops.hold(*plain)
    wide = q.element > ops.recipe.compute  # rotated under autocast: the scores follow q's type
    variables = x, q, k, v
    # autocast casts what the kernel is given: keys and values after they were joined or repeated
    casts_late = plan.repeated or ops.prefix > 0
    if ops.recipe.autocast and not casts_late:
        q, k, v = (ops.cast(t, ops.recipe.compute) for t in (q, k, v))
    if ops.prefix:
        k, v = (_behind_prefix(ops, t, shape) for t in (k, v))
        _cached(ops, k, v, plan, setup.training)
    if plan.repeated and not _broadcasts(ops, plan):
        groups = shape.num_attention_heads // shape.num_key_value_heads
        # one key head spread over all heads is a view: repeat_kv's reshape finds nothing to copy
        spread = ops.view if plan.k == 1 else partial(_copied, ops)
        k, v = (spread(t, t.numel * groups) for t in (k, v))
    repeated = k, v
    if ops.recipe.autocast and casts_late:
        q, k, v = (ops.cast(t, ops.recipe.compute) for t in (q, k, v))
    turned = ops.traits.rotary_cats and form.rotary
    places = None
    if plan.unpadded:
        (q, k, v), places = unpadded(ops, (q, k, v), plan, by_heads=(turned, turned, False))
    held: tuple[Tensor, ...] = ()
    if form.sinks:
        gradient = block_bytes(form.sinks * ops.recipe.base) if form.sinks_trained else 0
        out = attention_with_sinks(ops, q, k, v, plan, sinks_bytes=gradient)
    elif plan.kernel == "eager" and plan.biased:
        out, held = attention_with_alibi(ops, q, k, v, plan)
    elif plan.kernel == "eager":
        out = _eager(ops, q, k, v, plan, shape, setup.training, wide=wide)
    else:
        out = KERNELS[plan.kernel](ops, q, k, v, plan)
    ops.hold(*repeated)
    if places is not None:
        out = padded(ops, out, places, plan)
    elif turned and plan.kernel in ("flash", "varlen", "cudnn"):
        out = ops.op((out,), out.numel, out.element)  # flash answers in q's layout, which `cat` changed
    answer = ops.linear(out, form.attention_output)
    ops.hold(*variables, *held)
    return answer


def _copied(ops: Operations, x: Tensor, numel: int) -> Tensor:
    return ops.op((x,), numel, x.element)


def _queries_keys_values(
    ops: Operations, x: Tensor, shape: Architecture, form: LayerForm
) -> tuple[Tensor, Tensor, Tensor]:
    """q [T, a d], k and v [T, k d], from three layers or one."""
    if len(form.attention_inputs) == 3:
        q, k, v = (ops.linear(x, linear) for linear in form.attention_inputs)
        return (ops.scaled(q) if ops.traits.scaled_queries else q), k, v
    fused = ops.linear(x, form.attention_inputs[0])
    if ops.traits.fused_qkv == "groups" and shape.num_key_value_heads < shape.num_attention_heads:
        return _broadcast_groups(ops, fused, shape)
    queries = ops.tokens * shape.num_attention_heads * shape.head_dim
    keys = ops.tokens * shape.num_key_value_heads * shape.head_dim
    if ops.traits.fused_qkv != "split":
        q, k, v = (ops.view(fused, numel) for numel in (queries, keys, keys))
        return q, k, v
    q, k, v = ops.split(fused, (queries, keys, keys))
    return q, k, v


def _broadcast_groups(ops: Operations, fused: Tensor, shape: Architecture) -> tuple[Tensor, Tensor, Tensor]:
    """Falcon: q is a slice; k and v are taken out by index, several groups of them copied to all heads."""
    queries = ops.tokens * shape.num_attention_heads * shape.head_dim
    keys = ops.tokens * shape.num_key_value_heads * shape.head_dim
    q = ops.view(fused, queries)
    k, v = (ops.op((fused,), keys, fused.element) for _ in range(2))
    if shape.num_key_value_heads > 1:
        k, v = (ops.op((t,), queries, t.element) for t in (k, v))
        q = ops.op((q,), queries, q.element)
    ops.hold(fused)
    return q, k, v


def _behind_prefix(ops: Operations, x: Tensor, shape: Architecture) -> Tensor:
    """Keys or values of the trained prefix [b, k, n, d] and of the tokens, joined.

    The prefix's gradient is a part of the whole gradient, which therefore waits until those of all layers are
    there to be joined (peft_model.py, get_prompt; torch, cat_tensors_backward: narrow). Under autocast `cat`
    takes the widest type, the prefix's fp32.
    """
    x = ops.cast(x, max(x.element, ops.recipe.base))
    rows = ops.tokens // ops.seq_len * ops.prefix
    prefix = Tensor(rows * shape.num_key_value_heads * shape.head_dim, x.element, True)
    whole = block_bytes((prefix.numel + x.numel) * x.element)
    return ops.op((prefix, x), prefix.numel + x.numel, x.element, weight_bytes=whole)


def _cached(ops: Operations, k: Tensor, v: Tensor, plan: AttentionPlan, training: Training) -> None:
    """The cache holds keys and values, in the place of the prefix alone, to the end of the forward pass.

    Some models hand it out with the logits, whatever `use_cache` says: then as long as the loop has these.
    """
    returned = ops.traits.returns_cache and training.loop == "plain" and training.loss != "chunked"
    if returned:
        ops.nodes[-1].pinned = (k, v)
    for tensor in (k, v):
        held = tensor.size_bytes if (plan.repeated or ops.recipe.autocast) and not returned else 0
        ops.copied_bytes += held - tensor.size_bytes * ops.prefix // plan.keys


def _flash(
    ops: Operations, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, mask: Tensor | None = None
) -> Tensor:
    """Takes no mask. Keeps q, k, v, the output and the fp32 log-sum-exp [b, a, s].

    Backward (flash_api.cpp, mha_bwd): row sums [b, a, s] and dQ [b, s, a, d] in fp32, s rounded to 128
    and d to 32, above 128 to 64; dK and dV for all heads where heads are grouped; a copy of an output that
    does not lie as [b, s, a, d]. For each of several packed samples 128 rows more (mha_varlen_bwd).
    """
    b, a, s, d = plan.b, plan.a, plan.s, plan.d
    rows = s + 128 * plan.samples if plan.kernel == "varlen" else -(-s // 128) * 128
    multiple = 32 if d <= 128 else 64
    scratch = block_bytes(4 * b * a * rows) + block_bytes(4 * b * rows * a * (-(-d // multiple) * multiple))
    if ops.traits.rotary_cats and not plan.unpadded:
        scratch += q.size_bytes
    if plan.k != a:
        scratch += 2 * block_bytes(b * s * a * d * k.element)
    log_sum = Tensor(b * a * s, 4, False)
    return ops.op((q, k, v), q.numel, q.element, (q, k, v, log_sum), keeps_output=True, scratch_bytes=scratch)


def _cudnn(
    ops: Operations, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, mask: Tensor | None = None
) -> Tensor:
    """Keeps q, k, v, the output and the fp32 log-sum-exp [b, a, s].

    Backward (cudnn-frontend, CompositeSDPABackwardNode): sums [b, a, s] and dQ [b, a, s, d] in fp32, one
    block; what the engine asks for on top is not published.
    """
    log_sum = Tensor(plan.b * plan.a * plan.s, 4, False)
    inputs = (q, k, v, *_masks(ops, plan, q, mask))
    scratch = block_bytes(4 * plan.b * plan.a * plan.s * (1 + plan.d))
    return ops.op(inputs, q.numel, q.element, (*inputs, log_sum), keeps_output=True, scratch_bytes=scratch)


def _masks(ops: Operations, plan: AttentionPlan, q: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    """The mask that is given, or a layer's own copy, which the kernel keeps."""
    if mask is not None:
        return (mask,)
    return mask_of_layer(ops, plan, q.element) if plan.masked else ()


def _efficient(
    ops: Operations, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, mask: Tensor | None = None
) -> Tensor:
    """Keeps q, k, v, the output and the fp32 log-sum-exp [b, a, s rounded to 32].

    Backward (attention_backward.cu, kernel_backward.h): delta [b, a, s] in fp32 and dQ's accumulators;
    in fp32 also the product of gradient and output.
    """
    b, a, s, d = plan.b, plan.a, plan.s, plan.d
    tile = 64 if d <= 64 else 128
    accumulators = -(-s // tile) * -(-d // tile) * (16 + 4 * tile * tile)
    scratch = block_bytes(4 * b * a * s) + block_bytes(b * a * accumulators)
    if q.element == 4:
        scratch += q.size_bytes
    log_sum = Tensor(b * a * (-(-s // 32) * 32), 4, False)
    inputs = (q, k, v, *_masks(ops, plan, q, mask))
    return ops.op(inputs, q.numel, q.element, (*inputs, log_sum), keeps_output=True, scratch_bytes=scratch)


def _math(
    ops: Operations, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, mask: Tensor | None = None
) -> Tensor:
    """_scaled_dot_product_attention_math: scores and their softmax [b, a, s, s] in fp32.

    16-bit q, k and v are converted first, k and v repeated for all heads (transformers/attention.cpp). A
    single key head that is not (Falcon) is copied for all heads by each product (LinearAlgebra.cpp, matmul).
    """
    n = plan.b * plan.a * plan.s * plan.keys
    element = q.element
    q, k, v = (ops.cast(t, 4) for t in (q, k, v))
    broadcast = _broadcasts(ops, plan)
    if plan.k != plan.a and not plan.repeated and not broadcast:
        k, v = (ops.op((t,), q.numel, t.element) for t in (k, v))
    query, key = ops.scaled(q), ops.scaled(k)
    if broadcast:
        key = ops.op((key,), q.numel, key.element)
    scores = ops.op((query, key), n, 4, kept_factors(query, key))
    if mask is not None:
        scores = ops.in_place(scores, mask)
    probabilities = ops.op((scores,), n, 4, keeps_output=True, scratch_bytes=block_bytes(n * 4))
    dropped = ops.dropout(probabilities, plan.dropout)
    if broadcast:
        v = ops.op((v,), q.numel, v.element)
    out = ops.op((dropped, v), q.numel, 4, kept_factors(dropped, v))
    ops.hold(q, query, k)
    return ops.cast(out, element)


def _eager(
    ops: Operations,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    shape: Architecture,
    training: Training,
    *,
    wide: bool,
) -> Tensor:
    """Scores, softmax and dropout as [b, a, s, s] each; softmax in fp32 keeps its fp32 output.

    A 16-bit copy of the probabilities is kept for the product with v. softmax's backward holds the
    product of gradient and output (SoftMax.cu, softmax_backward_cuda_out). float16 is converted inside
    softmax (SoftMax.cpp, half to float); bfloat16 before it.
    """
    n = plan.b * plan.a * plan.s * plan.keys
    element = q.element
    # matmul folds b and a, for which it copies heads that lie side by side in a token
    cats, copied = ops.traits.rotary_cats, plan.repeated and plan.k > 1
    by_heads = (cats, copied or (cats and not plan.repeated), copied) if plan.b > 1 else (True, True, True)
    if ops.prefix:  # joined by heads
        by_heads = (by_heads[0], True, True)
    whole = q.numel if _broadcasts(ops, plan) else None
    q, k = (_by_heads(ops, t, already, whole) for t, already in zip((q, k), by_heads, strict=False))
    scores = ops.op((q, k), n, element, kept_factors(q, k))
    if ops.traits.scaled_scores:
        scores = ops.scaled(scores)
    if shape.attention_softcap is not None:
        inner = ops.scaled(scores)
        scores = ops.scaled(ops.op((inner,), n, element, keeps_output=True))
    autocast, unmasked = ops.recipe.autocast, scores
    if plan.masked:  # the mask has the embeddings' type: under autocast the sum is fp32
        scores = ops.op((scores,), n, 4 if autocast else element, aliases=not autocast)
    single = element if ops.traits.softmax_in_own_type and not autocast else 4
    converted = scores
    if single == 4 and training.precision != "fp16":
        converted = ops.cast(scores, 4)
    scratch = block_bytes(n * single)
    probabilities = ops.op((converted,), n, single, keeps_output=True, scratch_bytes=scratch)
    if ops.traits.scores_held != "no":
        ops.hold(unmasked)
    late = autocast and (wide or ops.traits.softmax_type_stays)  # the product with v converts
    if late:
        ops.hold(scores)
    weights = probabilities if late else ops.cast(probabilities, element)
    if not late:
        ops.hold(scores)
    dropped = ops.dropout(weights, shape.attention_dropout)
    ops.handed_out.append(dropped)
    dropped = ops.cast(dropped, element)
    v = _by_heads(ops, v, by_heads[2], whole)
    out = ops.op((dropped, v), q.numel, element, kept_factors(dropped, v))
    if ops.traits.scores_held == "function":
        ops.hold(unmasked, scores)
    return out


def _by_heads(ops: Operations, x: Tensor, already: bool, numel: int | None) -> Tensor:
    return x if already else ops.op((x,), numel or x.numel, x.element, aliases=True)


def _broadcasts(ops: Operations, plan: AttentionPlan) -> bool:
    """Whether each product copies a single key head for all heads: Falcon, which does not repeat it."""
    return plan.k == 1 < plan.a and ops.traits.fused_qkv == "groups"


KERNELS = {"flash": _flash, "varlen": _flash, "cudnn": _cudnn, "efficient": _efficient, "math": _math}
