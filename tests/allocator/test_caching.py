"""The allocator's model against values worked by hand from c10/cuda/CUDACachingAllocator.cpp (torch 2.13).

Each test names the C++ function whose lines decide the numbers.
"""

from __future__ import annotations

import pickle

import pytest

from planner.allocator import AllocatorConfig, CachingAllocator, OutOfDeviceMemory
from planner.errors import PlannerError, SetupError
from planner.units import GIB, KIB, MIB


def freed(allocator: CachingAllocator, *sizes: int) -> None:
    """Leaves whole cached segments behind: all alive at once, so that none is carved from another."""
    handles = [allocator.malloc(size) for size in sizes]
    for handle in handles:
        allocator.free(handle)


@pytest.mark.parametrize(
    "asked, block, segment",
    [
        # round_size: kMinBlockSize 512; get_allocation_size: up to kSmallSize 1 MiB from kSmallBuffer 2 MiB
        (1, 512, 2 * MIB),
        (512, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (1 * MIB, 1 * MIB, 2 * MIB),
        # below kMinLargeAlloc 10 MiB from 20 MiB; should_split: remainder above kSmallSize
        (1 * MIB + 1, 1 * MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        # from there on multiples of kRoundLarge 2 MiB
        (10 * MIB, 10 * MIB, 10 * MIB),
        (10 * MIB + 1, 10 * MIB + 512, 12 * MIB),
        (11 * MIB - 1, 12 * MIB, 12 * MIB),  # 11 MiB after rounding: remainder 1 MiB, not above kSmallSize
        (11 * MIB - 512, 11 * MIB - 512, 12 * MIB),  # remainder 1 MiB + 512: split
        (11 * MIB, 12 * MIB, 12 * MIB),  # the remainder counts as allocated
        (12 * MIB, 12 * MIB, 12 * MIB),
        (1 * GIB + 1, 1 * GIB + 512, 1 * GIB + 2 * MIB),
    ],
)
def test_first_request(asked: int, block: int, segment: int) -> None:
    allocator = CachingAllocator()
    handle = allocator.malloc(asked)
    assert allocator.block_bytes(handle) == allocator.allocated_bytes == block
    assert allocator.reserved_bytes == segment
    assert (allocator.peak_allocated_bytes, allocator.peak_reserved_bytes) == (block, segment)
    (only,) = allocator.segments()
    assert only.size_bytes == segment
    assert only.pool == ("small" if segment == 2 * MIB else "large")
    assert only.blocks[0] == (allocator.address(handle), block, asked, True)
    assert [tuple(rest)[1:] for rest in only.blocks[1:]] == (
        [] if block == segment else [(segment - block, 0, False)]
    )


def test_zero_bytes_take_nothing() -> None:
    """NativeCachingAllocator::allocate calls malloc only for size != 0; free(nullptr) returns."""
    allocator = CachingAllocator()
    assert allocator.malloc(0) == 0
    allocator.free(0)
    assert (allocator.block_bytes(0), allocator.address(0), allocator.reserved_bytes) == (0, 0, 0)


def test_a_handle_is_freed_once() -> None:
    allocator = CachingAllocator()
    handle = allocator.malloc(512)
    allocator.free(handle)
    with pytest.raises(KeyError):
        allocator.free(handle)


def test_small_blocks_share_a_segment_until_it_is_full() -> None:
    """should_split: the small pool splits from a remainder of 512 bytes on."""
    allocator = CachingAllocator()
    first = allocator.malloc(2 * MIB // 2)
    second = allocator.malloc(1 * MIB - 512)
    third = allocator.malloc(512)
    assert allocator.reserved_bytes == allocator.allocated_bytes == 2 * MIB
    assert allocator.address(second) == allocator.address(first) + 1 * MIB
    assert allocator.address(third) == allocator.address(first) + 2 * MIB - 512
    allocator.malloc(1)
    assert allocator.reserved_bytes == 4 * MIB


def test_the_smallest_block_that_fits_wins() -> None:
    """get_free_block: lower_bound by BlockComparatorSize."""
    allocator = CachingAllocator()
    freed(allocator, 40 * MIB, 30 * MIB, 50 * MIB)
    handle = allocator.malloc(29 * MIB)
    assert allocator.block_bytes(handle) == 30 * MIB  # remainder 1 MiB: not split
    assert allocator.reserved_bytes == 120 * MIB


@pytest.mark.parametrize("newer_segments_lower", [True, False])
def test_of_equal_blocks_the_lower_address_wins(newer_segments_lower: bool) -> None:
    """BlockComparatorSize falls back to the pointer; which segment lies lower is the driver's doing."""
    allocator = CachingAllocator(AllocatorConfig(newer_segments_lower=newer_segments_lower))
    handles = [allocator.malloc(12 * MIB) for _ in range(3)]
    addresses = [allocator.address(handle) for handle in handles]
    assert addresses == sorted(addresses, reverse=newer_segments_lower)
    for handle in handles:
        allocator.free(handle)
    expected = addresses[2] if newer_segments_lower else addresses[0]
    assert allocator.address(allocator.malloc(12 * MIB)) == expected == min(addresses)


def test_the_newest_segment_is_the_default_winner() -> None:
    assert AllocatorConfig().newer_segments_lower


def test_streams_do_not_share_blocks() -> None:
    """get_free_block: a block of another stream is no match."""
    allocator = CachingAllocator()
    freed(allocator, 12 * MIB)
    other = allocator.malloc(12 * MIB, stream=7)
    assert allocator.reserved_bytes == 24 * MIB
    allocator.free(other)
    allocator.malloc(12 * MIB, stream=7)
    allocator.malloc(12 * MIB)
    assert allocator.reserved_bytes == 24 * MIB
    assert sorted(segment.stream for segment in allocator.segments()) == [0, 7]


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
def test_neighbours_merge_whatever_the_order(order: tuple[int, ...]) -> None:
    """free_block: try_merge_blocks with prev and next."""
    allocator = CachingAllocator()
    handles = [allocator.malloc(size) for size in (4 * MIB, 5 * MIB, 6 * MIB)]
    assert allocator.reserved_bytes == 20 * MIB
    for index in order:
        allocator.free(handles[index])
    (segment,) = allocator.segments()
    assert [block.size_bytes for block in segment.blocks] == [20 * MIB]
    assert allocator.allocated_bytes == 0


def test_empty_cache_keeps_segments_with_a_live_block() -> None:
    """release_blocks: only blocks without prev and next."""
    allocator = CachingAllocator()
    allocator.malloc(3 * MIB)
    freed(allocator, 4 * MIB, 64 * MIB)
    allocator.malloc(100)
    assert allocator.reserved_bytes == (20 + 64 + 2) * MIB
    allocator.empty_cache()
    assert allocator.reserved_bytes == (20 + 2) * MIB
    assert allocator.peak_reserved_bytes == (20 + 64 + 2) * MIB


def test_reset_peak() -> None:
    """reset_peak_stat: peak = current."""
    allocator = CachingAllocator()
    freed(allocator, 64 * MIB)
    allocator.malloc(2 * MIB)
    assert allocator.peak_allocated_bytes == 64 * MIB
    allocator.empty_cache()
    allocator.reset_peak()
    assert allocator.peak_allocated_bytes == 2 * MIB
    assert allocator.peak_reserved_bytes == 64 * MIB  # carved from the cached segment


def test_a_full_device_gives_the_cache_back_and_tries_again() -> None:
    """malloc: alloc_block, release_cached_blocks, alloc_block(isRetry) counts in num_alloc_retries."""
    allocator = CachingAllocator(device_bytes=60 * MIB)
    kept = allocator.malloc(512)
    freed(allocator, 20 * MIB, 30 * MIB)
    allocator.malloc(40 * MIB)
    assert allocator.retries == 1
    assert allocator.reserved_bytes == 42 * MIB
    assert allocator.peak_reserved_bytes == 52 * MIB
    assert allocator.block_bytes(kept) == 512


def test_out_of_memory() -> None:
    allocator = CachingAllocator(device_bytes=60 * MIB)
    allocator.malloc(512)
    live = allocator.malloc(30 * MIB)
    freed(allocator, 12 * MIB)
    with pytest.raises(OutOfDeviceMemory) as caught:
        allocator.malloc(30 * MIB)
    error = caught.value
    assert (error.requested_bytes, error.allocated_bytes) == (30 * MIB, 30 * MIB + 512)
    assert (error.reserved_bytes, error.device_bytes) == (32 * MIB, 60 * MIB)
    assert isinstance(error, PlannerError)
    assert "\n" not in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert allocator.retries == 1
    allocator.free(live)
    allocator.malloc(58 * MIB)  # the allocator goes on
    assert allocator.reserved_bytes == 60 * MIB
    assert allocator.retries == 2


def test_blocks_above_max_split_size_are_for_large_requests_only() -> None:
    """get_free_block: no oversize block for a smaller request, less than 20 MiB of slack for a larger."""
    allocator = CachingAllocator(AllocatorConfig(max_split_size_bytes=32 * MIB))
    freed(allocator, 40 * MIB)
    allocator.malloc(30 * MIB)
    assert allocator.reserved_bytes == 70 * MIB
    whole = allocator.malloc(34 * MIB)
    assert allocator.block_bytes(whole) == 40 * MIB  # should_split: never from max_split_size on
    assert allocator.reserved_bytes == 70 * MIB
    freed(allocator, 64 * MIB)
    allocator.malloc(44 * MIB)  # 64 >= 44 + 20
    assert allocator.reserved_bytes == (70 + 64 + 44) * MIB
    allocator.malloc(44 * MIB + 512)  # 64 < 44 + 20 + 512 B
    assert allocator.reserved_bytes == (70 + 64 + 44) * MIB


@pytest.mark.parametrize(
    "max_split_size_bytes, reserved, retries",
    [(32 * MIB, 20 + 60, 0), (None, 60, 1)],  # without max_split_size the 20 MiB go as well
)
def test_oversize_blocks_are_released_first(
    max_split_size_bytes: int | None, reserved: int, retries: int
) -> None:
    """release_available_cached_blocks: 50 and then 40 MiB for a request of 60."""
    config = AllocatorConfig(max_split_size_bytes=max_split_size_bytes)
    allocator = CachingAllocator(config, device_bytes=115 * MIB)
    freed(allocator, 40 * MIB, 20 * MIB, 50 * MIB)
    allocator.malloc(60 * MIB)
    assert (allocator.reserved_bytes, allocator.retries) == (reserved * MIB, retries)


def test_one_oversize_block_is_released_where_it_suffices() -> None:
    """release_available_cached_blocks: lower_bound of the request; 70 MiB are too many to hand out."""
    allocator = CachingAllocator(AllocatorConfig(max_split_size_bytes=32 * MIB), device_bytes=115 * MIB)
    freed(allocator, 70 * MIB, 40 * MIB)
    allocator.malloc(45 * MIB)
    assert (allocator.reserved_bytes, allocator.retries) == ((40 + 46) * MIB, 0)


def test_too_few_oversize_blocks_fall_through_to_all_of_the_cache() -> None:
    """release_available_cached_blocks: 40 MiB released are below 70, which ends it, although 70 would fit."""
    allocator = CachingAllocator(AllocatorConfig(max_split_size_bytes=32 * MIB), device_bytes=100 * MIB)
    freed(allocator, 40 * MIB, 24 * MIB)
    allocator.malloc(70 * MIB)
    assert (allocator.reserved_bytes, allocator.retries) == (70 * MIB, 1)


def test_no_more_oversize_blocks_are_released_than_needed() -> None:
    """release_available_cached_blocks: 50 and 36 MiB reach the 80 asked for, so 34 MiB stay."""
    allocator = CachingAllocator(AllocatorConfig(max_split_size_bytes=32 * MIB), device_bytes=125 * MIB)
    freed(allocator, 34 * MIB, 36 * MIB, 50 * MIB)
    allocator.malloc(80 * MIB)
    assert (allocator.reserved_bytes, allocator.retries) == ((34 + 80) * MIB, 0)


def test_a_block_of_max_split_size_is_oversize() -> None:
    """get_free_block: size >= max_split_size, so a merged 20 MiB segment serves no small request again."""
    allocator = CachingAllocator(AllocatorConfig(max_split_size_bytes=20 * MIB))
    freed(allocator, 5 * MIB)
    allocator.malloc(5 * MIB)
    assert allocator.reserved_bytes == 40 * MIB


@pytest.mark.parametrize(
    "settings, reserved",
    [
        ("garbage_collection_threshold:0.5,per_process_memory_fraction:0.5", 40 + 30 + 60),
        ("garbage_collection_threshold:0.5", 50 + 40 + 30 + 60),  # no allowed_memory_maximum
        ("per_process_memory_fraction:0.5", 50 + 40 + 30 + 60),
    ],
)
def test_garbage_collection_frees_what_was_unused_longest(settings: str, reserved: int) -> None:
    """garbage_collect_cached_blocks: above 0.5 of 200 MiB, blocks of at least the average age go."""
    allocator = CachingAllocator(AllocatorConfig.parse(settings), total_bytes=400 * MIB)
    old, young = allocator.malloc(50 * MIB), allocator.malloc(40 * MIB)
    allocator.free(old)
    allocator.malloc(30 * MIB, stream=1)
    allocator.free(young)
    allocator.malloc(60 * MIB)  # ages 2 and 1 searches, average 1.5
    assert allocator.reserved_bytes == reserved * MIB


def test_garbage_collection_takes_a_lone_block() -> None:
    """garbage_collect_cached_blocks: its age is the average, and ages from the average on go."""
    settings = "garbage_collection_threshold:0.5,per_process_memory_fraction:0.5"
    allocator = CachingAllocator(AllocatorConfig.parse(settings), total_bytes=200 * MIB)
    freed(allocator, 60 * MIB)
    allocator.malloc(12 * MIB, stream=1)
    assert allocator.reserved_bytes == 12 * MIB


def test_the_memory_fraction_is_a_limit() -> None:
    """alloc_block: total_allocated_memory + size > allowed_memory_maximum."""
    config = AllocatorConfig.parse("per_process_memory_fraction:0.5")
    allocator = CachingAllocator(config, device_bytes=90 * MIB, total_bytes=100 * MIB)
    allocator.malloc(50 * MIB)
    with pytest.raises(OutOfDeviceMemory) as caught:
        allocator.malloc(1)
    assert caught.value.device_bytes == 50 * MIB
    with pytest.raises(SetupError, match="per_process_memory_fraction"):
        CachingAllocator(config, device_bytes=90 * MIB)


@pytest.mark.parametrize(
    "divisions, asked, block",
    [
        (4, 1200 * KIB, 1280 * KIB),  # the comment above roundup_power2_next_division, in KiB
        (4, 1024 * KIB + 1, 1280 * KIB),
        (4, 2048 * KIB, 2048 * KIB),  # a power of two stays
        (4, 1200, 1536),  # round_size: only above kMinBlockSize * divisions
        (1, 1200 * KIB + 1, 1200 * KIB + 512),  # 1 and 0 mean none
        (8, 17 * GIB, 18 * GIB),
    ],
)
def test_rounding_to_divisions_of_powers_of_two(divisions: int, asked: int, block: int) -> None:
    allocator = CachingAllocator(AllocatorConfig.parse(f"roundup_power2_divisions:{divisions}"))
    assert allocator.block_bytes(allocator.malloc(asked)) == block


def test_divisions_go_by_the_power_of_two_below() -> None:
    """roundup_power2_divisions: the first interval is 1 to 2 MiB, and everything below it."""
    allocator = CachingAllocator(AllocatorConfig.parse("roundup_power2_divisions:[1:2,>:0]"))
    sizes = (600 * KIB, 1200 * KIB, 2400 * KIB)
    assert [allocator.block_bytes(allocator.malloc(size)) for size in sizes] == [
        768 * KIB, 1536 * KIB, 2400 * KIB,
    ]  # fmt: skip


def test_larger_large_segments() -> None:
    """get_allocation_size: AcceleratorAllocatorConfig::large_segment_size()."""
    allocator = CachingAllocator(AllocatorConfig.parse("large_segment_size_mb:64"))
    allocator.malloc(3 * MIB)
    assert allocator.reserved_bytes == 64 * MIB
