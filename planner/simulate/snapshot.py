"""The simulated history as a memory snapshot that pytorch.org/memory_viz and torch.cuda._memory_viz open.

The format is that of `torch.cuda.memory._snapshot()` (torch/csrc/cuda/memory_snapshot.cpp): dicts and lists,
pickled; nothing here ever reads a pickle. Left out: categories and annotations, the clock (an event's time is
its number).
"""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from planner.allocator import CachingAllocator, OutOfDeviceMemory, Segment
from planner.errors import PlannerError
from planner.simulate.simulation import Simulation

__all__ = ["Recording"]

_PROTOCOL = 4  # MemoryViz.js reads 2 to 4
_ADDRESS_SHIFT = (1 << 63) - 0x7F00_0000_0000  # to where Linux maps; JavaScript is exact up to 2^53 only
_Range = tuple[int, int]


class Recording:
    """Pass it as `watch` to `simulate` or `simulated_own_step`; afterwards `write` it."""

    def __init__(self) -> None:
        """Nothing is recorded yet."""
        self._simulation: Simulation | None = None

    def __call__(self, simulation: Simulation) -> None:
        """Let the simulation keep every event."""
        simulation.ledger.trail = []
        self._simulation = simulation

    def snapshot(self) -> dict[str, Any]:
        """Segments and blocks at the end of the last step, and every event up to there.

        Raises PlannerError before the simulation has ended.
        """
        if self._simulation is None or self._simulation.trail is None:
            raise PlannerError("nothing has been simulated; give the recording to simulate as watch=.")
        return _Replay(self._simulation).snapshot()

    def write(self, path: Path) -> None:
        """Write the snapshot whole or not at all. Raises PlannerError where the disk refuses."""
        content = pickle.dumps(self.snapshot(), protocol=_PROTOCOL)
        aside = path.with_name(f".{path.name[:200]}.{os.getpid()}.part")
        try:
            with open(aside, "xb") as file:
                file.write(content)
            os.replace(aside, path)
        except OSError as error:
            raise PlannerError(f"{path} cannot be written ({error.strerror}); name another file.") from None
        finally:
            with contextlib.suppress(OSError):
                os.unlink(aside)


class _Replay:
    """The simulation's requests once more, through a second allocator, for addresses and segments.

    The simulation keeps sizes and order alone; the same requests in the same order get the same blocks.
    """

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self._allocator = CachingAllocator(
            simulation.allocator.config, device_bytes=simulation.allocator.device_bytes
        )
        self._expandable = simulation.allocator.config.expandable_segments
        self._trace: list[dict[str, Any]] = []
        self._alive: dict[int, tuple[int, int, list[dict[str, Any]]]] = {}
        self._mapped: list[_Range] = []
        self._frames: dict[Any, list[dict[str, Any]]] = {}

    def snapshot(self) -> dict[str, Any]:
        for entry in self._simulation.trail or ():
            if entry[0] > 0:
                self._taken(*entry)
            elif entry[0] < 0:
                self._given_back(-entry[0])
            elif entry[1:] == ("empty_cache",):
                self._allocator.empty_cache()
                self._segments_changed([_frame("empty_cache", "torch.cuda")])
        self._failed()
        frames = {address: frames for address, _, frames in self._alive.values()}
        config = self._allocator.config
        return {
            "segments": [_segment(segment, frames) for segment in self._allocator.segments()],
            "device_traces": [self._trace],
            "allocator_settings": {
                "expandable_segments": config.expandable_segments,
                "max_split_size": config.max_split_size_bytes or -1,
                "garbage_collection_threshold": config.garbage_collection_threshold or 0.0,
            },
            "external_annotations": [],
        }

    def _taken(self, handle: int, size_bytes: int, phase: str, step: int | None, op: Any, place: Any) -> None:
        frames = self._frames_of(phase, step, op, place)
        allocator = self._allocator
        before = allocator.reserved_bytes, allocator.retries
        block = allocator.malloc(size_bytes)
        assert block == handle, "the replay must take the same blocks"
        if (allocator.reserved_bytes, allocator.retries) != before:
            self._segments_changed(frames)
        address = allocator.address(block) - _ADDRESS_SHIFT
        self._alive[block] = (address, size_bytes, frames)
        self._note("alloc", address, size_bytes, frames)

    def _given_back(self, block: int) -> None:
        address, size_bytes, frames = self._alive.pop(block)
        self._allocator.free(block)
        self._note("free_requested", address, size_bytes, frames)
        self._note("free_completed", address, size_bytes, frames)

    def _failed(self) -> None:
        """The request that found the device full, if one did."""
        failure = self._simulation.out_of_memory
        if failure is None:
            return
        with contextlib.suppress(OutOfDeviceMemory):
            self._allocator.malloc(failure.requested_bytes)
        frames = [_frame(failure.op, failure.module or "model"), _frame(failure.phase, "out of memory")]
        self._segments_changed(frames)
        self._note("oom", 0, failure.requested_bytes, frames)
        self._trace[-1]["device_free"] = failure.free_bytes

    def _segments_changed(self, frames: list[dict[str, Any]]) -> None:
        now = [(s.address, s.address + s.size_bytes) for s in self._allocator.segments()]
        names = ("segment_unmap", "segment_map") if self._expandable else ("segment_free", "segment_alloc")
        for name, gone_or_new in zip(names, _differences(self._mapped, now), strict=True):
            for start, end in gone_or_new:
                self._note(name, start - _ADDRESS_SHIFT, end - start, frames)
        self._mapped = now

    def _note(self, action: str, address: int, size_bytes: int, frames: list[dict[str, Any]]) -> None:
        self._trace.append(
            {
                "action": action,
                "addr": address,
                "size": size_bytes,
                "stream": 0,
                "time_us": len(self._trace),
                "frames": frames,
            }
        )

    def _frames_of(self, phase: str, step: int | None, op: Any, place: Any) -> list[dict[str, Any]]:
        """The innermost frame is the operation in its module, the outer one the phase; shared where equal."""
        site = self._simulation.site(op, place)
        key = (site, phase, step)
        if key not in self._frames:
            outer = _frame(phase or "inputs", "step" if step else "set-up", step or 0)
            self._frames[key] = [_frame(site.op, site.module or "model"), outer]
        return self._frames[key]


def _frame(name: str, filename: str, line: int = 0) -> dict[str, Any]:
    return {"name": name, "filename": filename, "line": line}


def _segment(segment: Segment, frames: dict[int, list[dict[str, Any]]]) -> dict[str, Any]:
    blocks = [
        {
            "address": block.address - _ADDRESS_SHIFT,
            "size": block.size_bytes,
            "requested_size": block.requested_bytes,
            "state": "active_allocated" if block.allocated else "inactive",
            "frames": frames.get(block.address - _ADDRESS_SHIFT, []) if block.allocated else [],
        }
        for block in segment.blocks
    ]
    allocated = sum(block.size_bytes for block in segment.blocks if block.allocated)
    return {
        "device": 0,
        "address": segment.address - _ADDRESS_SHIFT,
        "total_size": segment.size_bytes,
        "allocated_size": allocated,
        "active_size": allocated,
        "requested_size": sum(block.requested_bytes for block in segment.blocks),
        "stream": segment.stream,
        "segment_type": segment.pool,
        "segment_pool_id": (0, 0),
        "is_expandable": segment.expandable,
        "frames": [],
        "blocks": blocks,
    }


def _differences(before: list[_Range], after: list[_Range]) -> tuple[list[_Range], list[_Range]]:
    """What is only in `before`, what only in `after`; both sorted and without overlaps.

    Whole segments come and go as they are; of an expandable one only the pages that changed.
    """
    gone, new = set(before) - set(after), set(after) - set(before)
    return list(_minus(sorted(gone), sorted(new))), list(_minus(sorted(new), sorted(gone)))


def _minus(ranges: list[_Range], taken_away: list[_Range]) -> Iterator[_Range]:
    for start, end in ranges:
        for other_start, other_end in taken_away:
            if other_end <= start or other_start >= end:
                continue
            if other_start > start:
                yield start, other_start
            start = max(start, other_end)
        if start < end:
            yield start, end
