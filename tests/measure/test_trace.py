"""A history of the allocator, reduced and aligned with the simulated events."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from planner import simulate
from planner.errors import PlannerError
from planner.measure.align import alignment
from planner.measure.trace import reduced, trace_from
from planner.simulate.events import Event, simulated_events
from tests.measure.made_up import DEVICE, SETUP, VERSIONS


def entry(action: str, addr: int = 0, size: int = 0, *frames: str) -> dict[str, Any]:
    """An entry as torch.cuda.memory._snapshot() documents it."""
    lines = [{"filename": name, "line": 1, "name": "f"} for name in frames]
    return {"action": action, "addr": addr, "size": size, "stream": 0, "frames": lines}


HISTORY = [
    entry("snapshot"),
    entry("segment_alloc", 1000, 2 << 20),
    entry("alloc", 1000, 300, "/a/site-packages/torch/nn/init.py", "/a/planner/training/run.py"),
    entry("snapshot"),
    entry("snapshot"),
    entry("alloc", 2000, 70, "??", "/x/model.py"),
    entry("free_requested", 1000, 300),
    entry("free_completed", 1000, 300),
    entry("alloc", 1000, 40),
    entry("free_completed", 5, 40),
    entry("snapshot"),
]
LABELS = ["begin load", "blocks load", "begin forward 1", "end forward 1"]


def test_a_history_is_reduced_to_plain_events(tmp_path: Path) -> None:
    kept = reduced(HISTORY, LABELS)
    assert kept["phases"] == ["", "load", "forward 1"]
    assert kept["events"] == [
        [1, 1, 300, 1, "torch/nn/init.py:1 f"],
        [1, 2, 70, 2, "model.py:1 f"],
        [-1, 1],
        [1, 3, 40, 2, ""],
    ]
    assert kept["segments"] == [[0, 2 << 20]]
    path = tmp_path / "trace.json"
    head = {"schema": 1, "setup": SETUP.to_dict(), "device": DEVICE.to_dict(), "versions": VERSIONS}
    path.write_text(json.dumps({**head, **kept}))
    trace = trace_from(path)
    assert trace.events[1] == Event(
        block=2, size_bytes=70, freed=False, phase="forward", step=1, site="model.py:1 f"
    )
    assert trace.events[2] == Event(block=1, size_bytes=300, freed=True)
    assert trace.device == DEVICE


@pytest.mark.parametrize("text", ["", "{}", '{"schema": 2}', "[1]", '{"schema": 1, "setup": {}}'])
def test_another_file_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text(text)
    with pytest.raises(PlannerError, match="is no trace"):
        trace_from(path)
    with pytest.raises(PlannerError, match="cannot be read"):
        trace_from(tmp_path / "missing")


@pytest.fixture(scope="module")
def events() -> tuple[Event, ...]:
    return simulated_events(SETUP, gpu="h200")


def test_the_simulated_events_add_up_to_the_simulated_peak(events: tuple[Event, ...]) -> None:
    """Block by block, every request rounded up to 512 bytes; what is not split off counts in the peak."""
    live = peak = 0
    for event in events:
        size = -(-event.size_bytes // 512) * 512
        live += -size if event.freed else size
        peak = max(peak, live)
    simulated = simulate(SETUP, gpu="h200").peak_allocated_bytes
    assert peak <= simulated < peak + (24 << 20)
    assert {event.phase for event in events if not event.freed} >= {"load", "forward", "backward"}
    assert all(event.size_bytes > 0 for event in events)


def test_without_being_asked_no_events_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    simulate(SETUP, watch=lambda simulation: kept.append(simulation))
    assert kept[0].ledger.trail is None


def test_equal_events_align(events: tuple[Event, ...]) -> None:
    found = alignment(events, events)
    assert found.first is None
    assert found.equal_blocks == found.real_blocks == found.simulated_blocks
    assert "agree" in found.sentence


def test_the_order_of_frees_between_two_blocks_does_not_matter(events: tuple[Event, ...]) -> None:
    turned = list(events)
    at = next(i for i in range(len(turned) - 1) if turned[i].freed and turned[i + 1].freed)
    turned[at], turned[at + 1] = turned[at + 1], turned[at]
    assert alignment(turned, events).first is None


def test_the_first_block_of_another_size_is_named(events: tuple[Event, ...]) -> None:
    taken = [i for i, event in enumerate(events) if not event.freed]
    real = list(events)
    real[taken[200]] = dataclasses.replace(real[taken[200]], size_bytes=123_456_789)
    found = alignment(real, events)
    assert found.size is not None
    assert (found.size.number, found.equal_blocks, found.lifetime) == (200, 200, None)
    assert "123,456,789 bytes" in found.sentence
    assert "aten." in found.sentence
    assert len(found.size.before) == 3
    assert json.dumps(found.to_dict())


@pytest.mark.parametrize("side", ["real", "simulated"])
def test_a_block_too_many_is_found_where_it_is(events: tuple[Event, ...], side: str) -> None:
    taken = [i for i, event in enumerate(events) if not event.freed]
    longer = [*events[: taken[50]], Event(block=-1, size_bytes=3, freed=False), *events[taken[50] :]]
    found = alignment(longer, events) if side == "real" else alignment(events, longer)
    assert found.size is not None
    assert found.size.number == 50


def test_one_side_that_ends_early_is_said(events: tuple[Event, ...]) -> None:
    last = max(i for i, event in enumerate(events) if not event.freed)
    found = alignment(events[:last], events)
    assert found.size is not None
    assert found.size.real is None
    assert "real has ended" in found.sentence


def test_a_block_that_lives_longer_is_found(events: tuple[Event, ...]) -> None:
    at = next(i for i, event in enumerate(events) if event.freed and i > 300)
    real = [*events[:at], *events[at + 1 :], events[at]]
    found = alignment(real, events)
    assert found.lifetime is not None
    assert found.lifetime.real is not None
    assert found.lifetime.real.block == events[at].block
    assert "given back before block" in found.sentence
