"""The simulated device: a tracer on `meta` tensors over CUDA's allocator, and what it saw as a report."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn

from planner.allocator import AllocatorConfig, CachingAllocator, OutOfDeviceMemory
from planner.catalog.gpus import Gpu
from planner.checkpointing import offloaded_note
from planner.errors import PlannerError, TraceError
from planner.optimizers import paged_note
from planner.report import MemoryReport, OutOfMemory, Parameters, Parts, PeakSite, Phase
from planner.simulate.attention import AttentionRules
from planner.simulate.autocast import cuda_autocast_functions
from planner.simulate.cuda_forms import cuda_forms, cuda_optimizers
from planner.simulate.host_forms import host_forms
from planner.simulate.kernels import Workspaces
from planner.simulate.ledger import LARGEST_EVENT_COUNT, Ledger, TooManyEvents
from planner.simulate.liger_forms import liger_forms
from planner.simulate.mask_forms import mask_forms
from planner.simulate.paged_forms import paged_forms
from planner.simulate.peft_forms import peft_forms
from planner.simulate.quantized_forms import quantized_forms
from planner.simulate.trace import Modules, Tracer, head_of

__all__ = ["Progress", "Simulation"]

Progress = Callable[[str, int | None], None]
TIMELINE_POINTS = 2000
MEASURE_INSTEAD = "measure this model on a GPU, or choose another attention"


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
        tracer: type[Tracer] = Tracer,
        has_masks: bool = False,
    ) -> None:
        """An empty device. `has_masks`: samples are padded, or packed so that attention needs a mask."""
        capability = gpu.capability if gpu else None
        self.gpu = gpu
        self.allocator = CachingAllocator(allocator or AllocatorConfig(), device_bytes=limit_bytes)
        self.ledger = Ledger(self.allocator)
        self.modules = Modules()
        self.tracer = tracer(self.ledger, Workspaces(capability=capability), self.modules)
        self.rules = AttentionRules(capability=capability)
        self.has_masks = has_masks
        self.progress = progress
        self.phases: list[Phase] = []
        self.peak_reserved_bytes = 0
        self.out_of_memory: OutOfMemory | None = None
        self.trail: tuple[tuple[Any, ...], ...] | None = None  # see planner.simulate.snapshot

    @contextmanager
    def device(self) -> Iterator[None]:
        """Trace everything inside; garbage collection is held so that two runs agree to the byte.

        What an earlier run left is collected; the libraries' many objects are of an older generation.
        """
        collecting = gc.isenabled()
        gc.collect(1)
        gc.disable()
        try:
            with ExitStack() as stack:
                stack.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
                stack.enter_context(cuda_optimizers())
                stack.enter_context(cuda_forms(self.rules))
                stack.enter_context(cuda_autocast_functions())
                stack.enter_context(quantized_forms())
                stack.enter_context(paged_forms(self.ledger.count_paged))
                stack.enter_context(host_forms(self.ledger.count_on_host))
                stack.enter_context(peft_forms(self.tracer))
                stack.enter_context(liger_forms(self.modules, self.gpu))
                if self.has_masks:
                    stack.enter_context(mask_forms(self.tracer))
                stack.enter_context(mock.patch.object(torch.cuda, "empty_cache", self.ledger.empty_cache))
                stack.enter_context(self.tracer)
                yield
        finally:
            self.modules.unwatch()
            if collecting:
                gc.enable()

    @contextmanager
    def outcome(self, *, advice: str = MEASURE_INSTEAD) -> Iterator[None]:
        """What ends the run inside: a full device is kept as `out_of_memory`, the rest is a TraceError.

        `advice` ends the sentence of the error.
        """
        try:
            with self.device():
                yield
        except OutOfDeviceMemory as error:
            self.out_of_memory = self._failure(error)
        except TooManyEvents:
            raise TraceError(
                f"the trace grew past {LARGEST_EVENT_COUNT // 10**6} million allocations; "
                "this step is too large to simulate."
            ) from None
        except PlannerError:
            raise
        except Exception as error:
            raise TraceError(self._untraceable(error, advice)) from error

    @contextmanager
    def phase(self, name: str, step: int | None) -> Iterator[None]:
        """A phase of the run: peaks are counted within it, new storages get its part."""
        allocator, ledger = self.allocator, self.ledger
        if self.progress:
            self.progress(name, step)
        self.tracer.phase = ledger.phase = name
        ledger.peak_in_phase = False
        ledger.step = step
        if step is not None:
            ledger.last_step = step
        allocator.reset_peak()
        ledger.note("phase", name, step)
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
            ledger.note("end")
            self.tracer.phase = ledger.phase = ""

    def follow(self, net: nn.Module, trained: Sequence[nn.Parameter]) -> None:
        """Name the modules, and know gradients when they are accumulated."""
        self.modules.watch(net.named_modules(), head_of(net))
        self.follow_gradients(trained)

    def follow_gradients(self, trained: Iterable[torch.Tensor]) -> None:
        """Know the gradients of these parameters when they are accumulated."""
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(self._gradient)

    def know_adapters(self, trained: Iterable[torch.Tensor]) -> None:
        """Tag parameters that a method has added, where they were made together with the model's."""
        for parameter in trained:
            self.ledger.retag(parameter, "adapter_weights")

    def know_states(self, optimizer: torch.optim.Optimizer) -> None:
        """Tag what the optimizer keeps, also in a peak of the step that has just made it.

        Such a peak holds what was made before it: Adafactor and bitsandbytes make a tensor's states when they
        come to it.
        """
        made = 0
        for state in optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor) and value.device.type == "meta":
                    moved = self.ledger.retag(value, "optimizer_states")
                    made += moved if self.ledger.was_at_peak(value) else 0
        peak = self.ledger.peak
        if made and peak.phase == "optimizer_step" and peak.step == self.ledger.last_step:
            peak.parts["temporaries"] -= made
            peak.parts["optimizer_states"] += made

    def _gradient(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            self.ledger.retag(parameter.grad, "gradients")

    def site(self, op: Any, place: Any) -> PeakSite:
        """An operation and the module it belongs to, as the ledger noted them."""
        module = self.modules.place(place) if isinstance(place, int) else place
        return PeakSite(op=str(op), module=module or "")

    def peak_site(self) -> PeakSite:
        """The operation and module at the peak."""
        return self.site(self.ledger.peak.op, self.ledger.peak.place)

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

    def report(
        self, setup: Mapping[str, Any], parameters: Parameters, provenance: Mapping[str, Any]
    ) -> MemoryReport:
        """What was seen, as the report that all verbs share."""
        peak, paged, offloaded = self.ledger.peak, self.ledger.paged_bytes, self.ledger.offloaded_bytes
        if self.ledger.trail is not None:
            self.trail = tuple(self.ledger.trail)  # before the run's own tensors are given up
        return MemoryReport(
            source="simulation",
            setup=setup,
            parameters=parameters,
            parts=Parts(**peak.parts),
            phases=tuple(self.phases),
            peak_phase=peak.phase,
            peak_reserved_bytes=self.peak_reserved_bytes,
            peak_site=self.peak_site(),
            out_of_memory=self.out_of_memory,
            timeline=self.timeline(),
            notes=(
                *((paged_note(paged),) if paged else ()),
                *((offloaded_note(offloaded),) if offloaded else ()),
            ),
            provenance={
                **provenance,
                **({"paged_bytes": paged} if paged else {}),
                **({"offloaded_bytes": offloaded} if offloaded else {}),
            },
        )

    def _failure(self, error: OutOfDeviceMemory) -> OutOfMemory:
        site = self.site(*(self.ledger.failed_at or (self.ledger.op, self.ledger.place)))
        return OutOfMemory(
            phase=self.phases[-1].name if self.phases else "load",
            requested_bytes=error.requested_bytes,
            free_bytes=max(0, error.device_bytes - error.allocated_bytes),
            op=site.op,
            module=site.module,
        )

    def _untraceable(self, error: Exception, advice: str) -> str:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        op = self.ledger.failed_at[0] if self.ledger.failed_at else "the step"
        return f"{op} cannot be simulated ({reason}); {advice}."
