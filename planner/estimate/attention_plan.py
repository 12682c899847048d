"""Which attention kernel a layer runs, and on what.

Letters: `b` micro batch, `s` sequence, `a` heads, `k` key-value heads, `d` head width. Kernel choice:
torch 2.13, aten/src/ATen/native/transformers/cuda/sdp_utils.cpp; how transformers 5.23 calls it:
integrations/sdpa_attention.py and each model's `eager_attention_forward`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from planner.attention import FLASH_HEAD_LIMIT, cudnn_head_limit, flash_backward_fails
from planner.batching import has_masks, row_shape, sample_lengths, takes_lengths, unpads
from planner.estimate.forms import LayerForm
from planner.estimate.traits import TRAITS
from planner.model import Architecture
from planner.spec import Setup

__all__ = ["AttentionPlan", "attention_plan"]

Kernel = Literal["flash", "varlen", "efficient", "cudnn", "math", "eager"]
_CUDNN_FIRST = ((9, 0), (10, 0), (10, 3))  # sdp_utils.cpp: check_prefer_cudnn_attention
_DEFAULT_CAPABILITY = (8, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionPlan:
    """`kernel` that runs; `masked`: a mask [b, 1, s, keys] is passed; `repeated`: k and v for all heads.

    `biased`: the mask is the model's own sum with ALiBi, [b, a, s, keys] in the embeddings' type. `keys` are
    the sequence's own and those of a prefix, `samples` how many are packed into the row, `unpadded` out of
    how many rows padding was taken for it.
    """

    kernel: Kernel
    b: int
    s: int
    a: int
    k: int
    d: int
    keys: int
    samples: int = 1
    unpadded: int = 0
    masked: bool = False
    repeated: bool = False
    biased: bool = False
    dropout: float = 0.0


def attention_plan(
    shape: Architecture, form: LayerForm, setup: Setup, element: int, *, prefix: int = 0
) -> AttentionPlan:
    """The kernel for one layer, as torch chooses it for the GPU (none given: Ampere).

    `element` is the bytes of q, k and v. A mask (a sliding window not longer than the sequence, padding,
    several samples in a row) rules out flash, but for the one told their lengths (`varlen`); then
    transformers repeats keys and values for all heads, which else only flash and cuDNN take grouped. cuDNN
    comes first on capability 9 and 10. The math kernel takes what no other does, so bfloat16 before Ampere
    (check_tensor_dtype, less_than_sm80_mem_efficient_dtypes).
    """
    training, traits = setup.training, TRAITS[shape.family]
    rows, length = row_shape(training)
    masked = prefix > 0 or traits.always_masked or has_masks(training)
    masked |= form.sliding and shape.sliding_window is not None and length >= shape.sliding_window
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
        b=rows,
        s=length,
        a=heads,
        k=groups,
        d=shape.head_dim,
        keys=length + prefix,
        biased=traits.always_masked and shape.positions == "alibi",
        dropout=shape.attention_dropout,
    )
    if training.attention == "eager" or not shape.sdpa:
        return plan(kernel="eager", masked=True, repeated=groups < heads)
    if takes_lengths(training):
        return plan(kernel="varlen", samples=training.micro_batch_size)
    if unpads(training):
        tokens = sum(sample_lengths(training))
        return replace(plan(kernel="varlen", samples=rows, unpadded=rows), b=1, s=tokens, keys=tokens)
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
    trainable = not flash_backward_fails(capability, d, shape.attention_dropout)
    if half and not masked and d <= FLASH_HEAD_LIMIT and trainable:
        kernel = "flash"
    if half and capability in _CUDNN_FIRST and d % 8 == 0 and d <= cudnn_head_limit(capability):
        kernel = "cudnn"
    return plan(kernel=kernel, masked=masked, repeated=repeated)
