"""Setups at the edge of a device: the largest micro batch that fits by simulation, and the next one.

    python -m benchmarks.edges --gpu h200 > edges.toml
    planner measure --matrix edges.toml --out DIR --try-all

The first of each pair has to run, the second to end out of memory. `--context-mib` is what the CUDA context
takes of the device (`context_bytes` in any record of it).
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from planner import Setup, simulate
from planner.catalog.gpus import gpu as gpu_named
from planner.units import MIB

BASES: tuple[dict[str, Any], ...] = (
    {"model": "openai-community/gpt2", "method": "full", "precision": "fp32", "seq_len": 1024},
    {"model": "Qwen/Qwen2.5-0.5B", "method": "lora", "seq_len": 2048},
    {"model": "Qwen/Qwen3-0.6B", "method": "full", "precision": "bf16-mixed", "seq_len": 2048},
    {"model": "meta-llama/Llama-3.2-1B", "method": "lora", "target_modules": "all-linear", "seq_len": 2048},
    {"model": "meta-llama/Llama-3.2-3B", "method": "full", "seq_len": 1024},
    {"model": "google/gemma-3-1b-pt", "method": "lora", "activation_checkpointing": True, "seq_len": 4096},
    {"model": "meta-llama/Llama-3.1-8B", "method": "lora", "seq_len": 4096, "activation_checkpointing": True},
    {"model": "google-bert/bert-large-uncased", "method": "full", "seq_len": 512},
)


def main() -> int:
    """Print a matrix of pairs; bases that do not fit at all, or that always do, are named on stderr."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", required=True, help="name or short name of the device")
    parser.add_argument("--context-mib", type=int, default=600, help="the CUDA context (default 600)")
    args = parser.parse_args()
    gpu = gpu_named(args.gpu)
    limit_bytes = gpu.total_bytes - args.context_mib * MIB
    print('set = "edges"\n')
    for base in BASES:
        setup = Setup.from_dict(base)
        largest = largest_micro_batch(setup, gpu, limit_bytes)
        if largest is None:
            print(f"{setup.model.id} does not fit {gpu.name} at all", file=sys.stderr)
            continue
        print("[[group]]")
        for key, value in base.items():
            print(f"{key} = {json.dumps(value)}")
        print(f"micro_batch_size = [{largest}, {largest + 1}]\n", flush=True)
    return 0


def largest_micro_batch(setup: Setup, gpu: Any, limit_bytes: int) -> int | None:
    """The largest micro batch whose simulation stays within the limit; None where not even 1 does."""

    def fits(micro_batch_size: int) -> bool:
        tried = setup.replace(micro_batch_size=micro_batch_size)
        return simulate(tried, gpu=gpu, limit_bytes=limit_bytes).out_of_memory is None

    if not fits(1):
        return None
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


if __name__ == "__main__":
    sys.exit(main())
