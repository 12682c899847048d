"""On a real CUDA device: the measurement itself. Skipped, with the reason, where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from planner import FullFineTuning
from planner.measure import measure
from planner.measure.align import alignment
from planner.measure.single import record_of
from planner.measure.trace import trace_from
from planner.optimizers import EIGHT_BIT, FROM_BITSANDBYTES, Optimizer
from planner.record import Record
from planner.simulate.events import simulated_events
from planner.training.run import TrainingRun
from tests.measure.made_up import SETUP
from tests.simulate.small import LLAMA, setup_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


@pytest.fixture(scope="module")
def record() -> Record:
    return record_of(SETUP.replace(seq_len=128))


def test_the_parts_sum_to_the_measured_peak(record: Record) -> None:
    report = record.report
    assert report.source == "measurement"
    assert report.peak_allocated_bytes == max(phase.peak_allocated_bytes for phase in report.phases)
    assert report.peak_allocated_bytes <= (report.peak_reserved_bytes or 0)
    assert report.provenance["context_bytes"] > 0
    assert Record.from_dict(record.to_dict()) == record


def test_it_is_the_same_to_the_byte_when_run_again(record: Record) -> None:
    assert measure(SETUP.replace(seq_len=128)).parts == record.report.parts


def test_what_is_known_exactly_is_what_is_simulated(record: Record) -> None:
    simulated = record.simulation.report
    assert simulated is not None
    for name in ("base_weights", "adapter_weights", "optimizer_states"):
        assert getattr(record.report.parts, name) == getattr(simulated.parts, name), name


def test_the_simulation_is_within_its_promise(record: Record) -> None:
    simulated = record.simulation.report
    assert simulated is not None
    assert simulated.peak_allocated_bytes == pytest.approx(record.report.peak_allocated_bytes, rel=0.001)
    assert simulated.peak_reserved_bytes == pytest.approx(record.report.peak_reserved_bytes, rel=0.01)


@pytest.mark.parametrize("every", [1, 2])
def test_inputs_on_the_host_leave_the_device(every: int) -> None:
    """Real `save_on_cpu` with pinned memory: the same peak as simulated, lower than without."""
    usual = SETUP.replace(seq_len=1024, activation_checkpointing=True, checkpoint_every=every)
    record = record_of(usual.replace(checkpoint_offload=True))
    simulated = record.simulation.report
    assert simulated is not None
    assert simulated.provenance["offloaded_bytes"] > 0
    assert simulated.peak_allocated_bytes == pytest.approx(record.report.peak_allocated_bytes, rel=0.001)
    assert record.report.peak_allocated_bytes < measure(usual).peak_allocated_bytes


WIDE = {**LLAMA, "hidden_size": 1024, "num_attention_heads": 8, "intermediate_size": 4096, "vocab_size": 8192}


@pytest.mark.parametrize("zero_grad", ["none", "zero"])
@pytest.mark.parametrize("optimizer", get_args(Optimizer))
def test_the_states_and_the_step_of_each_optimizer(optimizer: Any, zero_grad: Any) -> None:
    """States exactly, peaks within 0.1 %, and what is paged counted apart; with 8 tokens the step weighs."""
    if optimizer in FROM_BITSANDBYTES:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    setup = setup_of(WIDE, optimizer=optimizer, zero_grad=zero_grad, micro_batch_size=1, seq_len=8)
    record = record_of(setup)
    simulated, estimated = record.simulation.report, record.estimate.report
    assert simulated is not None
    assert estimated is not None
    peak = record.report.peak_allocated_bytes
    assert simulated.peak_allocated_bytes == pytest.approx(peak, rel=0.001)
    assert estimated.peak_allocated_bytes == pytest.approx(peak, rel=0.02)
    for phase, other in zip(record.report.phases, simulated.phases, strict=True):
        if phase.step == 2:
            assert other.peak_allocated_bytes == pytest.approx(phase.peak_allocated_bytes, rel=0.001), phase
    if "optimizer_states" not in record.report.not_known:
        assert record.report.parts.optimizer_states == simulated.parts.optimizer_states
    assert record.report.provenance.get("paged_bytes") == simulated.provenance.get("paged_bytes")


@pytest.mark.parametrize("optimizer", EIGHT_BIT)
def test_an_8_bit_step_changes_the_weights(optimizer: str) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from contextlib import nullcontext

    setup = setup_of(LLAMA, optimizer=optimizer, precision="bf16", seq_len=8)
    run = TrainingRun(setup, torch.device("cuda:0"), lambda *_: nullcontext())
    run.prepare()
    before = [p.detach().clone() for p in run.trained]
    run.step(1)
    torch.cuda.synchronize()
    changed = [not torch.equal(old, p) for old, p in zip(before, run.trained, strict=True)]
    assert sum(changed) > len(changed) / 2  # an update of 1e-4 is below bf16's spacing around 1


def test_out_of_memory_is_a_result_and_the_device_is_clean_afterwards() -> None:
    before, _ = torch.cuda.mem_get_info(0)
    report = measure(
        SETUP.replace(method=FullFineTuning(), micro_batch_size=100_000, seq_len=2048), time_limit_s=300
    )
    assert report.out_of_memory is not None
    assert report.out_of_memory.requested_bytes > 0
    assert report.parts.total_bytes == report.peak_allocated_bytes > 0
    after, _ = torch.cuda.mem_get_info(0)
    assert after == pytest.approx(before, abs=64 << 20)


def test_a_trace_aligns_with_the_simulated_events(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    measure(SETUP, trace=path)
    trace = trace_from(path)
    assert {event.phase for event in trace.events} >= {"load", "forward", "backward", "optimizer_step"}
    found = alignment(trace.events, simulated_events(SETUP, gpu=trace.device.gpu))
    assert found.first is None, found.sentence


@pytest.mark.parametrize(
    "step",
    [
        {"loop": "trainer"},
        *[{"loss": loss, "loop": loop} for loss in ("chunked", "liger") for loop in ("plain", "trainer")],
        {"loss": "liger", "precision": "bf16-mixed"},
        *[{"batching": kind, "attention": a} for kind in ("padded", "packed") for a in ("sdpa", "flash")],
        {"kernels": "liger"},
        *[{"kernels": "liger", "loss": "liger", "precision": kind} for kind in ("bf16", "bf16-mixed")],
    ],
    ids=str,
)
def test_another_step_is_simulated_as_it_runs(step: dict[str, str]) -> None:
    if "liger" in step.values():
        pytest.importorskip("liger_kernel", reason="liger_kernel is not installed: requirements-liger.txt")
    found = record_of(SETUP.replace(micro_batch_size=4, seq_len=512, **step))
    simulated = found.simulation.report
    assert simulated is not None
    assert simulated.peak_allocated_bytes == pytest.approx(found.report.peak_allocated_bytes, rel=0.001)
