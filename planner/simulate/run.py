"""Simulate a setup: the training step on `meta` tensors, through the allocator, as a report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from planner.catalog.gpus import Gpu, gpu as gpu_named
from planner.report import MemoryReport, Parameters
from planner.simulate.allocator import AllocatorConfig
from planner.simulate.simulation import Progress, Simulation
from planner.spec import Setup
from planner.training.attach import attached
from planner.training.build import skeleton
from planner.training.recipe import weight_dtype
from planner.training.run import Loop, TrainingRun
from planner.version import __version__

__all__ = ["Simulation", "provenance", "simulate"]


def simulate(
    setup: Setup,
    *,
    gpu: Gpu | str | None = None,
    steps: int = 2,
    loop: Loop | None = None,
    allocator: AllocatorConfig | None = None,
    limit_bytes: int | None = None,
    progress: Progress | None = None,
    watch: Callable[[Simulation], None] | None = None,
) -> MemoryReport:
    """Peak allocated and reserved memory of `steps` optimizer steps, simulated on any machine.

    `gpu` (default: the setup's) decides workspaces and attention kernels; `limit_bytes` is what torch may
    reserve, beyond which the report carries `out_of_memory`. `progress(phase, step)` is called at each
    phase, `watch(simulation)` once before it starts. Deterministic to the byte. Left out: the CUDA
    context, NCCL, data loading, `torch.compile`.
    Raises TraceError where a model cannot be traced, ModelError where it cannot be built.
    """
    device = gpu_named(gpu) if isinstance(gpu, str) else gpu or setup.gpu
    simulation = Simulation(gpu=device, allocator=allocator, limit_bytes=limit_bytes, progress=progress)
    if watch:
        watch(simulation)
    run = TrainingRun(setup, torch.device("meta"), simulation.phase, loop=loop)
    with simulation.outcome():
        run.prepare()
        simulation.follow(run.net, run.trained)
        for step in range(1, steps + 1):
            run.step(step)
            simulation.know_states(run.optimizer)
    return simulation.report(setup.to_dict(), _parameters(run), provenance())


def _parameters(run: TrainingRun) -> Parameters:
    """Counted on the net that ran; on a second one where the device was full before it was ready."""
    net, setup = run.net, run.setup
    if not hasattr(run, "trained"):
        dtype = weight_dtype(setup.training.precision)
        net = attached(skeleton(setup.model, dtype=dtype), setup.model, setup.method, low_memory=True)
    total = sum(p.numel() for p in net.parameters())
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    return Parameters(total=total, trainable=trained, added=total - setup.model.parameters)


def provenance() -> dict[str, Any]:
    """The versions that a simulation depends on."""
    import accelerate
    import peft
    import transformers

    return {
        "planner": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "accelerate": accelerate.__version__,
    }
