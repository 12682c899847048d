"""Attention with learned sinks: one more score in each row, which takes a share and is dropped.

Letters: `b` micro batch, `a` heads, `s` sequence. Source: transformers 5.23, models/gpt_oss/modeling_gpt_oss.py,
`eager_attention_forward`: no fused kernel of torch takes sinks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from planner.estimate.operations import Operations
from planner.estimate.resident import block_bytes
from planner.estimate.tape import Tensor

if TYPE_CHECKING:
    from planner.estimate.attention import AttentionPlan

__all__ = ["attention_with_sinks"]

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
    scores = ops.scaled(ops.op((q, k), n, q.element, (q, k)))
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
    out = ops.op((weights, v), q.numel, q.element, (weights, v))
    ops.hold(shifted)
    return out
