"""Requests as PyTorch's CUDA allocator counts them."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

from planner.units import MIB

__all__ = ["MIN_BLOCK_BYTES", "block_bytes", "packed_bytes"]

# c10/core/AllocatorConfig.h and c10/cuda/CUDACachingAllocator.cpp
MIN_BLOCK_BYTES = 512  # kMinBlockSize: every request is rounded up to it
_LARGE_BYTES = 10 * MIB  # kMinLargeAlloc: from here on a request gets a segment of its own ...
_SEGMENT_BYTES = 2 * MIB  # kRoundLarge: ... rounded up to this
_SHARED_SEGMENT_BYTES = 20 * MIB  # kLargeBuffer: smaller ones share such a segment
_UNSPLIT_BYTES = MIB  # kSmallSize: a rest up to this is not split off and counts as allocated


def block_bytes(size_bytes: int) -> int:
    """A request as the allocator counts it: rounded up to 512 bytes, a small rest of its segment included.

    Exact for a tensor in a new segment; one that takes over an old block may count up to 1 MiB more.
    """
    size = -(-size_bytes // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES
    if size >= _LARGE_BYTES and (rest := -size % _SEGMENT_BYTES) <= _UNSPLIT_BYTES:
        return size + rest
    return size


def packed_bytes(sizes: Iterable[int], rests_bytes: Iterable[int] = ()) -> int:
    """What tensors allocated one after the other count for, the unsplit rests of their segments included.

    Requests of 1 to 10 MiB share segments of 20 MiB; each goes to the smallest free rest that holds it
    (best fit), and a rest of up to 1 MiB stays with it. `rests_bytes` are free before the first, ascending.
    """
    total = 0
    rests = list(rests_bytes)
    for size_bytes in sizes:
        size = -(-size_bytes // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES
        if size > _UNSPLIT_BYTES:
            at = bisect_left(rests, size)
            if at < len(rests):
                rest = rests.pop(at) - size
            elif size >= _LARGE_BYTES:
                rest = -size % _SEGMENT_BYTES
            else:
                rest = _SHARED_SEGMENT_BYTES - size
            if rest > _UNSPLIT_BYTES:
                insort(rests, rest)
            else:
                size += rest
        total += size
    return total
