"""The load of a quantized model, formula against simulation: equal to the byte, model after model."""

from __future__ import annotations

import importlib.util
from typing import Any, get_args

import pytest
import torch

from planner.catalog import model, models
from planner.estimate import estimate
from planner.estimate.quantized_load import quantized_load
from planner.estimate.rounding import block_bytes
from planner.methods import Quantization
from planner.simulate.simulation import Simulation
from planner.spec import QLoRA, Setup, Training
from planner.training.run import TrainingRun

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes"
)
SMALL = 9e9  # whole models: what blocks keep unsplit depends on every size and on how many there are
FAMILIES: dict[str, str] = {}
for name in models():
    found = model(name)
    if found.architecture and found.architecture.family != "falcon" and 1e8 < found.parameters < SMALL:
        FAMILIES.setdefault(found.architecture.family, name)
NAMES = [*FAMILIES.values(), "Qwen/Qwen2.5-1.5B", "microsoft/phi-2", "google/gemma-2-2b", "google/gemma-7b"]


def prepared(setup: Setup) -> tuple[Simulation, TrainingRun]:
    """Simulated up to the first step."""
    simulation = Simulation(gpu=setup.gpu)
    run = TrainingRun(setup, torch.device("meta"), simulation.phase)
    with simulation.outcome():
        run.prepare()
    return simulation, run


@needs_bitsandbytes
@pytest.mark.parametrize("quantization", get_args(Quantization))
@pytest.mark.parametrize("name", sorted({*NAMES}))
def test_equal_to_the_byte(name: str, quantization: Any) -> None:
    precision = "fp16" if model(name).architecture.family == "t5" else "bf16-mixed"  # type: ignore[union-attr]
    method = QLoRA(quantization=quantization, lora_rank=160)  # matrices of more than 1 MiB among the adapters
    setup = Setup(model=name, method=method, training=Training(precision=precision))
    simulation, run = prepared(setup)
    # positions and rotary frequencies, which no formula counts
    buffers = sum(block_bytes(b.numel() * b.element_size()) for b in run.net.buffers())
    for formula, real in zip(estimate(setup).phases, simulation.phases, strict=False):
        assert formula.name == real.name
        assert formula.allocated_bytes == real.allocated_bytes - buffers
        assert formula.peak_allocated_bytes == real.peak_allocated_bytes - buffers


@needs_bitsandbytes
@pytest.mark.parametrize("quantization", get_args(Quantization))
def test_the_rests_are_what_is_free_for_large_requests(quantization: Any) -> None:
    setup = Setup(model="Qwen/Qwen2.5-0.5B", method=QLoRA(quantization=quantization, lora_rank=1))
    simulation, _ = prepared(setup)
    free = [
        block.size_bytes
        for segment in simulation.allocator.segments()
        for block in segment.blocks
        if segment.pool == "large" and not block.allocated
    ]
    assert free
    assert quantized_load(setup.model, setup.method, "bf16").rests_bytes == tuple(sorted(free))  # type: ignore[arg-type]
