"""A recorded stream of events becomes a report, an error or an out-of-memory result, without any device."""

from __future__ import annotations

import json

import pytest

from planner.errors import DeviceError, ModelError, PlannerError
from planner.measure.answer import measured_report, readings, rehearsal
from planner.report import PARTS, MemoryReport
from tests.measure.made_up import MIB, SETUP, Events, stream


def report_of(events: Events) -> MemoryReport:
    return measured_report(SETUP, readings(json.loads(json.dumps(events))), date="2000-01-01")


def test_the_report_of_a_stream() -> None:
    report = report_of(stream())
    assert report.source == "measurement"
    assert report.peak_allocated_bytes == 100 * MIB
    assert report.peak_reserved_bytes == 120 * MIB
    assert (report.peak_phase, len(report.phases)) == ("backward", 8)
    assert {name: size // MIB for name, size in report.parts.to_dict().items()} == {
        "base_weights": 40, "adapter_weights": 2, "gradients": 1, "optimizer_states": 4,
        "activations": 100 - 40 - 2 - 1 - 4 - 9, "logits_and_loss": 0, "temporaries": 0, "workspace": 9,
    }
    assert report.by_subtraction == ("activations",)
    assert report.not_known == ("logits_and_loss", "temporaries")
    assert report.provenance["context_bytes"] == (720 - 100 - 120) * MIB  # used - others - reserved
    assert report.provenance["torch"] == "0.0.0+test"
    assert MemoryReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_a_peak_in_the_optimizer_step_leaves_its_remainder_to_temporaries() -> None:
    events = stream()
    last = next(e for e in reversed(events) if e.get("name") == "optimizer_step")
    last["peak_allocated_bytes"] = 130 * MIB
    report = report_of(events)
    assert report.peak_phase == "optimizer_step"
    assert report.parts.gradients == 2 * MIB
    assert report.parts.temporaries == (130 - 40 - 2 - 2 - 4 - 9) * MIB
    assert report.by_subtraction == ("temporaries",)
    assert report.not_known == ("activations", "logits_and_loss")


def test_states_that_appear_within_the_peak_s_phase_are_not_claimed() -> None:
    events = stream()
    first = next(e for e in events if e.get("name") == "optimizer_step")
    first["peak_allocated_bytes"] = 130 * MIB
    report = report_of(events)
    assert "optimizer_states" in report.not_known
    assert report.parts.optimizer_states == 0
    assert report.peak_allocated_bytes == 130 * MIB


def test_the_workspace_is_not_known_at_a_peak_before_every_thread_took_its_own() -> None:
    events = stream()
    next(e for e in events if e.get("name") == "backward")["peak_allocated_bytes"] = 101 * MIB
    report = report_of(events)
    assert "workspace" in report.not_known
    assert report.parts.total_bytes == 101 * MIB


def test_of_equal_peaks_the_last_counts() -> None:
    events = stream()
    next(e for e in events if e.get("name") == "backward")["peak_allocated_bytes"] = 100 * MIB
    assert report_of(events).parts.optimizer_states == 4 * MIB


def test_what_was_allocated_between_two_phases_counts() -> None:
    events = stream()
    events[9]["between_peak_bytes"] = 500 * MIB
    assert report_of(events).peak_allocated_bytes == 500 * MIB


@pytest.mark.parametrize("weights", [99, 101, 500])
def test_contradictory_readings_still_sum_to_the_peak(weights: int) -> None:
    events = stream()
    for event in events:
        if event.get("step") == 2:
            event["known"]["base_weights"] = weights * MIB
    report = report_of(events)
    assert report.parts.total_bytes == 100 * MIB
    assert min(report.parts.to_dict().values()) >= 0
    assert {*report.by_subtraction, *report.not_known} >= {"activations", "gradients"}


def test_every_part_is_known_or_a_remainder_or_named_as_unknown() -> None:
    report = report_of(stream())
    known = {n for n in PARTS if n not in report.not_known and n not in report.by_subtraction}
    assert known == {"base_weights", "adapter_weights", "gradients", "optimizer_states", "workspace"}


def out_of_memory(requested: int = 64) -> Events:
    events = stream()[:6]
    events[-1]["failed"] = True
    events.append(
        {"event": "out_of_memory", "phase": "forward", "requested_bytes": requested * MIB,
         "device_free_bytes": 10 * MIB, "allocated_bytes": 80 * MIB, "reserved_bytes": 95 * MIB}
    )
    return [*events, {"event": "workspace", "workspace_bytes": 0}, {"event": "done"}]


def test_out_of_memory_is_a_result() -> None:
    report = report_of(out_of_memory())
    assert report.out_of_memory is not None
    assert report.out_of_memory.phase == "forward"
    assert report.out_of_memory.requested_bytes == 64 * MIB
    assert report.out_of_memory.free_bytes == (10 + 95 - 80) * MIB
    assert report.peak_allocated_bytes == 85 * MIB  # what was reached
    assert [phase.name for phase in report.phases] == ["load", "attach", "forward"]
    assert "reserved bytes without a tensor" in " ".join(report.notes)


def test_a_library_beside_the_allocator_is_not_given_an_invented_request() -> None:
    report = report_of(out_of_memory(requested=0))
    assert report.out_of_memory is not None
    assert report.out_of_memory.requested_bytes == 0
    assert "not known" in " ".join(report.notes)


def test_the_child_s_error_is_raised_as_it_was() -> None:
    for cls in (DeviceError, ModelError, PlannerError):
        with pytest.raises(cls, match="no such thing") as caught:
            readings([{"event": "refused", "error": cls.__name__, "message": "no such thing"}])
        assert type(caught.value) is cls


@pytest.mark.parametrize("length", range(13))
def test_a_stream_cut_anywhere_gives_no_report(length: int) -> None:
    with pytest.raises(PlannerError, match="measure again"):
        readings(stream()[:length])


def test_events_of_a_rehearsal_are_no_measurement() -> None:
    events = [e for e in stream() if e["event"] != "device"]
    with pytest.raises(PlannerError, match="no CUDA device"):
        measured_report(SETUP, readings(events), date="2000-01-01")
    text = json.dumps(rehearsal(SETUP, readings(events)).to_dict())
    assert "bytes" not in text
    assert '"source": "rehearsal"' in text
