"""Liger's fused loss on the simulated device: what it takes, in order, beside the library's own function."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import nn

from planner.simulate.simulation import Simulation
from planner.training import liger
from tests.simulate.watched import watched

T, H, V, N = 64, 8, 40, 16  # tokens, hidden, vocabulary, tokens with logits at a time
CUBLAS_BYTES = 8_519_680  # its workspace, taken by the first product
BESIDE = [8 * (T + 2), 8 * T]  # labels padded by one for each of two samples, and cut


def _tensors(dtype: torch.dtype, *, trained: bool = True, weight: torch.dtype | None = None) -> Any:
    hidden = torch.empty(2, T // 2, H, dtype=dtype, device="meta", requires_grad=True)
    head = nn.Parameter(torch.empty(V, H, dtype=weight or dtype, device="meta"), requires_grad=trained)
    labels = torch.empty(2, T // 2, dtype=torch.int64, device="meta")
    return hidden, head, labels


def _sizes(gpu: str | None, run: Any) -> list[int]:
    sizes = [each.size_bytes for each in watched(run, gpu=gpu).taken if each.size_bytes < CUBLAS_BYTES]
    return sizes[sizes.index(BESIDE[0]) :]


def test_in_16_bits_every_product_is_written_in_place() -> None:
    """Gradients, the losses, which labels are asked for and how many, one tensor of logits, their sum."""
    expected = [*BESIDE, 2 * T * H, 2 * V * H, 4 * T, T, 8, 2 * N * V, 4]
    assert _sizes("a100-40gb", lambda: liger.fused_loss(*_tensors(torch.bfloat16), None)) == expected
    frozen = _sizes(None, lambda: liger.fused_loss(*_tensors(torch.bfloat16, trained=False), None))
    assert frozen == [size for size in expected if size != 2 * V * H]


def test_before_ampere_the_weight_s_gradient_takes_a_product_and_its_fp32_copy_a_chunk() -> None:
    sizes = _sizes("t4", lambda: liger.fused_loss(*_tensors(torch.float16), None))
    start = [*BESIDE, 2 * T * H, 2 * V * H, 4 * T, T, 8, 2 * N * V]
    assert sizes == [*start, *[2 * V * H, 4 * V * H] * (T // N), 4]


def test_in_fp32_it_takes_the_product() -> None:
    sizes = _sizes(None, lambda: liger.fused_loss(*_tensors(torch.float32), None))
    assert sizes == [*BESIDE, 4 * T * H, 4 * V * H, 4 * T, T, 8, 4 * N * V, *[4 * V * H] * (T // N), 4]


def test_autocast_casts_a_view_of_the_weight_anew_and_the_weight_once() -> None:
    def run() -> Any:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return liger.fused_loss(*_tensors(torch.float32), None)

    rows, weight = 2 * N * H, 2 * V * H
    first = [rows, weight, 2 * N * V, weight, rows, rows]  # casts, logits, the cached cast, a product, a cast
    later = [rows, weight, 2 * N * V, rows, rows]
    start = [*BESIDE, 4 * T * H, 4 * V * H, 4 * T, T, 8]
    assert _sizes(None, run) == [*start, *first, *later * (T // N - 1), 4]


@pytest.mark.parametrize("gpu", [None, "t4"])
@pytest.mark.parametrize("kind", ["bf16", "fp16", "fp32", "bf16-mixed", "fp16-mixed", "frozen"])
def test_the_library_s_own_function_takes_the_same_event_by_event(gpu: str | None, kind: str) -> None:
    """liger_kernel's Python on `meta` for `cuda`, its kernels left out: they allocate nothing."""
    theirs = _library_on_meta((7, 5) if gpu == "t4" else (8, 0))
    narrow = torch.float16 if kind.startswith("fp16") else torch.bfloat16
    single = kind == "fp32" or kind.endswith("-mixed")

    def run(function: Any) -> Any:
        def step() -> Any:
            tensors = _tensors(torch.float32 if single else narrow, trained=kind != "frozen")
            with torch.autocast("cuda", dtype=narrow, enabled=kind.endswith("-mixed")):
                return function(*tensors)

        return step

    own = watched(run(lambda *tensors: liger.fused_loss(*tensors, None)), gpu=gpu, backward=True)
    assert own == watched(run(theirs), gpu=gpu, backward=True)


def _library_on_meta(capability: tuple[int, int]) -> Any:
    pytest.importorskip("liger_kernel", reason="liger_kernel is not installed: requirements-liger.txt")
    pytest.importorskip("triton", reason="triton is not installed: it comes with torch's build for CUDA")
    from liger_kernel.ops import fused_linear_cross_entropy as module
    from liger_kernel.transformers.model import loss_utils

    with open(str(module.__file__), encoding="utf-8") as file:
        source = file.read().replace('"cuda"', '"meta"').replace('dtype("meta")', 'dtype("cuda")')
    copy = types.ModuleType("fused_linear_cross_entropy_on_meta")
    exec(compile(source, str(module.__file__), "exec"), copy.__dict__)
    nothing = _NoKernel()
    copy.__dict__.update(
        torch=_Torch(capability), liger_cross_entropy_kernel=nothing, element_mul_kernel=nothing
    )

    def loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> Any:
        functional = loss_utils.F
        before = functional.LigerFusedLinearCrossEntropyFunction
        functional.LigerFusedLinearCrossEntropyFunction = copy.LigerFusedLinearCrossEntropyFunction
        try:
            return loss_utils.LigerForCausalLMLoss(hidden, weight, labels, H)
        finally:
            functional.LigerFusedLinearCrossEntropyFunction = before

    return loss


class _Torch:
    """torch on a card: `addmm` into its sum takes nothing, `equal` asks as CUDA's does."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.cuda = types.SimpleNamespace(get_device_capability=lambda _device: capability)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def addmm(self, *_args: Any, **kwargs: Any) -> Any:
        return kwargs["out"]

    def equal(self, one: torch.Tensor, other: torch.Tensor) -> bool:
        return bool((one == other).all())


class _NoKernel:
    def __getitem__(self, _grid: Any) -> Any:
        return lambda *_args, **_kwargs: None


def test_the_head_begins_with_the_loss_and_its_gradient_is_one() -> None:
    simulation = Simulation()
    hidden, head, labels = _tensors(torch.bfloat16)
    owner = nn.Module()
    owner.weight = head
    simulation.modules.watch([], owner)
    with simulation.device(), simulation.phase("forward", 1):
        loss = liger.fused_loss(hidden, head, labels, None)
        totals = dict(simulation.ledger.totals)
        del loss
    assert totals["gradients"] == -(-2 * V * H // 512) * 512
    assert totals["logits_and_loss"] > 0
    assert totals["activations"] == 0
