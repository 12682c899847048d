"""CUDA's autocast on `meta`: its lists of operations, and how long a cast weight lives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from planner.simulate.autocast import CudaAutocast
from planner.simulate.simulation import Simulation
from tests.simulate.watched import Watched, meta, watched

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


def cast(run: Callable[[], Any], dtype: torch.dtype | None = BRAIN, **options: Any) -> Watched:
    def inside() -> Any:
        with torch.autocast("cuda", dtype=dtype):
            return run()

    return watched(inside, **options)


def result_type(run: Callable[[], torch.Tensor]) -> torch.dtype:
    found = []
    cast(lambda: found.append(run().dtype))
    return found[0]


@pytest.mark.parametrize(
    "run",
    [
        lambda: F.linear(meta(8, 8), meta(8, 8)),
        lambda: torch.matmul(meta(8, 8), meta(8, 8)),
        lambda: meta(8, 8) @ meta(8, 8),
        lambda: torch.bmm(meta(2, 8, 8), meta(2, 8, 8)),
        lambda: torch.einsum("ij,jk->ik", meta(8, 8), meta(8, 8)),
        lambda: F.scaled_dot_product_attention(*(meta(1, 2, 8, 16) for _ in range(3))),
        lambda: F.conv1d(meta(1, 4, 8), meta(4, 4, 3)),
    ],
)
def test_products_run_in_the_compute_type(run: Callable[[], torch.Tensor]) -> None:
    assert result_type(run) == BRAIN  # autocast_mode.h: AT_FORALL_LOWER_PRECISION_FP


@pytest.mark.parametrize(
    "run",
    [
        lambda x: F.layer_norm(x, (8,)),
        lambda x: F.cross_entropy(x, meta(8, dtype=torch.int64)),
        lambda x: x.softmax(-1),
        lambda x: torch.log_softmax(x, -1),
        lambda x: x.sum(),
        lambda x: x.pow(2),
        lambda x: torch.rsqrt(x),
        lambda x: torch.exp(x),
        lambda x: x.cumsum(0),
    ],
)
def test_what_needs_range_runs_in_fp32(run: Callable[[torch.Tensor], torch.Tensor]) -> None:
    half = meta(8, 8, dtype=BRAIN)
    assert result_type(lambda: run(half)) == SINGLE  # AT_FORALL_FP32, AT_FORALL_FP32_SET_OPT_DTYPE


@pytest.mark.parametrize(
    "run", [lambda x: x + x, lambda x: F.gelu(x), lambda x: x.relu(), lambda x: x.mean(0)]
)
def test_the_rest_keeps_its_type(run: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for dtype in (BRAIN, SINGLE):
        x = meta(8, 8, dtype=dtype)
        assert result_type(lambda x=x: run(x)) == dtype


def test_a_type_asked_for_is_kept() -> None:
    half = meta(8, 8, dtype=BRAIN)
    assert result_type(lambda: half.softmax(-1, dtype=BRAIN)) == BRAIN


def casts(seen: Watched) -> int:
    return len(seen.by("_to_copy.default"))


def test_a_trained_weight_is_cast_once_a_frozen_one_at_every_use() -> None:
    x = meta(8, 64, dtype=BRAIN)
    for grad, count in ((True, 1), (False, 3)):  # autocast_mode.cpp, cached_cast: leaves that require grad
        weight = meta(64, 64, grad=grad)
        seen = cast(lambda w=weight: [F.linear(x, w) for _ in range(3)])
        assert casts(seen) == count


def test_what_is_no_leaf_is_cast_at_every_use() -> None:
    x, weight = meta(8, 64, dtype=BRAIN), meta(64, 64, grad=True)

    def run() -> None:
        double = weight * 2
        for _ in range(3):
            F.linear(x, double)

    assert casts(cast(run)) == 3


def test_cast_weights_die_with_the_outermost_region() -> None:
    x, weight = meta(8, 64, dtype=BRAIN), meta(64, 64, grad=True)

    def run() -> None:
        for _ in range(2):
            with torch.autocast("cuda", dtype=BRAIN):
                with torch.autocast("cuda", dtype=BRAIN):
                    F.linear(x, weight)
                F.linear(x, weight)
            assert not CudaAutocast.regions

    assert casts(watched(run)) == 2


def test_a_region_can_switch_casting_off() -> None:
    x, weight = meta(8, 64), meta(64, 64, grad=True)

    def run() -> torch.dtype:
        with torch.autocast("cuda", enabled=False):
            assert not torch.is_autocast_enabled("cuda")
            return F.linear(x, weight).dtype

    found = []
    cast(lambda: found.append(run()))
    assert found == [SINGLE]


def test_a_checkpoint_computes_again_in_the_same_region() -> None:
    block = nn.Sequential(nn.Linear(64, 64, bias=False, device="meta"), nn.GELU())
    x = meta(8, 64, grad=True)
    types = []
    block[0].register_forward_hook(lambda _module, _args, out: types.append(out.dtype))
    seen = cast(lambda: checkpoint(block, x, use_reentrant=False).sum(), backward=True)
    assert types == [BRAIN, BRAIN]
    weights = [size for size in seen.by("_to_copy.default") if size == 64 * 64 * 2]
    assert len(weights) == 2  # cast in the forward pass and again when it is computed again


def test_questions_about_autocast_are_answered_as_on_cuda() -> None:
    def run() -> None:
        assert torch.is_autocast_enabled("cuda")
        assert torch.get_autocast_dtype("cuda") == HALF
        assert not torch.is_autocast_enabled("cpu")
        assert torch.amp.is_autocast_available("meta")

    cast(run, None)  # float16 is CUDA's own choice


def test_other_devices_keep_torchs_autocast() -> None:
    with Simulation().device(), torch.autocast("cpu", dtype=BRAIN):
        assert (torch.ones(4, 4) @ torch.ones(4, 4)).dtype == BRAIN


def test_it_decorates_a_function() -> None:
    x = meta(8, 8)

    def run() -> torch.dtype:
        product = torch.autocast("cuda", dtype=BRAIN)(lambda: x @ x)
        return product().dtype

    found = []
    watched(lambda: found.append(run()))
    assert found == [BRAIN]
