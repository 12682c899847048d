"""Readings of torch's CUDA allocator around every phase of a training run (imports torch)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch

from planner.training.run import TrainingRun

__all__ = ["CudaReadings", "Emit", "durations", "workspace_bytes"]

Emit = Callable[..., None]  # emit("phase", name="load", ...): one event


@contextmanager
def durations(emit: Emit, name: str, step: int | None) -> Iterator[None]:
    """A phase of a rehearsal: only its time is taken."""
    emit("enter", name=name, step=step)
    began = time.perf_counter()
    yield
    emit("phase", name=name, step=step, seconds=time.perf_counter() - began)


class CudaReadings:
    """The phase hook of a measured run: resets peaks before a phase, reads everything after it.

    Every phase's event carries `known`: the bytes of those parts that are known exactly at that phase's
    peak, from the allocator's own blocks. All other bytes of the peak are a remainder.
    """

    def __init__(self, emit: Emit, used_bytes: Callable[[], int]) -> None:
        """`used_bytes` reads the device's memory in use by everyone."""
        self._emit = emit
        self._used_bytes = used_bytes
        self.phase: tuple[str, int | None] = ("", None)
        self.snapshots: list[str] = []  # what each snapshot was taken for, in order: marks in a trace
        self.tracing = False
        self._run: TrainingRun | None = None
        self._base = self._adapters = self._gradients = self._states = 0
        self._buckets = 0  # DDP's, which hold gradients a second time
        self._unreduced = False  # whether whole gradients wait in FSDP2, where they are not followed
        self._early = False  # whether a fused loss makes the head's gradient before it is accumulated
        self._accumulated: dict[int, torch.nn.Parameter] = {}
        self._waiting: tuple[int, ...] = ()
        self._at_peak: tuple[int, ...] = ()
        self._peak_seen = self._last_peak = 0

    def follow(self, run: TrainingRun) -> None:
        """Know the run's parameters, and notice each gradient when it is accumulated."""
        self._run = run
        if run.shared:
            self._follow_shared(run)
        for parameter in run.trained:
            parameter.register_post_accumulate_grad_hook(self._accumulated_gradient)
        head = run.net.get_output_embeddings()  # type: ignore[operator]
        weight: torch.nn.Parameter | None = getattr(head, "weight", None)
        if run.setup.training.loss == "liger":
            self._early = weight is not None and weight.requires_grad
        tied = getattr(run.net.get_input_embeddings(), "weight", None)  # type: ignore[operator]
        if weight is tied and weight is not None and weight.requires_grad and not _is_shard(weight):
            head.register_forward_hook(self._tied_head)

    def _follow_shared(self, run: TrainingRun) -> None:
        """Under FSDP adapters come with their units' weights, under DDP buckets come with the adapters."""
        allocated = self._base + self._adapters
        self._adapters = _bytes_of(self._blocks("attach"), run.added)
        if any(_is_shard(parameter) for parameter in run.trained):
            self._base = allocated - self._adapters
            self._unreduced = run.setup.training.gradient_accumulation_steps > 1
        else:
            self._buckets = allocated - self._base - self._adapters

    @contextmanager
    def __call__(self, name: str, step: int | None) -> Iterator[None]:
        """Around one phase; the peaks are read however it ends."""
        since = _stat("allocated_bytes", "peak")  # of the last phase and of what followed it
        between = since if since > self._last_peak else 0
        torch.cuda.reset_peak_memory_stats()
        self.phase = (name, step)
        self._peak_seen = _stat("allocated_bytes", "current")
        self._at_peak = self._present
        self._mark(f"begin {name} {step or ''}")
        self._emit("enter", name=name, step=step)
        began = time.perf_counter()
        failed = True
        try:
            yield
            torch.cuda.synchronize()
            failed = False
        finally:
            with contextlib.suppress(*((RuntimeError,) if failed else ())):  # a lost device answers nothing
                self._follow_peak()
                self._read(name, step, between, time.perf_counter() - began, failed=failed)

    def _read(self, name: str, step: int | None, between: int, seconds: float, *, failed: bool) -> None:
        allocated, peak = _stat("allocated_bytes", "current"), _stat("allocated_bytes", "peak")
        self._last_peak = peak
        readings = {
            "allocated_bytes": allocated,
            "peak_allocated_bytes": peak,
            "reserved_bytes": _stat("reserved_bytes", "current"),
            "peak_reserved_bytes": _stat("reserved_bytes", "peak"),
        }
        retries = int(torch.cuda.memory_stats_as_nested_dict(0)["num_alloc_retries"])
        self._emit(
            "phase",
            name=name,
            step=step,
            **readings,
            between_peak_bytes=between,
            retries=retries,
            device_used_bytes=self._used_bytes(),
            seconds=seconds,
            failed=failed,
            known={} if failed and name == "load" else self._sure(name, self._known(name, allocated)),
        )
        self._mark(f"end {name} {step or ''}")
        if name == "load" and not failed:
            torch.cuda.empty_cache()  # what random initialization left behind; a checkpoint leaves nothing

    def _sure(self, name: str, known: dict[str, int]) -> dict[str, int]:
        unsure = self._unreduced or (self._early and name in ("forward", "backward"))
        return {part: size for part, size in known.items() if part != "gradients" or not unsure}

    def _known(self, name: str, allocated: int) -> dict[str, int]:
        """The parts known exactly at this phase's peak."""
        if name == "load":
            self._base = allocated  # all that loading leaves on an empty device
            return {"base_weights": allocated}
        if name == "attach":
            self._adapters = allocated - self._base
            return {"base_weights": self._base}
        known = {"base_weights": self._base, "adapter_weights": self._adapters}
        if name == "forward":
            return known | {"gradients": self._gradients + self._buckets, "optimizer_states": self._states}
        if name == "backward":
            blocks = self._blocks(name)
            gradients = {key: p.grad for key, p in self._accumulated.items() if p.grad is not None}
            self._waiting = ()
            self._gradients = _bytes_of(blocks, gradients.values())
            at_peak = [gradients[key] for key in self._at_peak if key in gradients]
            known["gradients"] = _bytes_of(blocks, at_peak) + self._buckets
            return known | {"optimizer_states": self._states}
        known["gradients"] = self._gradients + self._buckets
        states = self._state_bytes(name)
        if states == self._states:  # where they appear, they do so somewhere within the phase
            known["optimizer_states"] = states
        self._states = states
        if not any(parameter.grad is not None for parameter in self._accumulated.values()):
            self._gradients = 0  # given up, and not set to zero
            self._accumulated.clear()
        return known

    @property
    def paged_bytes(self) -> int:
        """States in bitsandbytes' managed memory, which torch's allocator does not know."""
        paged = (value for value in self._state_tensors() if getattr(value, "is_paged", False))
        return sum(value.numel() * value.element_size() for value in paged)

    def _state_bytes(self, name: str) -> int:
        return _bytes_of(self._blocks(name), self._state_tensors())

    def _state_tensors(self) -> list[torch.Tensor]:
        states = self._run.optimizer.state.values() if self._run else ()
        return [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]

    @property
    def _present(self) -> tuple[int, ...]:
        """The parameters whose gradients are there, and the tied one again while its head's waits."""
        return (*self._accumulated, *self._waiting)

    def _accumulated_gradient(self, parameter: torch.nn.Parameter) -> None:
        self._follow_peak()
        self._accumulated[id(parameter)] = parameter
        if id(parameter) in self._waiting:
            self._waiting = ()

    def _tied_head(self, head: torch.nn.Module, _inputs: object, output: object) -> None:
        """Notice when the backward pass reaches a head tied to the embeddings.

        Its gradient is made at once and waits in the autograd engine for that of the embeddings.
        """
        if not isinstance(output, torch.Tensor) or not output.requires_grad:
            return

        def reached(_gradient: torch.Tensor) -> None:
            self._follow_peak()
            self._waiting = (id(head.weight),)

        output.register_hook(reached)

    def _follow_peak(self) -> None:
        """Remember which gradients were there when the allocator's peak last rose."""
        peak = _stat("allocated_bytes", "peak")
        if peak > self._peak_seen:
            self._peak_seen = peak
            self._at_peak = self._present

    def _blocks(self, name: str) -> dict[int, int]:
        """Size of every block in use, by its address."""
        if self.tracing:
            self.snapshots.append(f"blocks {name}")
        return {
            block["address"]: block["size"]
            for segment in torch.cuda.memory_snapshot()
            for block in segment["blocks"]
            if block["state"] == "active_allocated"
        }

    def _mark(self, label: str) -> None:
        """In a trace, a snapshot leaves an event that says where a phase begins and ends."""
        if self.tracing:
            self.snapshots.append(label.strip())
            torch.cuda.memory_snapshot()


def workspace_bytes() -> int | None:
    """What cuBLAS and cublasLt keep, read by giving it back; None where this torch cannot."""
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if clear is None:
        return None
    before = _stat("allocated_bytes", "current")
    clear()
    return before - _stat("allocated_bytes", "current")


def _stat(name: str, which: str) -> int:
    """One figure of the allocator's statistics for cuda:0: `current` or `peak`."""
    return int(torch.cuda.memory_stats_as_nested_dict(0)[name]["all"][which])


def _bytes_of(blocks: dict[int, int], tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the blocks that hold these tensors' storages, or their shards', each counted once."""
    held = (getattr(tensor, "_local_tensor", tensor) for tensor in tensors)
    addresses = {tensor.untyped_storage().data_ptr() for tensor in held if tensor.is_cuda}
    return sum(blocks.get(address, 0) for address in addresses)


def _is_shard(parameter: torch.Tensor) -> bool:
    return hasattr(parameter, "_local_tensor")
