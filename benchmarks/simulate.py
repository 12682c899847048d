"""Time and main memory that a simulation takes: `python -m benchmarks.simulate`.

Each model runs in a process of its own; the time starts after the imports.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from pathlib import Path

from planner.units import KIB, gib

MODELS = ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-405B")


def measured(model: str, steps: int) -> tuple[float, int, int, int]:
    """Seconds, most main memory in bytes, events of the allocator, and the simulated peak in bytes."""
    from planner.catalog import model as model_named
    from planner.simulate.run import Simulation, simulate
    from planner.spec import LoRA, Setup, Training

    setup = Setup(
        model=model_named(model),
        method=LoRA(lora_rank=16, target_modules=("all-linear",)),
        training=Training(micro_batch_size=1, seq_len=2048, precision="bf16", activation_checkpointing=False),
        gpu="h200",
    )
    seen: list[Simulation] = []
    start = time.perf_counter()
    report = simulate(setup, steps=steps, watch=seen.append)
    seconds = time.perf_counter() - start
    return seconds, _most_bytes(), len(seen[0].ledger.events), report.peak_allocated_bytes


def _most_bytes() -> int:
    """The most main memory of this process (proc(5), VmHWM); ru_maxrss may be that of its parent."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line]
    return int(line.split()[1]) * KIB


def main() -> None:
    """Reads the arguments, simulates, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=MODELS, help="ids of the catalogue")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps to simulate")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    for model in arguments.models:
        with context.Pool(1) as pool:
            seconds, most_bytes, events, peak = pool.apply(measured, (model, arguments.steps))
        print(
            f"{model}: {arguments.steps} steps in {seconds:.1f} s, {gib(most_bytes)} of main memory, "
            f"{events:,} events ({events / seconds:,.0f}/s), simulated peak {gib(peak)}"
        )


if __name__ == "__main__":
    main()
