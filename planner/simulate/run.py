"""Simulate a setup: the training step on `meta` tensors, through the allocator, as a report."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from planner.catalog.gpus import Gpu
from planner.catalog.gpus import gpu as gpu_named
from planner.errors import PlannerError, TraceError
from planner.report import MemoryReport, OutOfMemory, Parameters, Parts, PeakSite, Phase
from planner.simulate.allocator import AllocatorConfig, CachingAllocator, OutOfDeviceMemory
from planner.simulate.attention import AttentionRules
from planner.simulate.autocast import cuda_autocast_functions
from planner.simulate.cuda_forms import cuda_forms, cuda_optimizers
from planner.simulate.kernels import Workspaces
from planner.simulate.ledger import Ledger, TooManyEvents
from planner.simulate.trace import Modules, Tracer
from planner.spec import Setup
from planner.training.run import Loop, TrainingRun
from planner.version import __version__

__all__ = ["Simulation", "simulate", "simulate_step"]

Progress = Callable[[str, int | None], None]
TIMELINE_POINTS = 2000


class Simulation:
    """A simulated device: tracer, allocator and phases, to be entered as a context.

    `gpu` gives capability (workspaces, attention) and, with `limited`, the size at which it is full.
    """

    def __init__(
        self,
        *,
        gpu: Gpu | None = None,
        allocator: AllocatorConfig | None = None,
        limit_bytes: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        """An empty device."""
        capability = gpu.capability if gpu else None
        self.allocator = CachingAllocator(allocator or AllocatorConfig(), device_bytes=limit_bytes)
        self.ledger = Ledger(self.allocator)
        self.modules = Modules()
        self.tracer = Tracer(self.ledger, Workspaces(capability=capability), self.modules)
        self.rules = AttentionRules(capability=capability)
        self.progress = progress
        self.phases: list[Phase] = []
        self.peak_reserved_bytes = 0

    @contextmanager
    def device(self) -> Iterator[None]:
        """Trace everything inside; garbage collection is held so that two runs agree to the byte."""
        collecting = gc.isenabled()
        gc.collect()
        gc.disable()
        try:
            with ExitStack() as stack:
                stack.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
                stack.enter_context(cuda_optimizers())
                stack.enter_context(cuda_forms(self.rules))
                stack.enter_context(cuda_autocast_functions())
                stack.enter_context(self.tracer)
                yield
        finally:
            self.modules.unwatch()
            if collecting:
                gc.enable()

    @contextmanager
    def phase(self, name: str, step: int | None) -> Iterator[None]:
        """A phase of the run: peaks are counted within it, new storages get its part."""
        allocator, ledger = self.allocator, self.ledger
        if self.progress:
            self.progress(name, step)
        self.tracer.phase = ledger.phase = name
        ledger.step = step
        if step is not None:
            ledger.last_step = step
        allocator.reset_peak()
        if name == "forward":
            self.modules.begin_forward()
        try:
            yield
        finally:
            if name == "forward":
                self.modules.end_forward()
            self.peak_reserved_bytes = max(self.peak_reserved_bytes, allocator.peak_reserved_bytes)
            self.phases.append(
                Phase(
                    name=name,
                    step=step,
                    allocated_bytes=allocator.allocated_bytes,
                    peak_allocated_bytes=allocator.peak_allocated_bytes,
                    reserved_bytes=allocator.reserved_bytes,
                    peak_reserved_bytes=allocator.peak_reserved_bytes,
                )
            )
            self.tracer.phase = ledger.phase = ""

    def follow(self, net: nn.Module, trained: Sequence[nn.Parameter]) -> None:
        """Name the modules, and know gradients when they are accumulated."""
        self.modules.watch(net)
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(self._gradient)

    def know_states(self, optimizer: torch.optim.Optimizer) -> None:
        """Tag what the optimizer keeps, also in a peak of the step that has just made it.

        Optimizers make their states before they change a weight, so a peak within that phase holds them all.
        """
        made = 0
        for state in optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor) and value.device.type == "meta":
                    made += self.ledger.retag(value, "optimizer_states")
        peak = self.ledger.peak
        if made and peak.phase == "optimizer_step" and peak.step == self.ledger.last_step:
            peak.parts["temporaries"] -= made
            peak.parts["optimizer_states"] += made

    def _gradient(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            self.ledger.retag(parameter.grad, "gradients")

    def peak_site(self) -> PeakSite:
        """The operation and module at the peak."""
        moment = self.ledger.peak
        place = self.modules.place(moment.place) if isinstance(moment.place, int) else moment.place
        return PeakSite(op=str(moment.op), module=place or "")

    def timeline(self, points: int = TIMELINE_POINTS) -> tuple[tuple[int, int], ...]:
        """Allocated bytes over events; of each stretch the highest is kept, so the peak never is lost."""
        events = self.ledger.events
        stride = max(1, -(-len(events) // points))
        kept = []
        for start in range(0, len(events), stride):
            stretch = events[start : start + stride]
            highest = max(range(len(stretch)), key=stretch.__getitem__)
            kept.append((start + highest, stretch[highest]))
        return tuple(kept)


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
    run = TrainingRun(
        setup,
        torch.device("meta"),
        simulation.phase,
        loop=loop,
    )
    failure: OutOfMemory | None = None
    try:
        with simulation.device():
            run.prepare()
            simulation.follow(run.net, run.trained)
            for step in range(1, steps + 1):
                run.step(step)
                simulation.know_states(run.optimizer)
    except OutOfDeviceMemory as error:
        failure = _failure(simulation, error)
    except TooManyEvents:
        raise TraceError(
            "the trace grew past 20 million allocations; this step is too large to simulate."
        ) from None
    except PlannerError:
        raise
    except Exception as error:
        raise TraceError(_untraceable(simulation, error)) from error
    return _report(setup, simulation, run, failure)


def simulate_step(
    build: Callable[[], Any], step: Callable[[Any], Any], *, gpu: Gpu | str | None = None, steps: int = 2
) -> MemoryReport:
    """The same report for anyone's own step: `state = build()` on `meta`, then `step(state)` twice.

    `build` runs under `torch.device("meta")` and returns what `step` takes; modules and optimizers among
    it (or in its attributes, tuple or dict) name the parts. A step that calls `backward` splits the
    phases there. Raises TraceError where an operation needs values.
    """
    from planner.simulate.own_step import simulated_own_step

    return simulated_own_step(build, step, gpu=gpu, steps=steps)


def _parameters(run: TrainingRun) -> Parameters:
    total = sum(p.numel() for p in run.net.parameters())
    trained = sum(p.numel() for p in run.trained)
    return Parameters(total=total, trainable=trained, added=total - run.setup.model.parameters)


def _report(
    setup: Setup, simulation: Simulation, run: TrainingRun, failure: OutOfMemory | None
) -> MemoryReport:
    peak = simulation.ledger.peak
    return MemoryReport(
        source="simulation",
        setup=setup.to_dict(),
        parameters=_parameters(run),
        parts=Parts(**peak.parts),
        phases=tuple(simulation.phases),
        peak_phase=peak.phase,
        peak_reserved_bytes=simulation.peak_reserved_bytes,
        peak_site=simulation.peak_site(),
        out_of_memory=failure,
        timeline=simulation.timeline(),
        provenance=provenance(),
    )


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


def _failure(simulation: Simulation, error: OutOfDeviceMemory) -> OutOfMemory:
    ledger = simulation.ledger
    place = simulation.modules.place(ledger.place) if isinstance(ledger.place, int) else ledger.place
    return OutOfMemory(
        phase=simulation.phases[-1].name if simulation.phases else "load",
        requested_bytes=error.requested_bytes,
        free_bytes=max(0, error.device_bytes - error.allocated_bytes),
        op=str(ledger.op),
        module=place or "",
    )


def _untraceable(simulation: Simulation, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"{simulation.ledger.op or 'the model'} cannot be simulated ({reason}); "
        "measure this model on a GPU, or choose another attention."
    )
