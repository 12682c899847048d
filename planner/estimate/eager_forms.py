"""Eager attention of models with more than scores and a mask: learned sinks, ALiBi.

Letters: `b` micro batch, `a` heads, `s` sequence. Source: transformers 5.23, `eager_attention_forward` of
models/gpt_oss/modeling_gpt_oss.py and `FalconAttention.forward` of models/falcon/modeling_falcon.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from planner.estimate.nodes import Tensor, kept_factors
from planner.estimate.operations import Operations
from planner.estimate.resident import block_bytes

if TYPE_CHECKING:
    from planner.estimate.attention_plan import AttentionPlan

__all__ = ["attention_with_alibi", "attention_with_sinks"]

_INDEX_BYTES = 8  # int64


def attention_with_sinks(
    ops: Operations, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, *, sinks_bytes: int
) -> Tensor:
    """Scores joined with the sinks [b, a, s, s + 1], less each row's largest, and their softmax (kept).

    All in the scores' own type, fp32 under autocast. The places of the largest are kept, and the shares as a
    view of the softmax; masked and shifted scores are variables of the function. `sinks_bytes`: the sinks'
    gradient where they are trained.
    """
    rows = plan.b * plan.a * plan.s
    n = rows * plan.keys
    scores = ops.scaled(ops.op((q, k), n, q.element, kept_factors(q, k)))
    autocast = ops.recipe.autocast
    element = 4 if autocast else q.element
    masked = ops.op((scores,), n, element, aliases=not autocast)
    joined = ops.op((masked,), n + rows, element, weight_bytes=sinks_bytes)
    wide = block_bytes((n + rows) * element)
    largest = ops.op((joined,), rows, element, (Tensor(rows, _INDEX_BYTES, False),))
    shifted = ops.op((joined, largest), n + rows, element, aliases=True, scratch_bytes=wide)
    shares = ops.op((shifted,), n + rows, element, keeps_output=True, scratch_bytes=wide)
    weights = ops.cast(ops.dropout(ops.view(shares, n), plan.dropout), v.element)
    ops.hold(masked)
    ops.handed_out.append(weights)
    out = ops.op((weights, v), q.numel, q.element, kept_factors(weights, v))
    ops.hold(shifted)
    return out


def attention_with_alibi(
    ops: Operations, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Falcon's scores [b, a, s, s] in fp32, with ALiBi and the mask added; their softmax in x's type (kept).

    The product, its fp32 copy and the scaled sum (scaled in place) are variables of the layer's attention and
    come back beside its output; the masked sum is one of softmax's own.
    """
    n = plan.b * plan.a * plan.s * plan.keys
    element = q.element
    if plan.b > 1:  # matmul folds b and a, which lie apart in the fused product
        q, k = (ops.op((t,), t.numel, t.element, aliases=True) for t in (q, k))
    product = ops.op((q, k), n, element, kept_factors(q, k))
    scores = ops.cast(product, 4)
    biased = ops.op((scores,), n, 4, aliases=True)
    scaled = ops.view(biased, n)  # in place; its gradient is a new tensor
    masked = ops.op((scaled,), n, 4, aliases=True)
    single = 4 if ops.recipe.autocast else element
    converted = ops.cast(masked, single)
    shares = ops.op((converted,), n, single, keeps_output=True, scratch_bytes=block_bytes(n * single))
    ops.hold(masked)
    dropped = ops.dropout(shares, plan.dropout)
    ops.handed_out.append(dropped)
    weights = ops.cast(dropped, element)
    if plan.b > 1:
        v = ops.op((v,), v.numel, v.element, aliases=True)
    out = ops.op((weights, v), q.numel, element, kept_factors(weights, v))
    return out, (product, scores, biased)
