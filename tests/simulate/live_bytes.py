"""Live bytes of a real run on the CPU and of the same run simulated, counted by one and the same counter."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from planner.batching import asks_masks
from planner.simulate import trace
from planner.simulate.simulation import Simulation
from planner.spec import Setup
from planner.training.recipe import no_autocast
from planner.training.run import TrainingRun

BLOCK_BYTES = 512


class Live(NamedTuple):
    """A phase: its bytes at the end and at most, in whole blocks."""

    name: str
    end_bytes: int
    peak_bytes: int


class Parameter(NamedTuple):
    """One of the model's, as the method left it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    trained: bool


class Counter(TorchDispatchMode):
    """Storages of these devices, from the operation that returns them to their end."""

    def __init__(self, *devices: str) -> None:
        super().__init__()
        self.devices = devices
        self.now_bytes = self.peak_bytes = 0
        self.phases: list[Live] = []
        self._live: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided:
                self._record(tensor)
        return out

    @contextmanager
    def phase(self, name: str, _step: int | None) -> Iterator[None]:
        self.peak_bytes = self.now_bytes
        yield
        self.phases.append(Live(name, self.now_bytes, self.peak_bytes))

    def _record(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live or tensor.device.type not in self.devices:
            return
        size = -(-storage.nbytes() // BLOCK_BYTES) * BLOCK_BYTES
        self._live[key] = size, weakref.ref(storage, lambda _ref: self._free(key))
        self.now_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)

    def _free(self, key: int) -> None:
        self.now_bytes -= self._live.pop(key, (0,))[0]


def really(setup: Setup) -> tuple[list[Parameter], list[Live]]:
    """A step with values, on the CPU."""
    counter = Counter("cpu")
    gc.collect()
    gc.disable()
    try:
        torch.manual_seed(0)
        with warnings.catch_warnings(), counter:
            warnings.simplefilter("ignore")
            run = TrainingRun(setup, torch.device("cpu"), counter.phase, autocast=no_autocast)
            run.prepare()
            parameters = _parameters(run)
            run.step(1)
    finally:
        gc.enable()
    return parameters, counter.phases


def simulated(setup: Setup) -> tuple[list[Parameter], list[Live]]:
    """The same without values, without what only CUDA's kernels take; the host's tensors count too."""
    simulation = Simulation(has_masks=asks_masks(setup.training))
    counter = Counter("cpu", "meta")

    @contextmanager
    def phase(name: str, step: int | None) -> Iterator[None]:
        with simulation.phase(name, step), counter.phase(name, step):
            yield
            if name == "attach":
                _on_one_device(run)

    no_scratch = mock.patch.dict(trace.SCRATCH, {}, clear=True)
    no_workspace = mock.patch.object(trace, "PRODUCTS", frozenset())
    with no_scratch, no_workspace, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = TrainingRun(setup, torch.device("meta"), phase)
        with simulation.outcome(), counter:
            run.prepare()
            parameters = _parameters(run)
            simulation.follow(run.net, run.trained)
            run.step(1)
    return parameters, counter.phases


def _on_one_device(run: TrainingRun) -> None:
    """Bring the buffers that peft left in the host's memory: on the CPU there is one device."""
    for module in run.net.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to("meta")


def _parameters(run: TrainingRun) -> list[Parameter]:
    return [
        Parameter(name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in run.net.named_parameters()
    ]
