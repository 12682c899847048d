"""Attention: the kernel that runs, and what it keeps.

Letters: `b` micro batch, `s` sequence, `a` heads, `k` key-value heads, `d` head width. Kernel choice:
torch 2.13, aten/src/ATen/native/transformers/cuda/sdp_utils.cpp; how transformers 5.23 calls it:
integrations/sdpa_attention.py and each model's `eager_attention_forward`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from planner.estimate.forms import LayerForm
from planner.estimate.operations import Operations
from planner.estimate.resident import block_bytes
from planner.estimate.tape import Tensor
from planner.model import Architecture
from planner.spec import Training

__all__ = ["AttentionPlan", "attention", "attention_plan"]

Kernel = Literal["flash", "efficient", "cudnn", "math", "eager"]
_FLASH_HEAD_LIMIT = 256  # sdp_utils.cpp: check_head_dim_size_flash


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionPlan:
    """`kernel` that runs; `masked`: a mask [b, 1, s, s] is passed; `repeated`: k and v for all heads."""

    kernel: Kernel
    b: int
    s: int
    a: int
    k: int
    d: int
    masked: bool = False
    repeated: bool = False
    dropout: float = 0.0


def attention_plan(shape: Architecture, form: LayerForm, training: Training, element: int) -> AttentionPlan:
    """The kernel for one layer. `element` is the bytes of q, k and v.

    Without a mask flash serves 16-bit types and the memory-efficient kernel fp32; grouped heads in fp32
    have the math kernel only (sdp_utils.cpp, check_for_nested_inputs and enable_gqa). A mask
    (sliding window shorter than the sequence) leaves the memory-efficient kernel.
    """
    masked = form.sliding and shape.sliding_window is not None and training.seq_len > shape.sliding_window
    grouped = shape.num_key_value_heads < shape.num_attention_heads
    plan = partial(
        AttentionPlan,
        b=training.micro_batch_size,
        s=training.seq_len,
        a=shape.num_attention_heads,
        k=shape.num_key_value_heads,
        d=shape.head_dim,
        dropout=shape.attention_dropout,
    )
    if training.attention == "eager" or not shape.sdpa:
        return plan(kernel="eager", masked=True, repeated=grouped)
    if training.attention == "efficient" or masked:
        return plan(kernel="efficient", masked=masked, repeated=grouped)
    if training.attention == "cudnn":
        return plan(kernel="cudnn")
    if element == 2 and shape.head_dim <= _FLASH_HEAD_LIMIT:
        return plan(kernel="flash")
    return plan(kernel="math" if grouped else "efficient")


def attention(ops: Operations, x: Tensor, shape: Architecture, form: LayerForm, training: Training) -> Tensor:
    """Attention of x [T, h] over itself: projections, positions, the kernel, the output projection."""
    q, k, v = _queries_keys_values(ops, x, shape, form)
    if form.head_norms and shape.qk_norm != "none":
        q = ops.norm(q, form.head_norms[0], shape.norm)
        k = ops.norm(k, form.head_norms[1], shape.norm)
    if shape.positions == "rope" and form.rotary:
        share = (shape.rotary_dim or shape.head_dim) / shape.head_dim
        plain = q, k
        q, k = (ops.rotary(t, share, cats=ops.traits.rotary_cats) for t in plain)
        ops.hold(*plain)
    if ops.recipe.autocast:
        q, k, v = (ops.cast(t, ops.recipe.compute) for t in (q, k, v))
    plan = attention_plan(shape, form, training, v.element)
    if plan.repeated:
        groups = shape.num_attention_heads // shape.num_key_value_heads
        k, v = (ops.op((t,), t.numel * groups, t.element) for t in (k, v))
    if plan.kernel == "eager":
        out = _eager(ops, q, k, v, plan, shape, training)
    else:
        out = _KERNELS[plan.kernel](ops, q, k, v, plan)
    if ops.traits.rotary_cats and form.rotary and plan.kernel == "flash":
        out = ops.op((out,), out.numel, out.element)  # flash answers in q's layout, which `cat` changed
    answer = ops.linear(out, form.attention_output)
    ops.hold(x, q, k, v)
    return answer



def _queries_keys_values(
    ops: Operations, x: Tensor, shape: Architecture, form: LayerForm
) -> tuple[Tensor, Tensor, Tensor]:
    """q [T, a d], k and v [T, k d], from three layers or one."""
    if len(form.attention_inputs) == 3:
        q, k, v = (ops.linear(x, linear) for linear in form.attention_inputs)
        return (ops.scaled(q) if ops.traits.scaled_queries else q), k, v
    fused = ops.linear(x, form.attention_inputs[0])
    queries = ops.tokens * shape.num_attention_heads * shape.head_dim
    keys = ops.tokens * shape.num_key_value_heads * shape.head_dim
    if ops.traits.fused_qkv == "slices":
        q, k, v = (ops.view(fused, numel) for numel in (queries, keys, keys))
        return q, k, v
    q, k, v = ops.split(fused, (queries, keys, keys))
    return q, k, v


def _flash(ops: Operations, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """Keeps q, k, v, the output and the fp32 log-sum-exp [b, a, s].

    Backward (flash_api.cpp, mha_bwd): row sums [b, a, s] and dQ [b, s, a, d] in fp32, s rounded to 128
    and d to 32; dK and dV for all heads where heads are grouped.
    """
    b, a, s, d = plan.b, plan.a, plan.s, plan.d
    rows = -(-s // 128) * 128
    head = -(-d // 32) * 32 if d <= 192 else 256
    scratch = block_bytes(4 * b * a * rows) + block_bytes(4 * b * rows * a * head)
    if plan.k != a:
        scratch += 2 * block_bytes(b * s * a * d * k.element)
    log_sum = Tensor(b * a * s, 4, False)
    return ops.op((q, k, v), q.numel, q.element, (q, k, v, log_sum), keeps_output=True, scratch_bytes=scratch)


def _efficient(ops: Operations, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
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
    kept: tuple[Tensor, ...] = (q, k, v, log_sum)
    if plan.masked:
        kept = (*kept, Tensor(b * s * (-(-s // 16) * 16), q.element, False))
    return ops.op((q, k, v), q.numel, q.element, kept, keeps_output=True, scratch_bytes=scratch)


def _math(ops: Operations, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """_scaled_dot_product_attention_math: k and v repeated, scores and their softmax [b, a, s, s]."""
    n = plan.b * plan.a * plan.s**2
    groups = q.numel // k.numel
    if groups > 1:
        k, v = (ops.op((t,), q.numel, t.element) for t in (k, v))
    q, k = ops.scaled(q), ops.scaled(k)
    scores = ops.op((q, k), n, q.element, (q, k))
    scratch = block_bytes(n * q.element)
    probabilities = ops.op((scores,), n, q.element, keeps_output=True, scratch_bytes=scratch)
    return ops.op((probabilities, v), q.numel, q.element, (probabilities, v))


def _eager(
    ops: Operations,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    shape: Architecture,
    training: Training,
) -> Tensor:
    """Scores, softmax and dropout as [b, a, s, s] each; softmax in fp32 keeps its fp32 output.

    A 16-bit copy of the probabilities is kept for the product with v. softmax's backward holds the
    product of gradient and output (SoftMax.cu, softmax_backward_cuda_out). float16 is converted inside
    softmax (SoftMax.cpp, half to float); bfloat16 before it.
    """
    n = plan.b * plan.a * plan.s**2
    element = q.element
    if plan.b > 1:  # matmul folds b and a; heads that lie side by side in a token are copied for it
        cats = ops.traits.rotary_cats
        q, k, v = (
            t if contiguous else ops.op((t,), t.numel, t.element, aliases=True)
            for t, contiguous in ((q, cats), (k, cats or plan.repeated), (v, plan.repeated))
        )
    scores = ops.op((q, k), n, element, (q, k))
    if ops.traits.scaled_scores:
        scores = ops.scaled(scores)
    if shape.attention_softcap is not None:
        inner = ops.scaled(scores)
        scores = ops.scaled(ops.op((inner,), n, element, keeps_output=True))
    if plan.masked:
        scores = ops.op((scores,), n, element, aliases=True)
    single = element if ops.traits.softmax_in_own_type and not ops.recipe.autocast else 4
    converted = scores
    if element == 2 and single == 4 and training.precision != "fp16":
        converted = ops.cast(scores, 4)
    scratch = block_bytes(n * single)
    probabilities = ops.op((converted,), n, single, keeps_output=True, scratch_bytes=scratch)
    weights = ops.cast(probabilities, element)
    ops.hold(scores)
    dropped = ops.dropout(weights, shape.attention_dropout)
    return ops.op((dropped, v), q.numel, element, (dropped, v))


_KERNELS = {"flash": _flash, "cudnn": _flash, "efficient": _efficient, "math": _math}
