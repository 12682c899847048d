"""Blocks of device memory and the pools of free ones, as PyTorch's CUDA caching allocator keeps them."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["ADDRESS_BITS", "AddressSpace", "Block", "ExpandableRange", "Pool", "Segment", "SegmentBlock"]

# One integer orders free blocks by size, then address (BlockComparatorSize): size << ADDRESS_BITS | address.
ADDRESS_BITS = 64


@dataclass(frozen=True, slots=True)
class ExpandableRange:
    """Reserved addresses that are mapped page by page: where they start and how large a page is."""

    start: int
    page_bytes: int


class Block:
    """A piece of a segment: live, free, or (in an expandable segment) addresses without memory.

    `previous` and `next` are its neighbours in the segment. `born` is the number of searches in the large
    pool when the block was last freed, from which garbage collection takes its age.
    """

    __slots__ = (
        "address", "allocated", "born", "mapped", "next", "pool", "previous", "range", "requested", "size",
    )  # fmt: skip

    def __init__(
        self,
        address: int,
        size: int,
        pool: Pool,
        previous: Block | None = None,
        next: Block | None = None,
        range: ExpandableRange | None = None,
    ) -> None:
        self.address = address
        self.size = size
        self.pool = pool
        self.previous = previous
        self.next = next
        self.range = range
        self.requested = 0
        self.allocated = False
        self.mapped = True
        self.born = 0


class Pool:
    """The free blocks of one stream, either the small ones (up to 1 MiB) or the large ones.

    `keys` is sorted, `at` finds the block of a key, `unmapped` holds the blocks without memory by address.
    """

    __slots__ = ("at", "is_small", "keys", "stream", "unmapped")

    def __init__(self, stream: int, is_small: bool) -> None:
        self.stream = stream
        self.is_small = is_small
        self.keys: list[int] = []
        self.at: dict[int, Block] = {}
        self.unmapped: list[Block] = []

    def put(self, block: Block) -> None:
        """Adds a free block."""
        key = block.size << ADDRESS_BITS | block.address
        insort(self.keys, key)
        self.at[key] = block

    def take(self, block: Block) -> None:
        """Removes a free block."""
        key = block.size << ADDRESS_BITS | block.address
        del self.keys[bisect_left(self.keys, key)]
        del self.at[key]


class AddressSpace:
    """Where new segments land: below all older ones, or above them. Addresses are never used twice."""

    __slots__ = ("_descending", "_edge")

    def __init__(self, descending: bool) -> None:
        self._descending = descending
        self._edge = 1 << (ADDRESS_BITS - 1)  # the middle: more room on both sides than any run can use up

    def reserve(self, size: int) -> int:
        """The address of the next segment of `size` bytes."""
        if self._descending:
            self._edge -= size
            return self._edge
        self._edge += size
        return self._edge - size


class SegmentBlock(NamedTuple):
    """A block in a snapshot; `requested_bytes` is 0 where it is free."""

    address: int
    size_bytes: int
    requested_bytes: int
    allocated: bool


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A segment in a snapshot (one mapped stretch of an expandable one), its blocks in order of address."""

    address: int
    size_bytes: int
    pool: str  # "small" or "large"
    stream: int
    expandable: bool
    blocks: tuple[SegmentBlock, ...]


def segments_of(blocks: list[Block]) -> list[Segment]:
    """The snapshot of all mapped blocks, by address (DeviceCachingAllocator::snapshot)."""
    heads = [block for block in blocks if block.previous is None or not block.previous.mapped]
    return [_segment(head) for head in sorted(heads, key=lambda block: block.address)]


def _segment(head: Block) -> Segment:
    blocks = []
    block: Block | None = head
    while block is not None and block.mapped:
        requested = block.requested if block.allocated else 0
        blocks.append(SegmentBlock(block.address, block.size, requested, block.allocated))
        block = block.next
    return Segment(
        address=head.address,
        size_bytes=sum(each.size_bytes for each in blocks),
        pool="small" if head.pool.is_small else "large",
        stream=head.pool.stream,
        expandable=head.range is not None,
        blocks=tuple(blocks),
    )
