"""What each optimizer keeps and takes: its library's code on `meta` against sums by hand and the formulas."""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from typing import Any, get_args

import pytest
import torch

from planner.errors import SetupError
from planner.estimate import estimate
from planner.estimate.optimizers import optimizer_memory, saved_state_bytes
from planner.estimate.parameters import trained_tensors
from planner.optimizers import EIGHT_BIT, FROM_BITSANDBYTES, Optimizer
from planner.report import MemoryReport, Phase
from planner.simulate.run import simulate
from planner.simulate.simulation import Simulation
from planner.spec import BitFit, FullFineTuning, LoRA, PeftOfSize, QLoRA, Setup, Training
from planner.training import optimizers
from planner.training.recipe import no_autocast
from planner.training.run import TrainingRun
from tests.simulate.small import GPT2, LLAMA, setup_of

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed; tests/requirements.txt brings it",
)


def _named(*names: str) -> list[Any]:
    return [pytest.param(n, marks=needs_bitsandbytes if n in FROM_BITSANDBYTES else ()) for n in names]


OPTIMIZERS = _named(*get_args(Optimizer))
ALL_LINEAR = LoRA(lora_rank=16, target_modules=("all-linear",))
TABLE, NORM = 1000 * 256, 256  # of small.LLAMA: embeddings and head, and a norm's weight
LINEARS = 2 * [256 * 256, 128 * 256, 128 * 256, 256 * 256, 512 * 256, 512 * 256, 512 * 256]
NORMS = 5


def up(size_bytes: int) -> int:
    """Rounded up to the allocator's 512 bytes."""
    return -(-size_bytes // 512) * 512


def phase(report: MemoryReport, name: str, step: int = 2) -> Phase:
    return next(p for p in report.phases if (p.name, p.step) == (name, step))


def rise(report: MemoryReport, step: int = 2) -> int:
    """What the optimizer's step takes beside all that is there when it begins."""
    before = phase(report, "backward", step).allocated_bytes
    return phase(report, "optimizer_step", step).peak_allocated_bytes - before


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "config, method, training",
    [
        (LLAMA, FullFineTuning(), {}),
        (LLAMA, FullFineTuning(), {"precision": "bf16-mixed", "clip_grad_norm": 1.0}),
        (LLAMA, ALL_LINEAR, {}),
        (LLAMA, LoRA(target_modules=("embed_tokens", "q_proj")), {"precision": "fp16"}),
        (GPT2, FullFineTuning(), {"precision": "fp32"}),
        (GPT2, BitFit(), {"precision": "fp16-mixed"}),
        (LLAMA, QLoRA(target_modules=("all-linear",)), {}),
    ],
    ids=("full", "full bf16-mixed", "lora", "lora tables fp16", "gpt2 fp32", "bitfit fp16-mixed", "qlora"),
)
def test_states_are_exactly_what_the_formula_says(
    config: dict[str, Any], method: Any, training: dict[str, Any], optimizer: str
) -> None:
    if isinstance(method, QLoRA):
        pytest.importorskip("bitsandbytes")
    setup = setup_of(config, method, optimizer=optimizer, **training)
    said, simulated = estimate(setup), simulate(setup)
    assert said.parts.optimizer_states == simulated.parts.optimizer_states
    assert said.provenance.get("paged_bytes") == simulated.provenance.get("paged_bytes")
    grown = phase(simulated, "backward").allocated_bytes - phase(simulated, "backward", 1).allocated_bytes
    assert simulated.parts.optimizer_states == grown


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_same_states_are_there_after_a_real_step_on_the_cpu(optimizer: str) -> None:
    setup = setup_of(LLAMA, optimizer=optimizer, precision="fp32", seq_len=8)
    run = TrainingRun(setup, torch.device("cpu"), lambda *_: contextlib.nullcontext(), autocast=no_autocast)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of paged states on the CPU
        run.prepare()
        before = [p.detach().clone() for p in run.trained]
        run.step(1)
    kept = {
        value.data_ptr(): value.numel() * value.element_size()
        for state in run.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    }
    assert sum(kept.values()) == saved_state_bytes(setup)
    counters = 4 * len(run.trained) if optimizer in ("adamw", "adamw-single") else 0  # on the host, too
    report = estimate(setup)
    states_bytes = report.parts.optimizer_states + report.provenance.get("paged_bytes", 0)
    assert sum(map(up, kept.values())) - up(counters // len(run.trained)) * len(run.trained) == states_bytes
    assert all(not torch.equal(old, p) for old, p in zip(before, run.trained, strict=True))


@needs_bitsandbytes
def test_8_bit_states_by_hand() -> None:
    """optim/optimizer.py, init_state: 4,096 numbers and more in uint8, an fp32 absmax for each 256."""

    def blockwise(numel: int, states: int) -> int:
        return states * (up(numel) + up(4 * -(-numel // 256)))

    in_8_bits = sum(blockwise(n, 1) for n in (*LINEARS, TABLE))
    in_fp32 = up(4 * TABLE) + NORMS * up(4 * NORM)  # the embeddings, as HF Trainer asks, and small tensors
    maps = 1024
    lion = simulate(setup_of(LLAMA, optimizer="lion-8bit"))
    assert lion.parts.optimizer_states == in_8_bits + in_fp32 + maps
    adamw = simulate(setup_of(LLAMA, optimizer="adamw-8bit"))
    assert adamw.parts.optimizer_states == 2 * (in_8_bits + in_fp32 + maps)
    assert "bitsandbytes" in adamw.provenance


@needs_bitsandbytes
def test_paged_states_are_counted_apart_and_not_in_the_peak() -> None:
    """get_state_buffer: states of 100,000 elements and more are managed memory; their absmax is torch's."""
    plain, paged = (simulate(setup_of(LLAMA, optimizer=name)) for name in ("adamw-8bit", "paged-adamw-8bit"))
    large = [n for n in LINEARS if n >= 100_000]
    assert len(large) == 6
    paged_bytes = 2 * (sum(large) + TABLE + 4 * TABLE)
    assert paged.provenance["paged_bytes"] == paged_bytes
    assert plain.parts.optimizer_states - paged.parts.optimizer_states == paged_bytes
    assert "paged_bytes" not in plain.provenance
    for report in (paged, estimate(setup_of(LLAMA, optimizer="paged-adamw-8bit"))):
        assert any(f"({paged_bytes:,} bytes) are paged by bitsandbytes" in note for note in report.notes)


@needs_bitsandbytes
@pytest.mark.parametrize("kind, count", [("adamw", 2), ("lion", 1)])
def test_32_bit_states_are_fp32_whatever_the_weights_are(kind: str, count: int) -> None:
    """init_state with optim_bits 32: fp32 of every tensor, embeddings and norms too, and no absmax."""
    paged = simulate(setup_of(LLAMA, optimizer=f"paged-{kind}-32bit"))
    large = [n for n in (*LINEARS, TABLE, TABLE) if n >= 100_000]
    others = [n for n in (*LINEARS, *[NORM] * NORMS) if n < 100_000]
    assert paged.provenance["paged_bytes"] == count * 4 * sum(large)
    assert paged.parts.optimizer_states == count * sum(up(4 * n) for n in others)
    if kind == "lion":
        plain = simulate(setup_of(LLAMA, optimizer="lion-32bit"))
        assert plain.parts.optimizer_states == sum(up(4 * n) for n in (*large, *others))
        assert "paged_bytes" not in plain.provenance


@pytest.mark.parametrize(
    "optimizer, precision, expected",
    [
        ("adamw-single", "bf16", up(2 * NORM) + 2 * up(2 * TABLE)),  # the norm's denom, sqrt and quotient
        ("adamw-single", "fp32", up(4 * NORM) + 2 * up(4 * TABLE)),
        # two fp32 copies, the square and its sum with eps; row and column factors beside the new update
        ("adafactor", "bf16", 4 * up(4 * TABLE) + up(4 * 1000) + up(4 * 256)),
        ("adafactor", "bf16-mixed", 2 * up(4 * TABLE) + up(4 * 1000) + up(4 * 256)),
        ("sgd-momentum", "bf16", 0),
        *[pytest.param(name, "bf16", 0, marks=needs_bitsandbytes) for name in FROM_BITSANDBYTES],
    ],
)
def test_temporaries_of_a_step(optimizer: str, precision: str, expected: int) -> None:
    setup = setup_of(LLAMA, optimizer=optimizer, precision=precision)
    assert rise(simulate(setup)) == expected
    assert optimizer_memory(setup, trained_tensors(setup), None).temporaries_bytes == expected


def test_a_peak_holds_the_states_that_were_there_by_then() -> None:
    """Adafactor makes a tensor's states when it comes to it, and the largest tensor is the first."""
    tied = {"tie_word_embeddings": True}
    setup = setup_of(LLAMA, changes=tied, optimizer="adafactor", micro_batch_size=1, seq_len=8)
    first = simulate(setup, steps=1)
    assert first.peak_phase == "optimizer_step"
    rows, columns, mean = up(4 * 1000), up(4 * 256), 512
    assert first.parts.optimizer_states == rows + columns + mean
    assert simulate(setup).parts.optimizer_states > first.parts.optimizer_states


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_gradients_set_to_zero_stay(optimizer: str) -> None:
    none, zero = (simulate(setup_of(LLAMA, optimizer=optimizer, zero_grad=z)) for z in ("none", "zero"))
    gradients = sum(up(2 * n) for n in (*LINEARS, TABLE, TABLE)) + NORMS * up(2 * NORM)
    for name, step, more in (
        ("backward", 1, 0),
        ("optimizer_step", 1, gradients),
        ("forward", 2, gradients),
        ("backward", 2, 0),
        ("optimizer_step", 2, gradients),
    ):
        difference = phase(zero, name, step).allocated_bytes - phase(none, name, step).allocated_bytes
        assert difference == more, (name, step)
    peaks = [phase(report, "forward").peak_allocated_bytes for report in (zero, none)]
    assert peaks[0] - peaks[1] == gradients
    assert zero.parts.gradients >= none.parts.gradients


@needs_bitsandbytes
def test_overrides_of_one_run_do_not_reach_the_next() -> None:
    """bitsandbytes keeps overrides by address, for the whole process: a later run could hold the address."""
    from bitsandbytes.optim import GlobalOptimManager

    shared = GlobalOptimManager.get_instance()
    setup = setup_of(LLAMA, optimizer="adamw-8bit")
    first = simulate(setup)
    assert not shared.module_weight_config_triple
    assert not shared.pid2config
    assert simulate(setup) == first


@needs_bitsandbytes
def test_paged_memory_is_never_allocated_here() -> None:
    seen: list[Simulation] = []
    simulate(setup_of(LLAMA, optimizer="paged-adamw-8bit"), watch=seen.append)
    from bitsandbytes.functional import GlobalPageManager

    buffers = GlobalPageManager.get_instance().paged_tensors
    assert buffers
    assert {buffer.untyped_storage().nbytes() for buffer in buffers} <= {1, 4}
    assert seen[0].ledger.paged_bytes > 1_000_000


def test_without_bitsandbytes_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SetupError, match=r"^optimizer lion-8bit needs bitsandbytes.*-qlora\.txt$"):
        simulate(setup_of(LLAMA, optimizer="lion-8bit"))
    assert simulate(setup_of(LLAMA, optimizer="adafactor")).parts.optimizer_states > 0


@pytest.mark.parametrize("optimizer", EIGHT_BIT)
def test_the_textbook_s_fp32_states_are_no_8_bit_ones(optimizer: Any) -> None:
    with pytest.raises(SetupError, match="keeps them in 8 bits; choose precision bf16, or optimizer adamw"):
        Training(precision="textbook", optimizer=optimizer)


def test_an_unknown_choice_names_the_allowed_ones() -> None:
    with pytest.raises(SetupError, match="zero_grad must be one of none, zero, got 'keep'"):
        Training(zero_grad="keep")  # type: ignore[arg-type]
    with pytest.raises(SetupError, match=r"optimizer must be one of adamw, .*, paged-lion-32bit, got 'lion'"):
        Training(optimizer="lion")  # type: ignore[arg-type]


def test_states_of_a_bare_number_of_parameters() -> None:
    """2 bytes a parameter and two fp32 absmax for each 256, or nothing known where shapes decide."""

    def states(optimizer: Any, method: Any = None) -> tuple[int, bool]:
        report = estimate(Setup(model="params:7e9", method=method, training=Training(optimizer=optimizer)))
        return report.parts.optimizer_states, "optimizer_states" in report.not_known

    assert states("adamw-8bit") == (2 * (7 * 10**9 + 4 * -(-7 * 10**9 // 256)), False)
    assert states("lion-8bit") == (7 * 10**9 + 4 * -(-7 * 10**9 // 256), False)
    assert states("lion-32bit") == (4 * 7 * 10**9, False)
    assert states("paged-adamw-32bit") == (0, False)
    assert states("paged-lion-8bit") == (4 * -(-7 * 10**9 // 256), False)
    assert states("sgd-momentum") == (2 * 7 * 10**9, False)
    assert states("adamw-single") == states("adamw")
    assert states("adafactor") == (0, True)
    assert states("adafactor", PeftOfSize(trainable_params=4_000_000)) == (0, True)
