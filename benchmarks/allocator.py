"""Events per second that the allocator's model handles: `python -m benchmarks.allocator`."""

from __future__ import annotations

import argparse
import random
import time

from planner.allocator import AllocatorConfig, CachingAllocator
from planner.units import KIB, MIB, gib

# Sizes of a transformer's step: norms and masks, projections, attention and logits.
SIZES = (512, 24 * KIB, 768 * KIB, 3 * MIB, 6 * MIB, 12 * MIB + 512, 48 * MIB, 250 * MIB)


def events(count: int, live: int, seed: int = 0) -> list[int]:
    """A size for a malloc, -1 - i to free the i-th oldest live block; at most `live` blocks at a time."""
    random_source = random.Random(seed)
    steps: list[int] = []
    alive = 0
    while len(steps) < count:
        if alive and (alive == live or random_source.random() < 0.45):
            steps.append(-1 - random_source.randrange(alive))
            alive -= 1
        else:
            steps.append(random_source.choice(SIZES))
            alive += 1
    return steps


def seconds(steps: list[int], allocator: CachingAllocator) -> float:
    """The time to replay `steps`."""
    handles: list[int] = []
    start = time.perf_counter()
    for step in steps:
        if step < 0:
            allocator.free(handles.pop(-1 - step))
        else:
            handles.append(allocator.malloc(step))
    return time.perf_counter() - start


def main() -> None:
    """Reads the arguments, replays, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=1_000_000, help="mallocs and frees to replay")
    parser.add_argument("--live", type=int, default=2_000, help="most blocks alive at a time")
    parser.add_argument("--settings", default="", help="as in PYTORCH_CUDA_ALLOC_CONF")
    arguments = parser.parse_args()
    allocator = CachingAllocator(AllocatorConfig.parse(arguments.settings))
    duration = seconds(events(arguments.events, arguments.live), allocator)
    print(
        f"{arguments.events:,} events in {duration:.2f} s: {arguments.events / duration:,.0f} events/s, "
        f"peak allocated {gib(allocator.peak_allocated_bytes)}, reserved {gib(allocator.peak_reserved_bytes)}"
    )


if __name__ == "__main__":
    main()
