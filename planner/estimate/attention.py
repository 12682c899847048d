"""Attention: the kernel that runs, and what it keeps.

Letters: `b` micro batch, `s` sequence, `a` heads, `k` key-value heads, `d` head width. Kernel choice:
torch 2.13, aten/src/ATen/native/transformers/cuda/sdp_utils.cpp; how transformers 5.23 calls it:
integrations/sdpa_attention.py and each model's `eager_attention_forward`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from planner.estimate.eager_forms import attention_with_alibi, attention_with_sinks
from planner.estimate.forms import LayerForm
from planner.estimate.masks import mask_of_layer
from planner.estimate.operations import Operations
from planner.estimate.resident import block_bytes
from planner.estimate.tape import Tensor
from planner.estimate.traits import TRAITS
from planner.model import Architecture
from planner.spec import Setup, Training

__all__ = ["AttentionPlan", "attention", "attention_plan"]

Kernel = Literal["flash", "efficient", "cudnn", "math", "eager"]
_FLASH_HEAD_LIMIT = 256  # sdp_utils.cpp: check_head_dim_size_flash
_CUDNN_HEAD_LIMIT = 128  # sdp_utils.cpp: check_cudnn_tensor_shapes
_CUDNN_HEAD_LIMIT_HOPPER = 256
_CUDNN_FIRST = ((9, 0), (10, 0), (10, 3))  # sdp_utils.cpp: check_prefer_cudnn_attention
_DEFAULT_CAPABILITY = (8, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionPlan:
    """`kernel` that runs; `masked`: a mask [b, 1, s, keys] is passed; `repeated`: k and v for all heads.

    `biased`: the mask is the model's own sum with ALiBi, [b, a, s, keys] in the embeddings' type.

    `keys` are the sequence's own and those of a prefix.
    """

    kernel: Kernel
    b: int
    s: int
    a: int
    k: int
    d: int
    keys: int
    masked: bool = False
    repeated: bool = False
    biased: bool = False
    dropout: float = 0.0


def attention_plan(
    shape: Architecture, form: LayerForm, setup: Setup, element: int, *, prefix: int = 0
) -> AttentionPlan:
    """The kernel for one layer, as torch chooses it for the GPU (none given: Ampere).

    `element` is the bytes of q, k and v. A mask (a sliding window that the sequence fills: transformers 5.23,
    masking_utils.py, `_ignore_causal_mask_sdpa`) rules out flash; then transformers repeats keys and values
    for all heads, which else only flash and cuDNN take grouped. cuDNN comes first on capability 9 and 10. The
    math kernel takes what no other does, so bfloat16 before Ampere (check_tensor_dtype,
    less_than_sm80_mem_efficient_dtypes).
    """
    training, traits = setup.training, TRAITS[shape.family]
    masked = prefix > 0 or traits.always_masked
    masked |= form.sliding and shape.sliding_window is not None and training.seq_len >= shape.sliding_window
    heads, groups = shape.num_attention_heads, shape.num_key_value_heads
    # Falcon: a single key head meets all heads in the products, which copy it where there are several
    # samples; several are copied to all heads before.
    broadcast = traits.fused_qkv == "groups" and groups < heads
    single = broadcast and groups == 1
    if broadcast and (groups > 1 or training.micro_batch_size == 1):
        groups = heads
    grouped = groups < heads and not broadcast
    plan = partial(
        AttentionPlan,
        b=training.micro_batch_size,
        s=training.seq_len,
        a=heads,
        k=groups,
        d=shape.head_dim,
        keys=training.seq_len + prefix,
        biased=traits.always_masked and shape.positions == "alibi",
        dropout=shape.attention_dropout,
    )
    if training.attention == "eager" or not shape.sdpa:
        return plan(kernel="eager", masked=True, repeated=groups < heads)
    if training.attention != "sdpa":
        repeated = grouped and (masked or training.attention == "efficient")
        return plan(kernel=training.attention, masked=masked, repeated=repeated)
    capability = (setup.gpu.capability if setup.gpu else None) or _DEFAULT_CAPABILITY
    half = element == 2 and capability >= (8, 0)
    d = shape.head_dim
    repeated = grouped and masked
    bf16_refused = element == 2 and not training.precision.startswith("fp16") and capability < (8, 0)
    bf16_refused |= single  # no kernel takes fewer key heads unless it is told
    kernel: Kernel = "math" if bf16_refused or (grouped and not masked) else "efficient"
    if half and not masked and d <= _FLASH_HEAD_LIMIT and not _flash_backward_fails(capability, shape):
        kernel = "flash"
    cudnn_limit = _CUDNN_HEAD_LIMIT_HOPPER if capability == (9, 0) else _CUDNN_HEAD_LIMIT
    if half and capability in _CUDNN_FIRST and d % 8 == 0 and d <= cudnn_limit:
        kernel = "cudnn"
    return plan(kernel=kernel, masked=masked, repeated=repeated)


def _flash_backward_fails(capability: tuple[int, int], shape: Architecture) -> bool:
    """sdp_utils.cpp: check_requires_grad_and_head_dim_gt192_constraints_on_sm86_89_or_120."""
    small_sm = (8, 6) <= capability <= (8, 9) or capability in ((12, 0), (12, 1))
    d = shape.head_dim
    return small_sm and (192 < d <= 224 or (d > 224 and shape.attention_dropout > 0))


def attention(ops: Operations, x: Tensor, shape: Architecture, form: LayerForm, setup: Setup) -> Tensor:
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
    wide = q.element > ops.recipe.compute  # rotated under autocast: the scores follow q's type
    variables = x, q, k, v
    if ops.recipe.autocast:
        q, k, v = (ops.cast(t, ops.recipe.compute) for t in (q, k, v))
    if ops.prefix:
        k, v = (_behind_prefix(ops, t, shape) for t in (k, v))
    plan = attention_plan(shape, form, setup, v.element, prefix=ops.prefix)
    if ops.prefix:
        _cached(ops, k, v, plan, setup.training)
    if plan.repeated:
        groups = shape.num_attention_heads // shape.num_key_value_heads
        # one key head spread over all heads is a view: repeat_kv's reshape finds nothing to copy
        spread = ops.view if plan.k == 1 else partial(_copied, ops)
        k, v = (spread(t, t.numel * groups) for t in (k, v))
    held: tuple[Tensor, ...] = ()
    if form.sinks:
        gradient = block_bytes(form.sinks * ops.recipe.base) if form.sinks_trained else 0
        out = attention_with_sinks(ops, q, k, v, plan, sinks_bytes=gradient)
    elif plan.kernel == "eager" and plan.biased:
        out, held = attention_with_alibi(ops, q, k, v, plan)
    elif plan.kernel == "eager":
        out = _eager(ops, q, k, v, plan, shape, setup.training, wide=wide)
    else:
        out = _KERNELS[plan.kernel](ops, q, k, v, plan)
    if ops.traits.rotary_cats and form.rotary and plan.kernel in ("flash", "cudnn"):
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
    there to be joined (peft_model.py, get_prompt; torch, cat_tensors_backward: narrow).
    """
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
        held = tensor.size_bytes if plan.repeated and not returned else 0
        ops.copied_bytes += held - tensor.size_bytes * ops.prefix // plan.keys


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


def _cudnn(ops: Operations, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """Keeps q, k, v, the output and the fp32 log-sum-exp [b, a, s].

    Backward (cudnn-frontend, CompositeSDPABackwardNode): sums [b, a, s] and dQ [b, a, s, d] in fp32, one
    block; what the engine asks for on top is not published.
    """
    kept: tuple[Tensor, ...] = (q, k, v, Tensor(plan.b * plan.a * plan.s, 4, False))
    if plan.masked:
        kept = (*kept, *mask_of_layer(ops, plan, q.element))
    scratch = block_bytes(4 * plan.b * plan.a * plan.s * (1 + plan.d))
    return ops.op((q, k, v), q.numel, q.element, kept, keeps_output=True, scratch_bytes=scratch)


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
        kept = (*kept, *mask_of_layer(ops, plan, q.element))
    return ops.op((q, k, v), q.numel, q.element, kept, keeps_output=True, scratch_bytes=scratch)


def _math(ops: Operations, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """_scaled_dot_product_attention_math: scores and their softmax [b, a, s, s] in fp32.

    16-bit q, k and v are converted first, k and v repeated for all heads (transformers/attention.cpp).
    """
    n = plan.b * plan.a * plan.s * plan.keys
    element = q.element
    q, k, v = (ops.cast(t, 4) for t in (q, k, v))
    if plan.k != plan.a and not plan.repeated:
        k, v = (ops.op((t,), q.numel, t.element) for t in (k, v))
    query, key = ops.scaled(q), ops.scaled(k)
    scores = ops.op((query, key), n, 4, (query, key))
    probabilities = ops.op((scores,), n, 4, keeps_output=True, scratch_bytes=block_bytes(n * 4))
    dropped = ops.dropout(probabilities, plan.dropout)
    out = ops.op((dropped, v), q.numel, 4, (dropped, v))
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
    if plan.b > 1:  # matmul folds b and a; heads that lie side by side in a token are copied for it
        cats, copied = ops.traits.rotary_cats, plan.repeated and plan.k > 1
        q, k, v = (
            t if contiguous else ops.op((t,), t.numel, t.element, aliases=True)
            for t, contiguous in ((q, cats), (k, copied or (cats and not plan.repeated)), (v, copied))
        )
    scores = ops.op((q, k), n, element, (q, k))
    if ops.traits.scaled_scores:
        scores = ops.scaled(scores)
    if shape.attention_softcap is not None:
        inner = ops.scaled(scores)
        scores = ops.scaled(ops.op((inner,), n, element, keeps_output=True))
    autocast = ops.recipe.autocast
    if plan.masked:  # the mask has the embeddings' type: under autocast the sum is fp32
        scores = ops.op((scores,), n, 4 if autocast else element, aliases=not autocast)
    single = element if ops.traits.softmax_in_own_type and not autocast else 4
    converted = scores
    if single == 4 and training.precision != "fp16":
        converted = ops.cast(scores, 4)
    scratch = block_bytes(n * single)
    probabilities = ops.op((converted,), n, single, keeps_output=True, scratch_bytes=scratch)
    late = autocast and (wide or ops.traits.softmax_type_stays)  # the product with v converts
    if late:
        ops.hold(scores)
    weights = probabilities if late else ops.cast(probabilities, element)
    if not late:
        ops.hold(scores)
    dropped = ops.dropout(weights, shape.attention_dropout)
    ops.handed_out.append(dropped)
    dropped = ops.cast(dropped, element)
    return ops.op((dropped, v), q.numel, element, (dropped, v))


_KERNELS = {"flash": _flash, "cudnn": _cudnn, "efficient": _efficient, "math": _math}
