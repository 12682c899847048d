"""A model of PyTorch's CUDA caching allocator: what is allocated and what is reserved, block by block.

Source: c10/cuda/CUDACachingAllocator.cpp, DeviceCachingAllocator, torch 2.1 to 2.13, whose names the comments
use. Left out: CUDA graph pools and user MemPools, `record_stream` (a freed block is free at once), and how
the driver itself places and rounds what cudaMalloc returns.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from planner.allocator.blocks import (
    ADDRESS_BITS,
    AddressSpace,
    Block,
    Pool,
    Segment,
    SegmentBlock,
    segments_of,
)
from planner.allocator.config import MIN_LARGE_BYTES, POWER2_INTERVALS, AllocatorConfig
from planner.allocator.expandable import expand, unmap_free
from planner.errors import PlannerError, SetupError
from planner.units import MIB, gib

__all__ = ["CachingAllocator", "OutOfDeviceMemory", "Segment", "SegmentBlock"]

MIN_BLOCK_BYTES = 512  # kMinBlockSize
SMALL_BYTES = 1 * MIB  # kSmallSize: the largest request of the small pool
SMALL_SEGMENT_BYTES = 2 * MIB  # kSmallBuffer
ROUND_LARGE_BYTES = 2 * MIB  # kRoundLarge
UNLIMITED_REACH_BYTES = 1 << 40  # addresses of an expandable segment where no device size is known: 1 TiB


class OutOfDeviceMemory(PlannerError):
    """A request that does not fit even after all cached memory was given back; sizes in bytes.

    `device_bytes` is what torch may reserve at most: the device without context and others, or the
    share that `per_process_memory_fraction` allows, whichever is smaller.
    """

    def __init__(
        self, requested_bytes: int, allocated_bytes: int, reserved_bytes: int, device_bytes: int
    ) -> None:
        super().__init__(requested_bytes, allocated_bytes, reserved_bytes, device_bytes)
        self.requested_bytes = requested_bytes
        self.allocated_bytes = allocated_bytes
        self.reserved_bytes = reserved_bytes
        self.device_bytes = device_bytes

    def __str__(self) -> str:
        return (
            f"Out of device memory: {gib(self.requested_bytes)} asked for, with {gib(self.allocated_bytes)} "
            f"allocated and {gib(self.reserved_bytes)} reserved of at most {gib(self.device_bytes)}; "
            "lower micro_batch_size or seq_len, or take a larger GPU."
        )


class CachingAllocator:
    """One device's caching allocator. Sizes are bytes; the counters are plain attributes, cheap to read.

    `device_bytes` is the most torch can reserve (total - context - others), None for no limit; `total_bytes`
    is the card's total, of which `per_process_memory_fraction` is a share. `allocated_bytes` counts whole
    blocks, remainders that are not split off included, as `torch.cuda.memory_allocated()` does; `retries` is
    `num_alloc_retries`. Raises SetupError for a fraction without `total_bytes`.
    """

    def __init__(
        self,
        config: AllocatorConfig = AllocatorConfig(),  # noqa: B008 - frozen
        *,
        device_bytes: int | None = None,
        total_bytes: int | None = None,
    ) -> None:
        self.config = config
        self.device_bytes = device_bytes
        self.allocated_bytes = 0
        self.reserved_bytes = 0
        self.peak_allocated_bytes = 0
        self.peak_reserved_bytes = 0
        self.retries = 0
        self._allowed = _allowed_bytes(config, total_bytes)
        self._collects = config.garbage_collection_threshold is not None and self._allowed is not None
        self._divisions = config.roundup_power2_divisions
        self._expandable = config.expandable_segments
        self._max_split = config.max_split_size_bytes or 1 << ADDRESS_BITS
        self._slack = config.max_non_split_rounding_bytes or config.large_segment_bytes
        size = total_bytes or device_bytes or UNLIMITED_REACH_BYTES
        self._reach = size + size // 8  # ExpandableSegment: 1 1/8 of the device
        self._addresses = AddressSpace(descending=config.newer_segments_lower)
        self._small: dict[int, Pool] = {}
        self._large: dict[int, Pool] = {}
        self._live: dict[int, Block] = {}
        self._last_handle = 0
        self._searches = 0

    def malloc(self, size_bytes: int, stream: int = 0) -> int:
        """The handle of a new block; 0 for 0 bytes, for which torch allocates nothing.

        Raises OutOfDeviceMemory; the allocator stays usable, with its cache emptied.
        """
        if not size_bytes:
            return 0
        if self._divisions is None:
            size = (size_bytes + 511) & -512  # round_size: up to multiples of kMinBlockSize
        else:
            size = rounded_bytes(size_bytes, self._divisions)
        is_small = size <= SMALL_BYTES
        pools = self._small if is_small else self._large
        pool = pools.get(stream)
        if pool is None:
            pool = pools[stream] = Pool(stream, is_small)

        block = self._best_fit(pool, size) or self._new_block(pool, size, size_bytes)
        remaining = block.size - size
        if is_small or self._expandable:  # should_split
            split = remaining >= MIN_BLOCK_BYTES
        else:
            split = remaining > SMALL_BYTES and size < self._max_split
        if split:
            block = self._front(block, size)
        block.allocated = True
        block.requested = size_bytes
        self.allocated_bytes = allocated = self.allocated_bytes + block.size
        if allocated > self.peak_allocated_bytes:
            self.peak_allocated_bytes = allocated
        self._last_handle = handle = self._last_handle + 1
        self._live[handle] = block
        return handle

    def free(self, block: int) -> None:
        """Gives a block back to its pool, merged with free neighbours; handle 0 is ignored.

        Raises KeyError for a handle that is not alive.
        """
        if not block:
            return
        freed = self._live.pop(block)
        self.allocated_bytes -= freed.size
        freed.allocated = False
        pool = freed.pool
        keys, at = pool.keys, pool.at
        size, address = freed.size, freed.address
        other = freed.previous
        if other is not None and not other.allocated and other.mapped:  # try_merge_blocks
            key = other.size << ADDRESS_BITS | other.address
            del keys[bisect_left(keys, key)], at[key]
            size += other.size
            address = other.address
            freed.previous = other = other.previous
            if other is not None:
                other.next = freed
        other = freed.next
        if other is not None and not other.allocated and other.mapped:
            key = other.size << ADDRESS_BITS | other.address
            del keys[bisect_left(keys, key)], at[key]
            size += other.size
            freed.next = other = other.next
            if other is not None:
                other.previous = freed
        freed.size, freed.address, freed.born = size, address, self._searches
        key = size << ADDRESS_BITS | address
        insort(keys, key)
        at[key] = freed

    def block_bytes(self, block: int) -> int:
        """The size of a live block, which may exceed what was asked for; 0 for handle 0."""
        return self._live[block].size if block else 0

    def address(self, block: int) -> int:
        """The address of a live block; 0 for handle 0."""
        return self._live[block].address if block else 0

    def empty_cache(self) -> None:
        """Gives back every segment (every page, if expandable) that holds no live block."""
        for pools in (self._large, self._small):  # release_cached_blocks
            for pool in pools.values():
                if self._expandable:
                    self.reserved_bytes -= unmap_free(pool)
                    continue
                for block in list(pool.at.values()):
                    if block.previous is None and block.next is None:
                        self._release(block)

    def reset_peak(self) -> None:
        """Both peaks become the present values (`torch.cuda.reset_peak_memory_stats`)."""
        self.peak_allocated_bytes = self.allocated_bytes
        self.peak_reserved_bytes = self.reserved_bytes

    def segments(self) -> list[Segment]:
        """A snapshot of all reserved memory, by address; slow."""
        pools = [*self._small.values(), *self._large.values()]
        return segments_of([*self._live.values(), *(block for pool in pools for block in pool.at.values())])

    def _best_fit(self, pool: Pool, size: int) -> Block | None:
        """get_free_block: the smallest free block that holds `size`, of those the lowest, out of its pool."""
        if self._collects and not pool.is_small:
            self._searches += 1
        keys = pool.keys
        index = bisect_left(keys, size << ADDRESS_BITS)
        if index == len(keys):
            return None
        if self._expandable:  # a block counts with the room into which it can grow
            while index + 1 < len(keys) and _grown(pool, index + 1) < _grown(pool, index):
                index += 1
        key = keys[index]
        found = key >> ADDRESS_BITS
        if found >= self._max_split and (size < self._max_split or found >= size + self._slack):
            return None
        del keys[index]
        return pool.at.pop(key)

    def _front(self, block: Block, size: int) -> Block:
        """The first `size` bytes of a free block as a block of their own; the rest goes to the pool."""
        front = Block(block.address, size, block.pool, block.previous, block, block.range)
        if block.previous is not None:
            block.previous.next = front
        block.previous = front
        block.address += size
        block.size -= size
        block.pool.put(block)
        return front

    def _new_block(self, pool: Pool, size: int, size_bytes: int) -> Block:
        """Memory from the device: at once, after oversize blocks were released, or after everything was."""
        if self._collects:
            self._collect()
        block = self._grown_block(pool, size)
        if block is None and self._release_oversize(pool, size):
            block = self._grown_block(pool, size)
        if block is None:
            self.empty_cache()
            self.retries += 1
            block = self._grown_block(pool, size)
        if block is None:
            limits = [limit for limit in (self.device_bytes, self._allowed) if limit is not None]
            raise OutOfDeviceMemory(size_bytes, self.allocated_bytes, self.reserved_bytes, min(limits))
        return block

    def _grown_block(self, pool: Pool, size: int) -> Block | None:
        """alloc_block: a new segment, or more pages of an expandable one; None where the device is full."""
        segment = segment_bytes(size, self.config.large_segment_bytes)
        if self._allowed is not None and self.reserved_bytes + segment > self._allowed:
            return None
        room = None if self.device_bytes is None else self.device_bytes - self.reserved_bytes
        block: Block | None
        if self._expandable:
            page = SMALL_SEGMENT_BYTES if pool.is_small else self.config.large_segment_bytes
            block, mapped = expand(pool, size, page, room, self._reach, self._addresses)
        elif room is not None and segment > room:
            return None
        else:
            block, mapped = Block(self._addresses.reserve(segment), segment, pool), segment
        self.reserved_bytes += mapped
        if self.reserved_bytes > self.peak_reserved_bytes:
            self.peak_reserved_bytes = self.reserved_bytes
        return block

    def _release(self, block: Block) -> None:
        block.pool.take(block)
        self.reserved_bytes -= block.size

    def _release_oversize(self, pool: Pool, size: int) -> bool:
        """release_available_cached_blocks: with max_split_size, just enough of the blocks above it."""
        if self.config.max_split_size_bytes is None or self._expandable:
            return False
        target = max(size, self._max_split)
        index = bisect_left(pool.keys, target << ADDRESS_BITS)
        if index < len(pool.keys):
            self._release(pool.at[pool.keys[index]])
            return True
        released = 0
        while released < target and pool.keys and pool.keys[-1] >> ADDRESS_BITS >= self._max_split:
            block = pool.at[pool.keys[-1]]
            released += block.size
            self._release(block)
        return released >= target

    def _collect(self) -> None:
        """garbage_collect_cached_blocks: whole large segments, those unused for longest first."""
        threshold = (self.config.garbage_collection_threshold or 0) * (self._allowed or 0)
        surplus = self.reserved_bytes - int(threshold)
        free = [block for pool in self._large.values() for block in pool.at.values()]
        whole = [block for block in free if block.previous is None and block.next is None]
        while surplus > 0 and whole and not self._expandable:
            age = sum(self._searches - block.born for block in whole) / len(whole)
            old = [block for block in whole if self._searches - block.born >= age]
            whole = [block for block in whole if self._searches - block.born < age]
            for block in old:
                surplus -= block.size
                self._release(block)


def rounded_bytes(size_bytes: int, divisions: tuple[int, ...]) -> int:
    """round_size with roundup_power2_divisions: up to the next of `divisions` steps between powers of two."""
    power = size_bytes.bit_length() - 1
    steps = divisions[min(max(power - 20, 0), POWER2_INTERVALS - 1)]
    if steps <= 1 or size_bytes <= MIN_BLOCK_BYTES * steps:
        return (size_bytes + 511) & -512
    step = (1 << power) // steps
    return -(-size_bytes // step) * step


def segment_bytes(size: int, large_segment: int) -> int:
    """get_allocation_size: what is asked of the device for a block of `size` bytes."""
    if size <= SMALL_BYTES:
        return SMALL_SEGMENT_BYTES
    if size < MIN_LARGE_BYTES:
        return large_segment
    return -(-size // ROUND_LARGE_BYTES) * ROUND_LARGE_BYTES


def _grown(pool: Pool, index: int) -> int:
    block = pool.at[pool.keys[index]]
    after = block.next
    return block.size + (after.size if after is not None and not after.mapped else 0)


def _allowed_bytes(config: AllocatorConfig, total_bytes: int | None) -> int | None:
    if config.per_process_memory_fraction == 1:
        return None  # setMemoryFraction: no limit of its own
    if total_bytes is None:
        raise SetupError(
            f"per_process_memory_fraction:{config.per_process_memory_fraction} is a share of the card's "
            "memory, which is not known here; name a GPU or leave the setting out."
        )
    return int(config.per_process_memory_fraction * total_bytes)
