"""How well a sweep uses two processors: `python -m benchmarks.sweep`, about 12 minutes on a quiet machine.

The setups of benchmarks/sweep.toml in blocks of the same mix; each block by one warm worker and by two, each
first in turn, so that what else the machine does meets both. Efficiency is the rate of two workers over
twice the rate of one; at least 80 % is wanted. Then a whole sweep of the same setups as the command runs it,
start and journal included.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

from planner.sweep.jobs import Job, sweep_from
from planner.sweep.process import Answering
from planner.sweep.run import run_sweep

WANTED = 0.8  # of twice one processor's rate
BLOCK = 25  # setups


def seconds(jobs: Sequence[Job], workers: Sequence[Answering]) -> float:
    """Wall time of the jobs on warm workers. Raises RuntimeError for a simulation that fails."""
    free: queue.SimpleQueue[Answering] = queue.SimpleQueue()
    for worker in workers:
        free.put(worker)

    def answered(job: Job) -> None:
        worker = free.get()
        (row,) = worker.rows([job])
        free.put(worker)
        if row["state"] != "done":
            raise RuntimeError(row["error"])

    start = time.perf_counter()
    with ThreadPoolExecutor(len(workers)) as pool:
        list(pool.map(answered, jobs))
    return time.perf_counter() - start


def figures(jobs: Sequence[Job]) -> dict[str, float]:
    """Rates of one and two workers over the same blocks, and the efficiency of all and of the median."""
    blocks = [jobs[at :: -(-len(jobs) // BLOCK)] for at in range(-(-len(jobs) // BLOCK))]
    with ExitStack() as stack:
        first, second = (
            stack.enter_context(closing(Answering("simulate", time_limit_s=600.0))) for _ in range(2)
        )
        for worker in (first, second):
            seconds(jobs[:1], [worker])  # its imports
        teams = {1: [first], 2: [first, second]}
        spent: dict[int, list[float]] = {1: [], 2: []}
        for number, block in enumerate(blocks):
            for size in (1, 2) if number % 2 else (2, 1):
                spent[size].append(seconds(block, teams[size]))
    shares = [one / two / 2 for one, two in zip(spent[1], spent[2], strict=True)]
    return {
        "one_worker_per_s": len(jobs) / sum(spent[1]),
        "two_workers_per_s": len(jobs) / sum(spent[2]),
        "efficiency": sum(spent[1]) / sum(spent[2]) / 2,
        "efficiency_median_of_blocks": statistics.median(shares),
    }


def main() -> None:
    """Reads the arguments, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--setups", type=int, default=1000, help="how many of the file's 1,000")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args()
    sweep = sweep_from(Path(__file__).with_name("sweep.toml"))
    step = max(1, len(sweep.jobs) // given.setups)
    jobs = sweep.jobs[::step][: given.setups]
    load = os.getloadavg()[0]
    found = {"setups": float(len(jobs)), "load_before": load, **figures(jobs)}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        swept = run_sweep(replace(sweep, jobs=jobs), Path(folder) / "out", workers=2)
        found["whole_sweep_s"] = time.perf_counter() - start
    found["rows"] = float(len(swept.rows))
    if given.json:
        print(json.dumps({name: round(value, 3) for name, value in found.items()}))
        return
    print(f"{len(jobs):,} simulations, load of the machine before: {load:.1f} on {os.cpu_count()} processors")
    print(f"one worker:  {found['one_worker_per_s']:.2f} a second")
    print(f"two workers: {found['two_workers_per_s']:.2f} a second")
    for name, words in (("efficiency", "all blocks"), ("efficiency_median_of_blocks", "median block")):
        share = found[name]
        word = "reached" if share >= WANTED else "missed"
        print(f"of twice one worker's rate, {words}: {share:.1%} ({WANTED:.0%} {word})")
    print(f"whole sweep with its start: {found['whole_sweep_s']:.0f} s, {swept.done:,} rows")


if __name__ == "__main__":
    main()
