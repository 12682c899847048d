"""Flash attention on padded samples: the padding is taken out before the kernel and put back behind it.

Letters: `n` tokens of all samples without padding, T = b s with it. Source: transformers 5.23,
modeling_flash_attention_utils.py, `_upad_input` and `_pad_input`.
"""

from __future__ import annotations

from planner.estimate.attention_plan import AttentionPlan
from planner.estimate.nodes import Tensor
from planner.estimate.operations import Operations
from planner.estimate.resident import block_bytes
from planner.sorting import index_put_bytes

__all__ = ["Places", "padded", "unpadded"]

Places = tuple[Tensor, Tensor]  # of all tokens that are no padding [n] (int64), and where samples begin


def unpadded(
    ops: Operations, tensors: tuple[Tensor, ...], plan: AttentionPlan, *, by_heads: tuple[bool, ...]
) -> tuple[tuple[Tensor, ...], Places]:
    """q, k and v without padding: copies of n tokens. Their gradients are added into zeros of T tokens.

    What lies `by_heads` in several rows is copied first, to stand token by token.
    """
    places = Tensor(plan.s, 8, False), Tensor(plan.samples + 1, 4, False)
    scratch = sum(block_bytes(size) for size in index_put_bytes(plan.s))
    taken = []
    for tensor, turned in zip(tensors, by_heads, strict=True):
        rows = ops.op((tensor,), tensor.numel, tensor.element) if turned and plan.unpadded > 1 else tensor
        numel = tensor.numel // ops.tokens * plan.s
        taken.append(ops.op((rows,), numel, tensor.element, places[:1], scratch_bytes=scratch))
    return tuple(taken), places


def padded(ops: Operations, out: Tensor, places: Places, plan: AttentionPlan) -> Tensor:
    """Zeros of T tokens with the n in their places."""
    return ops.op((out,), out.numel // plan.s * ops.tokens, out.element, places)
