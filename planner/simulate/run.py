"""Simulate a setup: the training step on `meta` tensors, through the allocator, as a report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from planner.allocator import AllocatorConfig
from planner.attention import check_kernel
from planner.batching import asks_masks
from planner.catalog.gpus import Gpu, gpu as gpu_named
from planner.liger import LIGER_VERSION
from planner.optimizers import FROM_BITSANDBYTES
from planner.report import MemoryReport, Parameters, early_peak_note
from planner.simulate.arrivals import band_note, loading_band
from planner.simulate.place import rank_notes, simulated_place
from planner.simulate.simulation import Progress, Simulation
from planner.spec import QLoRA, Setup
from planner.training.attach import attached
from planner.training.build import skeleton
from planner.training.peft_config import initialisation_notes
from planner.training.quantize import parameter_count
from planner.training.recipe import loaded_dtype
from planner.training.run import TrainingRun
from planner.training.runs import run_of
from planner.version import __version__

__all__ = ["Simulation", "provenance", "simulate"]


def simulate(
    setup: Setup,
    *,
    gpu: Gpu | str | None = None,
    steps: int = 2,
    separate_labels: bool = True,
    allocator: AllocatorConfig | None = None,
    limit_bytes: int | None = None,
    progress: Progress | None = None,
    watch: Callable[[Simulation], None] | None = None,
    own_lora: bool = False,
    rank: int | None = None,
) -> MemoryReport:
    """Peak allocated and reserved memory of `steps` optimizer steps, simulated on any machine.

    `gpu` (default: the setup's) decides workspaces and attention kernels; `limit_bytes` is what torch may
    reserve, beyond which the report carries `out_of_memory`. `progress(phase, step)` is called at each
    phase, `watch(simulation)` once before it starts; `own_lora` takes `planner.training.peft`'s LoRA in
    place of the peft library's. Where the setup has several GPUs, the report is of one `rank` (default: 0,
    which has the largest shards). A quantized model's report has a `loading_band`: the run taken again in
    other orders of loading. Deterministic to the byte. Left out: the CUDA context, NCCL, data loading,
    `torch.compile`.
    Raises TraceError where a model cannot be traced, ModelError where it cannot be built.
    """
    device = gpu_named(gpu) if isinstance(gpu, str) else gpu or setup.gpu
    check_kernel(setup.model, setup.method, setup.training, device, guessed=True)
    options: dict[str, Any] = {"gpu": device, "allocator": allocator, "limit_bytes": limit_bytes}
    options["has_masks"] = asks_masks(setup.training)
    simulation, place = simulated_place(setup.sharding, rank, progress=progress, **options)
    if watch:
        watch(simulation)
    banded = _quantizes(setup) and not setup.sharding.is_distributed
    if banded and simulation.ledger.trail is None:
        simulation.ledger.trail = []  # for other orders of arrival
    with place:
        run = run_of(
            setup, torch.device("meta"), simulation.phase, separate_labels=separate_labels, own_lora=own_lora
        )
        run.arrived = partial(simulation.ledger.note, "arrived")
        with simulation.outcome():
            run.prepare()
            simulation.know_adapters(run.added)  # under FSDP they came with their units
            simulation.follow(run.net, run.trained)
            for step in range(1, steps + 1):
                run.step(step)
                simulation.know_states(run.optimizer)
    report = simulation.report(setup.to_dict(), _parameters(run), provenance(setup))
    early = early_peak_note(report)
    notes = (
        *report.notes,
        *((early,) if early else ()),
        *rank_notes(setup.sharding, rank),
        *initialisation_notes(setup.method),
    )
    if not banded or simulation.out_of_memory:
        return replace(report, notes=notes)
    band = loading_band(simulation.trail or (), report.phases, simulation.allocator.config)
    return replace(report, loading_band=band, notes=(*notes, band_note(band)))


def _parameters(run: TrainingRun) -> Parameters:
    """Counted on the net that ran; on a second one where the device was full before it was ready."""
    net, setup = run.net, run.setup
    if not hasattr(run, "trained"):
        dtype = loaded_dtype(setup)
        net = attached(skeleton(setup.model, dtype=dtype), setup.model, setup.method, low_memory=True)
    total = sum(parameter_count(p) for p in net.parameters())
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    return Parameters(total=total, trainable=trained, added=total - setup.model.parameters)


def _quantizes(setup: Setup) -> bool:
    return isinstance(setup.method, QLoRA)


def provenance(setup: Setup) -> dict[str, Any]:
    """The versions that a simulation of this setup depends on."""
    import accelerate
    import peft
    import transformers

    versions = {
        "planner": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "accelerate": accelerate.__version__,
    }
    if _quantizes(setup) or setup.training.optimizer in FROM_BITSANDBYTES:
        import bitsandbytes

        versions["bitsandbytes"] = bitsandbytes.__version__
    if "liger" in (setup.training.loss, setup.training.kernels):
        versions["liger_kernel"] = LIGER_VERSION  # whose source the forms follow; it need not be installed
    return versions
