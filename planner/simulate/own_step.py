"""Anyone's own model and training step, simulated: two callables, no Hugging Face needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from planner.allocator import AllocatorConfig
from planner.catalog.gpus import Gpu, gpu as gpu_named
from planner.checks import whole
from planner.errors import SetupError
from planner.report import MemoryReport, Parameters
from planner.simulate.as_cuda import AsCuda
from planner.simulate.simulation import Progress, Simulation
from planner.simulate.state import State
from planner.version import __version__

__all__ = ["simulated_own_step"]

_ADVICE = "make tensors on device cuda, and leave out what needs the values of tensors"


def simulated_own_step(
    build: Callable[[], Any],
    step: Callable[[Any], Any],
    *,
    gpu: Gpu | str | None = None,
    steps: int = 2,
    allocator: AllocatorConfig | None = None,
    limit_bytes: int | None = None,
    progress: Progress | None = None,
    watch: Callable[[Simulation], None] | None = None,
) -> MemoryReport:
    """The memory of `state = build()` and `steps` times `step(state)` on a GPU, simulated.

    Both run as they would there: device `cuda` is the simulated one, and so is a tensor made without a
    device. Parameters and buffers of modules in `state` (itself, tuples, lists, dicts, attributes) are
    base weights, whatever an optimizer keeps are its states. A `backward()` ends the phase forward, an
    optimizer's `step()` the phase backward. The values of tensors are not known: a question is answered as
    in a step without a fault, and an operation that decides by them raises TraceError with its name.
    Raises SetupError where `state` holds nothing to train or holds parameters on another device.
    """
    whole("steps", steps)
    device = gpu_named(gpu) if isinstance(gpu, str) else gpu
    simulation = Simulation(gpu=device, allocator=allocator, limit_bytes=limit_bytes, progress=progress)
    if watch:
        watch(simulation)
    state = State()
    with simulation.outcome(advice=_ADVICE):
        as_cuda = AsCuda()
        with as_cuda.active():
            with simulation.phase("load", None):
                built = build()
            state = State.of(built)
            _check(state, built)
            _know(simulation, state)
            phases = _Phases(simulation, as_cuda)
            with phases.following():
                for number in range(1, steps + 1):
                    with phases.of_step(number):
                        step(built)
    name = f"{getattr(step, '__module__', '')}.{getattr(step, '__qualname__', type(step).__name__)}"
    provenance = {"planner": __version__, "torch": torch.__version__}
    return simulation.report({"step": name.lstrip(".")}, _parameters(state), provenance)


def _check(state: State, built: Any) -> None:
    """Raises SetupError for a state that cannot be trained on the simulated device."""
    parameters = state.parameters()
    if not parameters:
        raise SetupError(
            f"build() returned no module, optimizer or parameter (got {type(built).__name__}); "
            "return all that step needs, such as (model, optimizer)."
        )
    for parameter in parameters:
        if parameter.device.type != "meta":
            raise SetupError(
                f"build() made parameters on {parameter.device}; make them on device cuda, "
                "or leave the device out."
            )


def _know(simulation: Simulation, state: State) -> None:
    """Tell the simulation what the state's tensors are for, and whose gradients to recognize."""
    weights = {id(tensor) for tensor in state.parameters()}
    for tensor in state.tensors:
        if id(tensor) not in weights and tensor.device.type == "meta":
            simulation.ledger.retag(tensor, "activations")
    simulation.modules.watch(state.named_modules(), state.head())
    simulation.follow_gradients(p for p in state.parameters() if p.requires_grad)


def _parameters(state: State) -> Parameters:
    parameters = state.parameters()
    return Parameters(
        total=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
    )


class _Phases:
    """Cuts a step into forward, backward and optimizer_step where torch is seen to begin them.

    What follows a backward pass, such as clipping, belongs to the phase backward until an optimizer or a
    module runs.
    """

    def __init__(self, simulation: Simulation, as_cuda: AsCuda) -> None:
        self._simulation = simulation
        self._as_cuda = as_cuda
        self._name = ""
        self._number = 0
        self._open: AbstractContextManager[None] | None = None
        self._depth = 0  # backward passes within each other, as reentrant checkpoints make them

    @contextmanager
    def following(self) -> Iterator[None]:
        """Hooks on the engine, on all modules and all optimizers."""
        with ExitStack() as stack:
            for name in ("backward", "_engine_run_backward"):  # the first makes the loss's own gradient
                form = self._backward(getattr(torch.autograd, name))
                stack.enter_context(mock.patch.object(torch.autograd, name, form))
            for handle in (
                nn.modules.module.register_module_forward_pre_hook(self._module),
                register_optimizer_step_pre_hook(self._before_optimizer),
                register_optimizer_step_post_hook(self._after_optimizer),
            ):
                stack.callback(handle.remove)
            yield

    @contextmanager
    def of_step(self, number: int) -> Iterator[None]:
        """One step, which begins with a forward phase."""
        self._number = number
        self._begin("forward")
        try:
            yield
        finally:
            self._end()

    def _begin(self, name: str) -> None:
        if name == self._name:
            return
        self._end()
        self._open = self._simulation.phase(name, self._number)
        self._open.__enter__()
        self._name = name

    def _end(self) -> None:
        if self._open is not None:
            self._open.__exit__(None, None, None)
        self._open, self._name = None, ""

    def _backward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            gradients_only = kwargs.get("accumulate_grad") is False  # torch.autograd.grad
            if not gradients_only and not self._depth:
                self._begin("backward")
                self._simulation.tracer.phase = "backward"
            self._depth += 1
            try:
                return original(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth and self._name == "backward":
                    self._simulation.tracer.phase = "after backward"

        return run

    def _module(self, module: nn.Module, args: Any) -> None:
        if not self._depth and self._name != "forward":
            self._begin("forward")

    def _before_optimizer(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._as_cuda.to_host()
        if not self._depth:
            self._begin("optimizer_step")

    def _after_optimizer(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._as_cuda.from_host()
        self._simulation.know_states(optimizer)
