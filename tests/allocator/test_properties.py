"""What holds for every sequence of requests, and two slow models that derive the same numbers another way.

`Plain` and `Paged` keep no free lists and never merge: they look at live blocks and mapped pages only, and
find the free stretches between them anew for each request.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise

import pytest
from hypothesis import given, settings, strategies as st

from planner.allocator import AllocatorConfig, CachingAllocator, OutOfDeviceMemory
from planner.units import KIB, MIB

SIZES = st.one_of(
    st.integers(1, 3 * KIB),
    st.integers(1, 16).map(lambda count: count * 256 * KIB),
    st.sampled_from([count * MIB // 2 for count in range(3, 100)]),
    st.sampled_from([count * MIB + 1 for count in range(1, 30)]),
    st.sampled_from([10 * MIB, 12 * MIB, 20 * MIB, 40 * MIB]),
)
# (size, stream) for malloc, a position among the live blocks for free, None for empty_cache
STEPS = st.lists(
    st.one_of(
        st.tuples(SIZES, st.integers(0, 1)),
        st.tuples(SIZES, st.integers(0, 1)),
        st.integers(0, 1000),
        st.integers(0, 1000),
        st.none(),
    ),
    max_size=60,
)
Steps = list[tuple[int, int] | int | None]
CONFIGS = [
    "",
    "expandable_segments:True",
    "max_split_size_mb:32",
    "expandable_segments:True,max_split_size_mb:24",
    "roundup_power2_divisions:4",
    "garbage_collection_threshold:0.4,per_process_memory_fraction:0.9",
    "expandable_segments:True,garbage_collection_threshold:0.4,per_process_memory_fraction:0.9",
]


def replay(
    steps: Steps, allocator: CachingAllocator, look: Callable[[], None] = lambda: None
) -> dict[int, tuple[int, int]]:
    """Plays the steps; the live blocks as handle -> (size asked, stream)."""
    live: dict[int, tuple[int, int]] = {}
    for step in steps:
        if step is None:
            allocator.empty_cache()
        elif isinstance(step, tuple):
            with suppress(OutOfDeviceMemory):  # the allocator goes on, which is what `look` looks at
                live[allocator.malloc(*step)] = step
        elif live:
            handle = list(live)[step % len(live)]
            del live[handle]
            allocator.free(handle)
        look()
    return live


def check(allocator: CachingAllocator, expandable: bool) -> None:
    """No overlap, nothing lost, everything merged, counters equal to sums over the snapshot."""
    segments = allocator.segments()
    blocks = [block for segment in segments for block in segment.blocks]
    for segment in segments:
        assert segment.address == segment.blocks[0].address
        for left, right in pairwise(segment.blocks):
            assert left.address + left.size_bytes == right.address
            assert left.allocated or right.allocated, "two free neighbours"
    for one, other in pairwise(segments):
        assert one.address + one.size_bytes <= other.address
    assert all(block.size_bytes >= max(512, block.requested_bytes) for block in blocks)
    assert all(block.size_bytes % 512 == 0 for block in blocks)
    if not expandable:  # a large remainder that is split off is never below 1 MiB
        large = [block for segment in segments if segment.pool == "large" for block in segment.blocks]
        assert all(block.size_bytes > 1 * MIB for block in large)
    assert sum(block.size_bytes for block in blocks if block.allocated) == allocator.allocated_bytes
    assert sum(block.size_bytes for block in blocks) == allocator.reserved_bytes
    assert sum(segment.size_bytes for segment in segments) == allocator.reserved_bytes
    assert allocator.peak_allocated_bytes >= allocator.allocated_bytes
    assert allocator.peak_reserved_bytes >= allocator.reserved_bytes


@pytest.mark.parametrize("text", CONFIGS)
@pytest.mark.parametrize("device_bytes", [None, 150 * MIB])
@settings(max_examples=60, deadline=None)
@given(steps=STEPS)
def test_invariants(text: str, device_bytes: int | None, steps: Steps) -> None:
    config = AllocatorConfig.parse(text)
    allocator = CachingAllocator(config, device_bytes=device_bytes, total_bytes=160 * MIB)
    live = replay(steps, allocator, lambda: check(allocator, config.expandable_segments))
    if device_bytes is not None:
        assert allocator.peak_reserved_bytes <= device_bytes
    for handle, (asked, _) in live.items():
        assert allocator.block_bytes(handle) >= asked
    for handle in live:
        allocator.free(handle)
    allocator.empty_cache()
    assert (allocator.allocated_bytes, allocator.reserved_bytes, allocator.segments()) == (0, 0, [])


@pytest.mark.parametrize("text", CONFIGS)
@settings(max_examples=20, deadline=None)
@given(steps=STEPS)
def test_the_same_steps_give_the_same_memory(text: str, steps: Steps) -> None:
    config = AllocatorConfig.parse(text)
    one, other = (CachingAllocator(config, device_bytes=150 * MIB, total_bytes=160 * MIB) for _ in range(2))
    assert replay(steps, one) == replay(steps, other)
    assert one.segments() == other.segments()
    assert one.retries == other.retries


@settings(max_examples=60, deadline=None)
@given(steps=STEPS)
def test_a_device_that_is_large_enough_changes_nothing(steps: Steps) -> None:
    free = CachingAllocator()
    replay(steps, free)
    bounded = CachingAllocator(device_bytes=free.peak_reserved_bytes)
    replay(steps, bounded)
    assert bounded.retries == 0
    assert bounded.segments() == free.segments()


class Plain:
    """The default allocator: segments as (start, end, stream, small) and live blocks as start -> end."""

    def __init__(self) -> None:
        self.segments: list[tuple[int, int, int, bool]] = []
        self.live: dict[int, int] = {}
        self.lowest = 0

    def malloc(self, asked: int, stream: int) -> int:
        size = -(-asked // 512) * 512
        small = size <= MIB
        fits = [hole for hole in self.holes(stream, small) if hole[1] - hole[0] >= size]
        start, end = min(fits, key=lambda hole: (hole[1] - hole[0], hole[0]), default=(0, 0))
        if not fits:
            length = 2 * MIB if small else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
            self.lowest -= length
            start, end = self.lowest, self.lowest + length
            self.segments.append((start, end, stream, small))
        rest = end - start - size
        self.live[start] = start + size if rest > (0 if small else MIB) else end
        return start

    def holes(self, stream: int, small: bool) -> list[tuple[int, int]]:
        found = []
        for first, last, *kind in self.segments:
            if kind == [stream, small]:
                inside = sorted(block for block in self.live.items() if first <= block[0] < last)
                edges = [(first, first), *inside, (last, last)]
                found += [(left[1], right[0]) for left, right in pairwise(edges) if left[1] < right[0]]
        return found

    def empty_cache(self) -> None:
        self.segments = [s for s in self.segments if any(s[0] <= start < s[1] for start in self.live)]

    def reserved(self) -> int:
        return sum(segment[1] - segment[0] for segment in self.segments)


class Paged:
    """Expandable segments: for each stream and pool the mapped pages and the live blocks of one line."""

    def __init__(self) -> None:
        self.pages: dict[tuple[int, bool], set[int]] = {}
        self.live: dict[tuple[int, bool, int], int] = {}

    def malloc(self, asked: int, stream: int) -> tuple[int, bool, int]:
        size = -(-asked // 512) * 512
        small = size <= MIB
        page = 2 * MIB if small else 20 * MIB
        pages = self.pages.setdefault((stream, small), set())
        start = self.fit(size, pages, page, self.blocks(stream, small))
        pages.update(range(start // page, -(-(start + size) // page)))
        self.live[stream, small, start] = start + size
        return stream, small, start

    def blocks(self, stream: int, small: bool) -> list[tuple[int, int]]:
        return sorted((key[2], end) for key, end in self.live.items() if key[:2] == (stream, small))

    @staticmethod
    def fit(size: int, pages: set[int], page: int, blocks: list[tuple[int, int]]) -> int:
        """The start: the best mapped stretch, counted at the size it can grow to, or the lowest gap."""
        end_of_line = 1 << 60
        stretches = []  # (mapped length, start, length with the unmapped pages behind it)
        gaps = []  # starts of free room that ends in, or has, unmapped pages
        for (_, begin), (end, _) in pairwise([(0, 0), *blocks, (end_of_line, end_of_line)]):
            cut = begin
            while cut < end:
                mapped = cut
                while mapped < end and mapped // page in pages:
                    mapped = min(end, (mapped // page + 1) * page)
                later = [each * page for each in pages if mapped <= each * page < end]
                grown = min(later, default=end)
                if mapped > cut:
                    stretches.append((mapped - cut, cut, grown - cut))
                if grown > mapped and end - cut >= size:
                    gaps.append(cut)
                cut = grown
        order = [each for each in sorted(stretches) if each[0] >= size]
        if not order:
            return min(gaps)
        best = 0
        while best + 1 < len(order) and order[best + 1][2] < order[best][2]:
            best += 1
        return order[best][1]

    def empty_cache(self) -> None:
        for (stream, small), pages in self.pages.items():
            page = 2 * MIB if small else 20 * MIB
            used = [range(start // page, -(-end // page)) for start, end in self.blocks(stream, small)]
            pages.intersection_update({each for span in used for each in span})

    def reserved(self) -> int:
        return sum(len(pages) * (2 if small else 20) * MIB for (_, small), pages in self.pages.items())


@pytest.mark.parametrize("slow, text", [(Plain, ""), (Paged, "expandable_segments:True")])
@settings(max_examples=150, deadline=None)
@given(steps=STEPS)
def test_a_slow_model_without_free_lists_agrees(
    slow: type[Plain] | type[Paged], text: str, steps: Steps
) -> None:
    fast, model = CachingAllocator(AllocatorConfig.parse(text)), slow()
    live: list[tuple[int, object]] = []
    for step in steps:
        if step is None:
            fast.empty_cache()
            model.empty_cache()
        elif isinstance(step, tuple):
            live.append((fast.malloc(*step), model.malloc(*step)))
        elif live:
            handle, start = live.pop(step % len(live))
            fast.free(handle)
            del model.live[start]  # type: ignore[arg-type]
        assert fast.reserved_bytes == model.reserved()
        allocated = sum(
            end - (start[2] if isinstance(start, tuple) else start) for start, end in model.live.items()
        )
        assert fast.allocated_bytes == allocated
