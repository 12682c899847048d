"""Liger's kernels on the simulated device: what they take, beside the library's own Python and models."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from planner.simulate import liger_forms, simulate
from planner.spec import LoRA, Setup, Training
from planner.training import liger_kernels
from tests.simulate.liger_on_meta import library_in_place, library_module, library_or_skip, tiles_of, untuned
from tests.simulate.small import model_of
from tests.simulate.watched import watched
from tests.training.test_liger_kernels import MODELS

B, S, H, F = 2, 128, 64, 160  # samples, tokens of each, hidden, inner width
T = B * S
LORA = LoRA(lora_rank=4, target_modules=("attention",))


def _rows(width: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(B, S, width, dtype=dtype, device="meta", requires_grad=True)


def _taken(run: Any, gpu: str | None = None) -> list[int]:
    return [each.size_bytes for each in watched(run, gpu=gpu, backward=True).taken]


def _norm(*, in_place: bool, trained: bool = True, dtype: torch.dtype = torch.bfloat16) -> Any:
    weight = nn.Parameter(torch.empty(H, dtype=dtype, device="meta"), requires_grad=trained)
    x = _rows(H, dtype)
    return lambda: liger_kernels.rms_norm(x, weight, 1e-6, offset=0.0, single=False, in_place=in_place).sum()


@pytest.mark.parametrize(("gpu", "count"), [("h100", 132), ("t4", 40), (None, 108)])
def test_a_norm_s_weight_takes_a_partial_sum_for_each_multiprocessor(gpu: Any, count: int) -> None:
    taken = _taken(_norm(in_place=True), gpu)
    assert taken[1:3] == [2 * T * H, 4 * T]  # beside x the output, 1 / sqrt(...)
    assert taken[-3:] == [4 * count * H, 4 * H, 2 * H]  # the sums, their sum, the gradient


def test_a_frozen_norm_takes_nothing_in_place_and_a_gradient_otherwise() -> None:
    copied = 2 * T * H  # the gradient of a sum is one number, spread and made contiguous
    assert _taken(_norm(in_place=True, trained=False))[2:].count(copied) == 1
    assert _taken(_norm(in_place=False, trained=False))[2:].count(copied) == 2


def test_the_first_trial_of_an_expert_s_kernel_takes_what_triton_clears_between_runs() -> None:
    setup = Setup(model=model_of(MODELS["mixtral"]), training=Training(seq_len=64, kernels="liger"))
    one, two = (
        next(p for p in simulate(setup).phases if (p.name, p.step) == ("forward", step)) for step in (1, 2)
    )
    assert one.peak_allocated_bytes - two.peak_allocated_bytes > 200 * 2**20


KINDS = ["bf16", "fp32", "frozen", "mixed"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("in_place", [True, False])
def test_the_library_s_norm_takes_the_same_event_by_event(kind: str, in_place: bool) -> None:
    library_or_skip()
    theirs = library_module("rms_norm", 132).LigerRMSNormFunction
    narrow = torch.bfloat16 if kind in ("bf16", "mixed") else torch.float32
    wide = torch.bfloat16 if kind == "bf16" else torch.float32

    def weight() -> nn.Parameter:
        return nn.Parameter(torch.empty(H, dtype=wide, device="meta"), requires_grad=kind != "frozen")

    def own() -> Any:
        x = _rows(H, narrow)
        return liger_kernels.rms_norm(x, weight(), 1e-6, offset=1.0, single=True, in_place=in_place).sum()

    def library() -> Any:
        return theirs.apply(_rows(H, narrow), weight(), 1e-6, 1.0, "gemma", in_place, None).sum()

    assert watched(own, gpu="h100", backward=True) == watched(library, gpu="h100", backward=True)


@pytest.mark.parametrize("halves", [True, False])
@pytest.mark.parametrize("name", ["silu", "gelu"])
def test_the_library_s_gate_takes_the_same_event_by_event(name: str, halves: bool) -> None:
    library_or_skip()
    modules = {"silu": ("swiglu", "LigerSiLUMulFunction"), "gelu": ("geglu", "LigerGELUMulFunction")}
    theirs = getattr(library_module(modules[name][0], 132), modules[name][1])

    def run(function: Any) -> Any:
        gate, up = _rows(2 * F).chunk(2, -1) if halves else (_rows(F), _rows(F))
        return lambda: function(gate, up).sum()

    own = watched(run(lambda gate, up: liger_kernels.gated(gate, up, name)), backward=True)
    assert own == watched(run(theirs.apply), backward=True)


@pytest.mark.parametrize("lying", ["by token", "by head"])
def test_the_library_s_positions_take_the_same_event_by_event(lying: str) -> None:
    library_or_skip()
    theirs = library_module("rope", 132).LigerRopeFunction

    def run(function: Any) -> Any:
        heads = [torch.empty(B, S, n, 16, device="meta", requires_grad=True).transpose(1, 2) for n in (4, 2)]
        if lying == "by head":
            heads = [each.contiguous() for each in heads]
        tables = [torch.empty(1, S, 16, device="meta") for _ in range(2)]
        return lambda: sum(each.sum() for each in function(*heads, *tables))

    own = watched(run(liger_kernels.rotated), backward=True)
    assert own == watched(run(theirs.apply), backward=True)
    copied = {"by token": 2, "by head": 4}  # the spread gradients, and where heads lie apart q and k
    assert len(own.by("clone.default")) == copied[lying]


def _events(setup: Setup) -> list[Any]:
    """Every block of two steps, in order, with who asked for it; what ends at once in any order."""
    found: list[Any] = []

    def watch(simulation: Any) -> None:
        simulation.ledger.trail = []
        found.append(simulation)

    simulate(setup, gpu="h100", watch=watch)
    events: list[Any] = []
    ended: list[int] = []
    for event in found[0].ledger.trail:
        if event[0] < 0:
            ended.append(event[0])
            continue
        events += [sorted(ended), (event[0], event[1], str(event[4]) if event[0] > 0 else event)]
        ended = []
    return [*events, sorted(ended)]


@pytest.mark.parametrize("precision", ["bf16", "bf16-mixed"])
@pytest.mark.parametrize("method", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("name", [*MODELS])
def test_the_library_s_own_model_takes_the_same_events(name: str, method: Any, precision: Any) -> None:
    """As HF Trainer patches it; with checkpoints for one method, without for the other."""
    library_or_skip()
    setup = Setup(
        model=model_of(MODELS[name]),
        method=method,
        training=Training(
            micro_batch_size=B, seq_len=S, precision=precision, kernels="liger",
            loss="full" if name == "granite" else "liger",
            activation_checkpointing=(method is None) == (precision == "bf16"),
            attention="eager" if name == "qwen3" else "sdpa",
        ),
    )  # fmt: skip
    with mock.patch.object(liger_forms, "_tuned", untuned):
        own = _events(setup)
        with library_in_place(132, tiles=tiles_of(2 * T, 4)):
            assert own == _events(setup)
