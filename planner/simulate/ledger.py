"""Every storage of the simulated device: what it is for, and what was alive at the peak."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch

from planner.allocator import CachingAllocator, OutOfDeviceMemory
from planner.report import PARTS

__all__ = ["Ledger", "Moment", "TooManyEvents"]

LARGEST_EVENT_COUNT = 20_000_000  # a 405 B model takes about 200,000; what needs more is not a step


class TooManyEvents(Exception):
    """The trace has grown past its limit."""


@dataclass(slots=True)
class Moment:
    """What was alive when allocated memory was highest, and who asked for it."""

    allocated_bytes: int = 0
    parts: dict[str, int] = field(default_factory=dict)
    phase: str = ""
    step: int | None = None
    op: str = ""
    place: Any = None
    event: int = 0


@dataclass(slots=True)
class _Entry:
    block: int
    size_bytes: int
    part: str
    watch: Any
    born: int


class Ledger:
    """Storages of the simulated device by identity, each in the allocator and in one part.

    `part` names the part that new storages belong to; `op` and `place` say who is asking. `record`,
    `retag` and `scratch` are the only ways in, the storage's own end the only way out.
    """

    def __init__(self, allocator: CachingAllocator) -> None:
        """An empty device."""
        self.allocator = allocator
        self.part = "base_weights"
        self.stream = 0  # whose pools serve new blocks
        self.phase = ""
        self.step: int | None = None
        self.last_step: int | None = None
        self.op: Any = ""
        self.place: Any = None
        self.failed_at: tuple[Any, Any] | None = None
        self.peak = Moment()
        self.peak_in_phase = False  # of equal peaks the latest phase's first counts, as a probe sees it
        self.totals = dict.fromkeys(PARTS, 0)
        self.paged_bytes = 0  # of bitsandbytes' paged optimizers: managed memory, not the allocator's
        self.offloaded_bytes = self._on_host_bytes = 0  # most at once, and now, of what waits on the host
        self.events: list[int] = []
        self.trail: list[tuple[Any, ...]] | None = None  # see planner.simulate.events
        self._live: dict[int, _Entry] = {}

    def record(self, tensor: torch.Tensor, part: str | None = None) -> int:
        """Allocate the tensor's storage unless it is known already; its identity where it is new, else 0."""
        storage = tensor.untyped_storage()
        key: int = storage._cdata
        if key in self._live:
            return 0
        tag = part or self.part
        block, size = self._malloc(storage.nbytes(), tag)
        watch = weakref.ref(storage, lambda _ref: self._free(key))
        self._live[key] = _Entry(block, size, tag, watch, len(self.events))
        return key

    def knows(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's storage is on the device already."""
        return _identity(tensor) in self._live

    def retag(self, tensor: torch.Tensor, part: str) -> int:
        """Move the tensor's storage to another part; the bytes that moved."""
        entry = self._live.get(_identity(tensor))
        if entry is None or entry.part == part:
            return 0
        self.totals[entry.part] -= entry.size_bytes
        self.totals[part] += entry.size_bytes
        entry.part = part
        return entry.size_bytes

    def count_paged(self, size_bytes: int) -> None:
        """Note managed memory, which torch's allocator does not know."""
        self.paged_bytes += size_bytes

    def count_on_host(self, size_bytes: int) -> None:
        """Note what autograd brings to the host's memory, and what goes from there (negative)."""
        self._on_host_bytes += size_bytes
        self.offloaded_bytes = max(self.offloaded_bytes, self._on_host_bytes)

    def was_at_peak(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's storage was there when allocated memory was highest."""
        entry = self._live.get(_identity(tensor))
        return entry is not None and entry.born <= self.peak.event

    def bytes_of(self, tensor: torch.Tensor) -> int:
        """Bytes of the block that holds the tensor's storage, 0 where it is not on the device."""
        entry = self._live.get(_identity(tensor))
        return entry.size_bytes if entry else 0

    def left_the_device(self, tensor: torch.Tensor) -> None:
        """Give the tensor's block back though the tensor lives on: it has moved to the host's memory."""
        self._free(_identity(tensor))

    def scratch(self, sizes_bytes: list[int], part: str = "temporaries") -> None:
        """Blocks that a kernel takes together and gives back before it returns."""
        held = [self._malloc(size, part) for size in sizes_bytes]
        for block, size in reversed(held):
            self.totals[part] -= size
            self._give_back(block)

    def workspace(self, size_bytes: int) -> None:
        """A block that a library keeps for good."""
        self._malloc(size_bytes, "workspace")

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Follow a storage that was given another size: FSDP2 empties and refills gathered weights so."""
        entry = self._live.get(storage._cdata)
        if entry is None:
            return
        if entry.block:
            self.totals[entry.part] -= entry.size_bytes
            self._give_back(entry.block)
            entry.block = entry.size_bytes = 0
        if size_bytes := storage.nbytes():
            entry.block, entry.size_bytes = self._malloc(size_bytes, entry.part)
            entry.born = len(self.events)

    def failed(self) -> None:
        """Note who is asking: what runs while the error passes would be named instead."""
        if self.failed_at is None:
            self.failed_at = self.op, self.place

    def empty_cache(self) -> None:
        """Give back every segment that holds nothing, as `torch.cuda.empty_cache` does."""
        self.allocator.empty_cache()
        self.note("empty_cache")

    def note(self, *words: Any) -> None:
        """Put words between the trail's blocks, where one is kept: a phase begins, a weight has arrived."""
        if self.trail is not None:
            self.trail.append((0, *words))

    def _malloc(self, size_bytes: int, part: str) -> tuple[int, int]:
        allocator = self.allocator
        try:
            block = allocator.malloc(size_bytes, self.stream)
        except OutOfDeviceMemory:
            self.failed()
            raise
        size = allocator.block_bytes(block)
        self.totals[part] += size
        if allocator.allocated_bytes >= self.peak.allocated_bytes + self.peak_in_phase:
            self.peak_in_phase = True
            self.peak = Moment(
                allocator.allocated_bytes,
                self.totals.copy(),
                self.phase,
                self.step,
                self.op,
                self.place,
                len(self.events) + 1,
            )
        self.events.append(allocator.allocated_bytes)
        if len(self.events) > LARGEST_EVENT_COUNT:
            raise TooManyEvents
        if self.trail is not None:
            self.trail.append((block, size_bytes, self.phase, self.step, self.op, self.place))
        return block, size

    def _free(self, key: int) -> None:
        entry = self._live.pop(key, None)
        if entry is not None:
            self.totals[entry.part] -= entry.size_bytes
            self._give_back(entry.block)

    def _give_back(self, block: int) -> None:
        self.allocator.free(block)
        self.events.append(self.allocator.allocated_bytes)  # nothing here may raise: a weakref calls
        if self.trail is not None:
            self.trail.append((-block,))


def _identity(tensor: torch.Tensor) -> int:
    """The identity of a tensor's storage; a DTensor's is that of its shard."""
    identity: int = getattr(tensor, "_local_tensor", tensor).untyped_storage()._cdata
    return identity
