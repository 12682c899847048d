"""Operations that take another path on CUDA than on `meta`: dropout, softmax, attention's choice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from planner.errors import TraceError
from tests.simulate.watched import Watched, meta, watched

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    "dropout",
    [lambda x: F.dropout(x, 0.1), nn.Dropout(0.1), lambda x: torch.dropout(x, 0.1, True)],
    ids=("functional", "module", "torch"),
)
def test_dropout_keeps_a_mask_of_one_byte_a_number(dropout: Any) -> None:
    x = meta(64, 256, grad=True)
    seen = watched(lambda: dropout(x))
    assert seen.taken == [("aten.native_dropout.default", size) for size in (64 * 256 * 4, 64 * 256)]


def test_dropout_of_nothing_is_no_operation() -> None:
    x = meta(64, 256)
    assert not watched(lambda: (F.dropout(x, 0.0), F.dropout(x, 0.5, training=False))).taken


def test_half_to_float_softmax_is_fused_for_fp16_alone() -> None:
    half, brain = meta(8, 512, dtype=HALF), meta(8, 512, dtype=BRAIN)
    size = 8 * 512 * 4
    for owner in (F, torch, torch.Tensor):
        fused = watched(lambda o=owner: o.softmax(half, dim=-1, dtype=SINGLE))
        assert fused.taken == [("aten._softmax.default", size)]
        copied = watched(lambda o=owner: o.softmax(brain, dim=-1, dtype=SINGLE))
        assert copied.taken == [("aten._to_copy.default", size), ("aten._softmax.default", size)]
        log = watched(lambda o=owner: o.log_softmax(half, dim=-1, dtype=SINGLE))
        assert log.taken == [("aten._log_softmax.default", size)]


def test_softmax_without_a_type_stays_as_it_is() -> None:
    half = meta(8, 512, dtype=HALF)
    seen = watched(lambda: F.softmax(half, dim=-1))
    assert seen.taken == [("aten._softmax.default", 8 * 512 * 2)]


def test_other_devices_are_left_alone() -> None:
    def run() -> None:
        F.dropout(torch.ones(4, 4), 0.5)
        F.softmax(torch.ones(4, 4), -1)
        F.scaled_dot_product_attention(*torch.ones(3, 1, 1, 4, 8))

    assert not watched(run).taken


def attended(
    *,
    dtype: torch.dtype = BRAIN,
    heads: int = 8,
    key_heads: int = 8,
    head: int = 64,
    mask: bool | torch.dtype = False,
    mask_trained: bool = False,
    gpu: str | None = None,
    pin: SDPBackend | None = None,
    backward: bool = False,
    grouped: bool | None = None,
) -> Watched:
    query = meta(2, heads, 128, head, dtype=dtype, grad=backward)
    key, value = (meta(2, key_heads, 128, head, dtype=dtype, grad=backward) for _ in range(2))
    bias = meta(2, 1, 128, 128, dtype=mask if isinstance(mask, torch.dtype) else torch.bool) if mask else None
    if bias is not None and mask_trained:
        bias.requires_grad_()

    def run() -> torch.Tensor:
        enabled = key_heads != heads if grouped is None else grouped
        out = F.scaled_dot_product_attention(query, key, value, bias, enable_gqa=enabled)
        return out.sum() if backward else out

    if pin is None:
        return watched(run, gpu=gpu, backward=backward)
    with sdpa_kernel(pin):
        return watched(run, gpu=gpu, backward=backward)


def kernel_of(seen: Watched) -> str:
    ops = [each.op for each in seen.taken]
    for name in ("flash", "efficient", "cudnn"):
        if f"aten._scaled_dot_product_{name}_attention.default" in ops:
            return name
    return "math"


@pytest.mark.parametrize(
    "choice, kernel",
    [
        ({}, "flash"),  # sdp_utils.cpp: flash first, for 16 bit
        ({"dtype": HALF}, "flash"),
        ({"dtype": SINGLE}, "efficient"),
        ({"mask": True}, "efficient"),  # flash takes no mask
        ({"mask": BRAIN}, "efficient"),
        ({"key_heads": 2}, "flash"),  # and takes grouped heads
        ({"key_heads": 2, "mask": True}, "math"),  # as the efficient kernel does not
        ({"key_heads": 2, "dtype": SINGLE}, "math"),
        ({"key_heads": 1, "grouped": False}, "math"),  # Falcon: one key head broadcast to all
        ({"head": 256}, "flash"),
        ({"head": 512}, "efficient"),  # check_head_dim_size_flash
        ({"head": 6, "dtype": SINGLE}, "math"),  # no multiple of 4
        ({"gpu": "t4", "dtype": HALF}, "efficient"),  # flash needs capability 8.0
        ({"gpu": "t4"}, "math"),  # and the efficient kernel needs it for bf16
        ({"gpu": "h100"}, "cudnn"),  # check_prefer_cudnn_attention
        ({"gpu": "b200"}, "cudnn"),
        ({"gpu": "rtx-5090"}, "flash"),
        ({"gpu": "h100", "head": 256}, "cudnn"),  # check_cudnn_tensor_shapes, cuDNN 9.10 and newer
        ({"gpu": "b200", "head": 256}, "flash"),
        ({"gpu": "h100", "mask": BRAIN}, "cudnn"),
        ({"gpu": "h100", "mask": BRAIN, "mask_trained": True}, "efficient"),  # check_attn_mask_shape
        ({"gpu": "rtx 4090", "head": 224, "backward": True}, "efficient"),  # no flash backward above 192,
        ({"gpu": "rtx 4090", "head": 192, "backward": True}, "flash"),
        ({"gpu": "rtx 4090", "head": 256, "backward": True}, "flash"),  # but for 256 without dropout
        ({"gpu": "h100", "dtype": SINGLE}, "efficient"),
        ({"pin": SDPBackend.MATH}, "math"),
        ({"pin": SDPBackend.EFFICIENT_ATTENTION}, "efficient"),
        ({"pin": SDPBackend.CUDNN_ATTENTION}, "cudnn"),
        ({"gpu": "h100", "pin": SDPBackend.FLASH_ATTENTION}, "flash"),
    ],
    ids=str,
)
def test_attention_is_chosen_as_cuda_chooses(choice: dict[str, Any], kernel: str) -> None:
    assert kernel_of(attended(**choice)) == kernel


def test_a_kernel_that_cannot_be_taken_is_an_error_of_one_line() -> None:
    with pytest.raises(TraceError, match=r"no attention kernel takes float32 heads of 64") as error:
        attended(dtype=SINGLE, pin=SDPBackend.FLASH_ATTENTION)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_math_kernel_masks_in_place_and_drops_with_a_mask_of_bytes(dropout: float) -> None:
    """attention.cpp, _scaled_dot_product_attention_math: scores and their softmax, `add_`, native_dropout."""
    query = meta(2, 8, 128, 64, dtype=SINGLE)
    key = meta(2, 2, 128, 64, dtype=SINGLE)
    seen = watched(
        lambda: F.scaled_dot_product_attention(
            query, key, key, is_causal=True, dropout_p=dropout, enable_gqa=True
        )
    )
    scores = 2 * 8 * 128 * 128
    assert [seen.by("bmm.default")[at] for at in (0, -1)] == [scores * 4, 2 * 8 * 128 * 64 * 4]
    assert seen.by("_safe_softmax.default") == [scores * 4]
    assert not [size for size in seen.by("add.Tensor") + seen.by("add_.Tensor") if size]
    assert seen.by("native_dropout.default") == ([scores * 4, scores] if dropout else [])
    assert seen.by("clone.default")[:2] == [2 * 8 * 128 * 64 * 4] * 2  # keys and values for all heads


def test_flash_keeps_its_row_sums_and_pads_the_head() -> None:
    rows = 2 * 8 * 128
    seen = attended()
    assert seen.by("_scaled_dot_product_flash_attention.default")[:2] == [rows * 64 * 2, rows * 4]
    padded = attended(head=60)
    assert padded.by("constant_pad_nd.default") == [rows * 64 * 2] * 3
    assert padded.by("_scaled_dot_product_flash_attention.default")[0] == rows * 64 * 2


def test_a_mask_is_one_copy_in_the_queries_type_padded_to_sixteen() -> None:
    query = meta(2, 8, 100, 64, dtype=HALF)
    mask = meta(2, 1, 100, 100, dtype=torch.bool)
    seen = watched(lambda: F.scaled_dot_product_attention(query, query, query, mask))
    assert seen.by("where.self") == [2 * 100 * 100 * 2]
    assert seen.by("constant_pad_nd.default") == [2 * 100 * 112 * 2]  # attention.cpp: to multiples of 16


def test_flash_backward_scratch_by_hand() -> None:
    rows = 2 * 8 * 128
    wide = rows * 64 * 2
    seen = attended(backward=True)
    copied = [wide, wide]  # attention_backward.cu: gradient and output lie by heads here, as the queries do
    scratch = [rows * 4, rows * 64 * 4]  # flash_api.cpp, mha_bwd: row sums, dQ in fp32
    gradients = [wide, wide, wide]
    taken = seen.by("_scaled_dot_product_flash_attention_backward.default")
    assert taken == [*gradients, *copied, *scratch]
    grouped = attended(key_heads=2, backward=True)
    taken = grouped.by("_scaled_dot_product_flash_attention_backward.default")
    assert taken[3:] == [*copied, *scratch, wide, wide]


def test_efficient_backward_scratch_by_hand() -> None:
    rows = 2 * 8 * 128
    tiles = 2 * 8 * (128 // 64) * (64 // 64) * (16 + 4 * 64 * 64)  # kernel_backward.h: dQ's accumulators
    seen = attended(dtype=HALF, gpu="t4", backward=True)
    assert seen.by("_scaled_dot_product_efficient_attention_backward.default")[-2:] == [rows * 4, tiles]
    whole = attended(dtype=SINGLE, backward=True)
    sizes = whole.by("_scaled_dot_product_efficient_attention_backward.default")
    assert sizes[-3:] == [rows * 64 * 4, rows * 4, tiles]
    large = attended(dtype=HALF, gpu="t4", head=128, backward=True)
    tiles = 2 * 8 * 1 * 1 * (16 + 4 * 128 * 128)
    assert large.by("_scaled_dot_product_efficient_attention_backward.default")[-1] == tiles


def test_cudnn_s_backward_takes_sums_and_queries_in_fp32_as_one_block() -> None:
    """cudnn-frontend, CompositeSDPABackwardNode, non-deterministic with cuDNN 9: softmax_sum and dQ_accum."""
    seen = attended(gpu="h100", heads=6, key_heads=6, head=80, backward=True)
    rows = 2 * 6 * 128
    taken = seen.by("_scaled_dot_product_cudnn_attention_backward.default")
    assert taken == [rows * 80 * 2] * 3 + [rows * 4 + rows * 80 * 4]
