"""Expandable segments against values worked by hand from c10/cuda/CUDACachingAllocator.cpp (torch 2.13)."""

from __future__ import annotations

import pytest

from planner.allocator import AllocatorConfig, CachingAllocator, OutOfDeviceMemory
from planner.units import MIB

EXPANDABLE = AllocatorConfig(expandable_segments=True)


def test_expandable_segments_grow_by_pages() -> None:
    """find_expandable_block, map_block: pages of 2 MiB (small) and 20 MiB (large), one segment a pool."""
    allocator = CachingAllocator(EXPANDABLE)
    first = allocator.malloc(1 * MIB + 1)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (1 * MIB + 512, 20 * MIB)
    second = allocator.malloc(25 * MIB)  # the free tail and one page more
    assert allocator.reserved_bytes == 40 * MIB
    assert allocator.address(second) == allocator.address(first) + 1 * MIB + 512
    allocator.malloc(13 * MIB)  # should_split: from 512 bytes on, so the last MiB is not wasted
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (39 * MIB + 512, 40 * MIB)
    allocator.malloc(1)
    assert allocator.reserved_bytes == 42 * MIB
    assert [(each.pool, each.size_bytes) for each in sorted(allocator.segments(), key=lambda s: s.pool)] == [
        ("large", 40 * MIB),
        ("small", 2 * MIB),
    ]


def test_expandable_segments_give_back_whole_pages_only() -> None:
    """ExpandableSegment::unmap: from segmentRight of the start to segmentLeft of the end."""
    allocator = CachingAllocator(EXPANDABLE)
    first, middle, last = (allocator.malloc(size * MIB) for size in (25, 50, 5))
    lowest = allocator.address(first)
    assert allocator.reserved_bytes == 80 * MIB
    allocator.free(middle)  # 25 to 75 MiB: pages 40 to 60
    allocator.empty_cache()
    assert allocator.reserved_bytes == 60 * MIB
    stretches = [(each.address - lowest, each.size_bytes) for each in allocator.segments()]
    assert stretches == [(0, 40 * MIB), (60 * MIB, 20 * MIB)]
    again = allocator.malloc(30 * MIB)  # free 25 to 40, one page mapped again
    assert allocator.address(again) == lowest + 25 * MIB
    assert allocator.reserved_bytes == 80 * MIB
    for handle in (first, last, again):
        allocator.free(handle)
    allocator.empty_cache()
    assert (allocator.reserved_bytes, allocator.segments()) == (0, [])


def test_growing_into_the_tail_comes_last() -> None:
    """get_free_block: a block that can still grow counts with all it can grow to, so a larger hole wins."""
    allocator = CachingAllocator(EXPANDABLE)
    hole = allocator.malloc(15 * MIB)
    allocator.malloc(12 * MIB)  # 27 of 40 MiB: the tail is 13 MiB
    address = allocator.address(hole)
    allocator.free(hole)
    assert allocator.address(allocator.malloc(10 * MIB)) == address  # the tail fits better, yet can grow
    assert allocator.reserved_bytes == 40 * MIB


def test_expandable_segments_run_out_of_memory() -> None:
    """map_block refuses what cuMemCreate refuses; free pages are given back before the second try."""
    allocator = CachingAllocator(EXPANDABLE, device_bytes=50 * MIB)
    first = allocator.malloc(30 * MIB)
    with pytest.raises(OutOfDeviceMemory):
        allocator.malloc(15 * MIB)
    assert (allocator.retries, allocator.reserved_bytes) == (1, 40 * MIB)
    allocator.malloc(10 * MIB)
    allocator.free(first)
    allocator.malloc(1 * MIB, stream=1)
    assert (allocator.retries, allocator.reserved_bytes) == (1, 42 * MIB)
    allocator.malloc(5 * MIB, stream=1)  # needs the page that stream 0 left free
    assert (allocator.retries, allocator.reserved_bytes) == (2, 42 * MIB)


def test_a_page_fits_exactly() -> None:
    allocator = CachingAllocator(EXPANDABLE, device_bytes=40 * MIB)
    allocator.malloc(30 * MIB)
    assert (allocator.retries, allocator.reserved_bytes) == (0, 40 * MIB)


def test_holes_are_filled_before_the_segment_grows() -> None:
    """find_expandable_block: the lowest addresses with enough room; a live block ends it."""
    allocator = CachingAllocator(EXPANDABLE)
    first, second, _ = (allocator.malloc(20 * MIB) for _ in range(3))
    lowest = allocator.address(first)
    allocator.free(first)
    allocator.empty_cache()
    assert allocator.address(allocator.malloc(45 * MIB)) == lowest + 60 * MIB
    assert allocator.reserved_bytes == (40 + 60) * MIB
    allocator.free(second)
    assert allocator.address(allocator.malloc(25 * MIB)) == lowest  # a page mapped, merged with the free one
    assert allocator.reserved_bytes == (40 + 60 + 20) * MIB


def test_what_was_mapped_before_a_failure_counts() -> None:
    """try_allocate_expandable_block maps stretch by stretch; the first stays when the second is refused."""
    allocator = CachingAllocator(EXPANDABLE, device_bytes=50 * MIB)
    first, second = allocator.malloc(20 * MIB), allocator.malloc(10 * MIB)
    allocator.free(first)
    allocator.empty_cache()
    allocator.free(second)  # page 0 unmapped, page 1 free, the rest unmapped
    assert allocator.reserved_bytes == 20 * MIB
    with pytest.raises(OutOfDeviceMemory):
        allocator.malloc(55 * MIB)
    assert (allocator.reserved_bytes, allocator.peak_reserved_bytes) == (0, 40 * MIB)
    assert allocator.malloc(40 * MIB)
