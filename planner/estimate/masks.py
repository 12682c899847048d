"""The mask as an attention kernel takes it, and whether layers share the model's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from planner.estimate.nodes import Tensor
from planner.estimate.operations import Operations

if TYPE_CHECKING:
    from planner.estimate.attention_plan import AttentionPlan

__all__ = ["mask_of_layer", "shares_mask"]

_BIAS_MULTIPLE = 16  # attention.cpp, pad_bias: rows of a mask for the efficient kernel


def mask_of_layer(ops: Operations, plan: AttentionPlan, element: int) -> tuple[Tensor, ...]:
    """A layer's own copy of the mask in q's type; () where the kernel takes the model's own.

    Made from bools, cast by autocast, or padded to a multiple of 16 (transformers/attention.cpp).
    """
    if shares_mask(plan, ops.recipe.base, element):
        return ()
    heads = plan.a if plan.biased else 1
    return (ops.op((), plan.b * heads * plan.s * _row(plan), element),)


def shares_mask(plan: AttentionPlan, base: int, element: int) -> bool:
    """Whether autograd keeps the model's own mask: fused, in q's type, and with rows that need no padding."""
    fused = plan.kernel in ("efficient", "cudnn")
    return fused and plan.biased and base == element and _row(plan) == plan.keys


def _row(plan: AttentionPlan) -> int:
    return plan.keys if plan.kernel == "cudnn" else -(-plan.keys // _BIAS_MULTIPLE) * _BIAS_MULTIPLE
