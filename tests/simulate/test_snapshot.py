"""The memory snapshot: opened by PyTorch's own tools, equal to the report, and never half written."""

from __future__ import annotations

import io
import pickle
import pickletools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from planner.allocator import AllocatorConfig
from planner.errors import PlannerError
from planner.report import MemoryReport
from planner.simulate.run import simulate
from planner.simulate.snapshot import Recording
from planner.spec import LoRA
from tests.simulate.small import LLAMA, setup_of

SETUP = setup_of(LLAMA, LoRA(target_modules=("q_proj", "v_proj")), micro_batch_size=8, seq_len=256)
# What MemoryViz.js (torch/utils/viz) reads; any other opcode is an error there.
READABLE = (
    "APPENDS BINGET BININT BININT1 BININT2 EMPTY_DICT EMPTY_LIST FRAME LONG1 LONG_BINGET MARK MEMOIZE PROTO "
    "SETITEMS SHORT_BINUNICODE STOP TUPLE2 APPEND NEWFALSE BINUNICODE EMPTY_TUPLE NEWTRUE NONE BINFLOAT "
    "TUPLE TUPLE1 TUPLE3 SETITEM"
)
EXACT_IN_JAVASCRIPT = 2**53


class PlainData(pickle.Unpickler):
    """Refuses whatever is not made of dicts, lists, numbers and texts."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise AssertionError(f"{module_name}.{global_name} in a snapshot")


def recorded(**options: Any) -> tuple[MemoryReport, Recording]:
    recording = Recording()
    return simulate(SETUP, watch=recording, **options), recording


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[MemoryReport, Path]:
    report, recording = recorded()
    path = tmp_path_factory.mktemp("snapshot") / "step.pickle"
    recording.write(path)
    return report, path


@pytest.fixture(scope="module")
def snapshot(written: tuple[MemoryReport, Path]) -> dict[str, Any]:
    return PlainData(io.BytesIO(written[1].read_bytes())).load()


def peaks(trace: list[dict[str, Any]]) -> tuple[int, int]:
    """The highest sums of requested bytes and of segments."""
    requested = reserved = most_requested = most_reserved = 0
    for event in trace:
        sign = {"alloc": 1, "free_completed": -1}.get(event["action"], 0)
        requested += sign * event["size"]
        kind = event["action"].partition("_")
        if kind[0] == "segment":
            reserved += event["size"] if kind[2] in ("alloc", "map") else -event["size"]
        most_requested, most_reserved = max(most_requested, requested), max(most_reserved, reserved)
    return most_requested, most_reserved


def test_the_history_has_the_peaks_of_the_report(
    written: tuple[MemoryReport, Path], snapshot: dict[str, Any]
) -> None:
    report = written[0]
    (trace,) = snapshot["device_traces"]
    requested, reserved = peaks(trace)
    assert reserved == report.peak_reserved_bytes
    assert 0 <= report.peak_allocated_bytes - requested < 0.02 * requested  # rounding to blocks
    assert sum(segment["total_size"] for segment in snapshot["segments"]) == report.phases[-1].reserved_bytes
    at_end = sum(segment["allocated_size"] for segment in snapshot["segments"])
    assert report.parts.base_weights < at_end < report.phases[-1].allocated_bytes  # the loss is given up


def test_blocks_of_the_history_never_overlap_and_lie_in_segments(snapshot: dict[str, Any]) -> None:
    alive: dict[int, int] = {}
    segments: dict[int, int] = {}
    for event in snapshot["device_traces"][0]:
        address, size = event["addr"], event["size"]
        assert 0 < address < EXACT_IN_JAVASCRIPT
        if event["action"] == "segment_alloc":
            segments[address] = address + size
        elif event["action"] == "alloc":
            assert any(start <= address and address + size <= end for start, end in segments.items())
            assert not any(start < address + size and address < end for start, end in alive.items())
            alive[address] = address + size
        elif event["action"] == "free_completed":
            assert alive.pop(address) == address + size
    at_end = {b["address"] for s in snapshot["segments"] for b in s["blocks"] if b["state"] != "inactive"}
    assert set(alive) == at_end
    assert {s["address"] for s in snapshot["segments"]} == set(segments)


def test_every_block_says_who_asked_for_it(snapshot: dict[str, Any]) -> None:
    frames = [tuple(f["name"] for f in e["frames"]) for e in snapshot["device_traces"][0]]
    assert all(len(names) == 2 for names in frames)
    assert ("aten._scaled_dot_product_flash_attention.default", "forward") in frames
    assert ("aten._foreach_sqrt.default", "optimizer_step") in frames
    places = {f["filename"] for e in snapshot["device_traces"][0] for f in e["frames"]}
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default" in places


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("stats",), "total_reserved"),
        (("trace",), "cudaMalloc"),
        (("trace_plot", "-o"), "snapshot.pickle"),
        (("segment_plot", "-o"), "snapshot.pickle"),
    ],
)
def test_pytorchs_own_tool_opens_it(
    written: tuple[MemoryReport, Path], tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    out = tmp_path / "out.html"
    command = [sys.executable, "-m", "torch.cuda._memory_viz", arguments[0], str(written[1])]
    command += [*arguments[1:], str(out)] if "-o" in arguments else []
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert answer.returncode == 0, answer.stderr
    assert words in (out.read_text() if "-o" in arguments else answer.stdout)


def test_pytorchs_page_can_read_every_opcode(written: tuple[MemoryReport, Path]) -> None:
    found = {opcode.name for opcode, _, _ in pickletools.genops(written[1].read_bytes())}
    assert found <= set(READABLE.split())


def test_a_full_device_is_an_event_of_its_own() -> None:
    roomy, _ = recorded()
    report, recording = recorded(limit_bytes=roomy.peak_allocated_bytes - 1)
    assert report.out_of_memory is not None
    last = recording.snapshot()["device_traces"][0][-1]
    assert (last["action"], last["size"]) == ("oom", report.out_of_memory.requested_bytes)
    assert last["frames"][0]["name"] == report.out_of_memory.op


def test_an_expandable_segment_is_mapped_page_by_page() -> None:
    report, recording = recorded(allocator=AllocatorConfig(expandable_segments=True))
    snapshot = recording.snapshot()
    actions = {event["action"] for event in snapshot["device_traces"][0]}
    assert "segment_map" in actions
    assert "segment_alloc" not in actions
    assert peaks(snapshot["device_traces"][0])[1] == report.peak_reserved_bytes
    assert all(segment["is_expandable"] for segment in snapshot["segments"])


def test_recording_changes_no_number(written: tuple[MemoryReport, Path]) -> None:
    assert simulate(SETUP) == written[0]


def test_nothing_is_written_before_the_simulation(tmp_path: Path) -> None:
    with pytest.raises(PlannerError, match="nothing has been simulated"):
        Recording().write(tmp_path / "step.pickle")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_nothing_behind(
    written: tuple[MemoryReport, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, recording = recorded()
    target = tmp_path / "step.pickle"
    target.write_text("old")

    def full(*_paths: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(PlannerError, match="No space left on device"):
        recording.write(target)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_the_command_writes_it(tmp_path: Path, planner_command: Callable[..., Any]) -> None:
    setup = ("--model", "HuggingFaceTB/SmolLM2-135M", "--method", "lora", "--json")
    planner_command("simulate", *setup, "--snapshot", str(tmp_path / "step.pickle"))
    assert (tmp_path / "step.pickle").stat().st_size > 100_000


@pytest.mark.parametrize(
    "target, words", [("", "is no file"), (".", "is no file"), ("none/step.pickle", "no folder")]
)
def test_the_command_refuses_what_is_no_file(
    planner_command: Callable[..., Any], target: str, words: str
) -> None:
    answer = planner_command("simulate", "--model", "gpt2", "--snapshot", target, code=2)
    assert words in answer.stderr
    assert answer.stderr.count("\n") == 1
