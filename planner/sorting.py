"""What CUDA's sort of numbers takes beside them."""

from __future__ import annotations

__all__ = ["index_put_bytes", "radix_sort_bytes"]


def index_put_bytes(count: int) -> list[int]:
    """Indexing.cu, index_put_with_sort_kernel: adding at n places sorts the places first.

    The places as one number each, sorted, in their original order and counted up (int64), and the sort's own
    block.
    """
    return [*[count * 8] * 4, radix_sort_bytes(count, 8)]


def radix_sort_bytes(count: int, key_bytes: int) -> int:
    """cub's DeviceRadixSort of `count` keys with 8-byte values (dispatch_radix_sort.cuh, onesweep).

    A second pair of arrays, 256 counters for each byte of the key, and 256 for each tile of 3,840 (the
    tuning of capability 8.0); one tile alone needs next to nothing.
    """
    if count <= 2304:
        return 1
    tiles = -(-count // 3840)
    return count * (key_bytes + 8) + 256 * 4 * (key_bytes + tiles) + 4 * key_bytes
