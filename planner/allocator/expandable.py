"""Expandable segments: reserved addresses that get physical memory page by page.

A page is 2 MiB in the small pool and one large segment (20 MiB) in the large pool; a segment reserves
addresses for 9/8 of the device. Source: c10/cuda/CUDACachingAllocator.cpp, ExpandableSegment,
find_expandable_block, try_allocate_expandable_block, map_block, unmap_block, release_blocks.
"""

from __future__ import annotations

from bisect import insort

from planner.allocator.blocks import AddressSpace, Block, ExpandableRange, Pool

__all__ = ["expand", "unmap_free"]


def expand(
    pool: Pool, size: int, page: int, room: int | None, reach: int, addresses: AddressSpace
) -> tuple[Block | None, int]:
    """A free block of at least `size` bytes, taken out of the pool, and the bytes mapped for it.

    Maps at most `room` bytes (None: any number). Without enough room the block is None, and what was mapped
    before the failure stays mapped and free. `reach` is the address range of a new segment, all in bytes.
    """
    block = _candidate(pool, size, page, reach, addresses)
    mapped = 0
    if not block.mapped:
        mapped = _map(pool, block, min(block.size, size), room)
        if not mapped:
            return None, 0
    while block.size < size:
        block_after = block.next
        assert block_after is not None  # _candidate saw enough addresses
        left = None if room is None else room - mapped
        more = _map(pool, block_after, min(size - block.size, block_after.size), left)
        if not more:
            return None, mapped
        mapped += more
        block = block_after
    pool.take(block)
    return block, mapped


def unmap_free(pool: Pool) -> int:
    """Gives back every whole page inside a free block; the bytes given back.

    The addresses of a segment stay reserved, which costs no memory (torch drops those of an empty segment).
    """
    return sum(_unmap(pool, block) for block in list(pool.at.values()))


def _candidate(pool: Pool, size: int, page: int, reach: int, addresses: AddressSpace) -> Block:
    """The lowest addresses with room for `size`: unmapped, or free and followed by unmapped."""
    for block in pool.unmapped:
        before = block.previous
        first = before if before is not None and not before.allocated else block
        if _reaches(first, size):
            return first
    pages = -(-max(reach, size) // page)
    start = addresses.reserve(pages * page)
    block = Block(start, pages * page, pool, range=ExpandableRange(start, page))
    block.mapped = False
    _put_unmapped(pool, block)
    return block


def _reaches(block: Block | None, size: int) -> bool:
    found = 0
    while found < size and block is not None and not block.allocated:
        found += block.size
        block = block.next
    return found >= size


def _map(pool: Pool, block: Block, size: int, room: int | None) -> int:
    """Backs the first `size` bytes of an unmapped block, in whole pages; the bytes mapped, 0 if refused."""
    assert block.range is not None
    page = block.range.page_bytes
    mapped = -(-size // page) * page
    if room is not None and mapped > room:
        return 0
    pool.unmapped.remove(block)
    block.mapped = True
    if mapped < block.size:
        rest = Block(block.address + mapped, block.size - mapped, pool, block, block.next, block.range)
        rest.mapped = False
        if block.next is not None:
            block.next.previous = rest
        block.next = rest
        block.size = mapped
        _put_unmapped(pool, rest)
    _absorb(pool, block, block.previous)
    _absorb(pool, block, block.next)
    pool.put(block)
    return mapped


def _unmap(pool: Pool, block: Block) -> int:
    assert block.range is not None
    start, page = block.range.start, block.range.page_bytes
    first = start + -(-(block.address - start) // page) * page
    last = start + (block.address + block.size - start) // page * page
    if first >= last:
        return 0
    pool.take(block)
    if first > block.address:
        before = Block(block.address, first - block.address, pool, block.previous, block, block.range)
        if block.previous is not None:
            block.previous.next = before
        block.previous = before
        pool.put(before)
    end = block.address + block.size
    if end > last:
        after = Block(last, end - last, pool, block, block.next, block.range)
        if block.next is not None:
            block.next.previous = after
        block.next = after
        pool.put(after)
    block.address, block.size, block.mapped = first, last - first, False
    _absorb(pool, block, block.previous)
    _absorb(pool, block, block.next)
    _put_unmapped(pool, block)
    return last - first


def _absorb(pool: Pool, block: Block, other: Block | None) -> None:
    """Merges a neighbour in the same state into `block`, which is itself in no list (try_merge_blocks)."""
    if other is None or other.allocated or other.mapped != block.mapped:
        return
    if other.mapped:
        pool.take(other)
    else:
        pool.unmapped.remove(other)
    if block.previous is other:
        block.address = other.address
        block.previous = other.previous
        if other.previous is not None:
            other.previous.next = block
    else:
        block.next = other.next
        if other.next is not None:
            other.next.previous = block
    block.size += other.size


def _put_unmapped(pool: Pool, block: Block) -> None:
    insort(pool.unmapped, block, key=lambda each: each.address)
