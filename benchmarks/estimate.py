"""Time of the estimate: `python -m benchmarks.estimate`.

Warm: `estimate(setup)` in a running process, another micro batch each time, so that no answer is one given
before. Cold: the command line from start to exit.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

from planner.estimate import estimate
from planner.spec import FullFineTuning, LoRA, Method, Setup, Training

MODELS = (
    "meta-llama/Llama-3.2-3B",
    "Qwen/Qwen3-8B",
    "google/gemma-2-9b",
    "openai-community/gpt2-xl",
)
METHODS: tuple[Method, ...] = (FullFineTuning(), LoRA(target_modules=("all-linear",)))


def warm_ms(model: str, method: Method, *, checkpointing: bool, rounds: int = 100) -> float:
    """Median milliseconds of one estimate, in a process that has seen the model before."""
    setups = [
        Setup(
            model=model,
            method=method,
            training=Training(micro_batch_size=batch, seq_len=512, activation_checkpointing=checkpointing),
        )
        for batch in range(1, rounds + 1)
    ]
    estimate(setups[0])
    times = []
    for setup in setups:
        start = time.perf_counter()
        estimate(setup)
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def cold_ms(model: str, rounds: int = 5) -> float:
    """Median milliseconds of `python -m planner estimate`, interpreter included."""
    command = [sys.executable, "-m", "planner", "estimate", "--model", model, "--method", "lora", "--json"]
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def main() -> None:
    """Print a line for each model and method, then the cold command."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    for model in MODELS:
        for method in METHODS:
            plain = warm_ms(model, method, checkpointing=False)
            checkpointed = warm_ms(model, method, checkpointing=True)
            print(f"warm {model:<26} {method.name:<5} {plain:5.2f} ms, checkpointed {checkpointed:5.2f} ms")
    print(f"cold command {cold_ms(MODELS[0]):6.0f} ms")


if __name__ == "__main__":
    main()
