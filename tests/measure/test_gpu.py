"""On a real CUDA device: the measurement itself. Skipped, with the reason, where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from planner import FullFineTuning
from planner.measure import measure
from planner.measure.align import alignment
from planner.measure.single import record_of
from planner.measure.trace import trace_from
from planner.record import Record
from planner.simulate.events import simulated_events
from tests.measure.made_up import SETUP

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
