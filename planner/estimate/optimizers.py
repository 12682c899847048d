"""What an optimizer keeps for each trained tensor, and what it takes while it steps.

Letters: `n` elements of a tensor. Sources: torch 2.13, torch/optim; transformers 5.23, optimization.py;
bitsandbytes 0.50, optim/optimizer.py. Sizes are requests in the order in which they are made.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from planner.estimate.parameters import TrainedTensor, trained_tensors
from planner.estimate.peft_form import peft_form
from planner.estimate.recipes import recipe_of
from planner.estimate.rounding import MIN_BLOCK_BYTES, block_bytes, packed_bytes
from planner.optimizers import EIGHT_BIT, FROM_BITSANDBYTES, PAGED, Optimizer
from planner.spec import PeftConfig, PeftOfSize, Setup

__all__ = [
    "OptimizerMemory",
    "bare_memory",
    "clipping_bytes",
    "optimizer_memory",
    "saved_state_bytes",
    "states_are_known",
]

# States for each trained element; Adafactor's depend on the shape.
_STATES: dict[Optimizer, int] = {
    "adamw": 2,
    "adamw-fused": 2,
    "adamw-single": 2,
    "adamw-8bit": 2,
    "paged-adamw-8bit": 2,
    "paged-adamw-32bit": 2,
    "adafactor": 0,
    "sgd": 0,
    "sgd-momentum": 1,
    "lion-8bit": 1,
    "lion-32bit": 1,
    "paged-lion-8bit": 1,
    "paged-lion-32bit": 1,
}
_SMALL_NUMEL = 4096  # optim/adamw.py, min_8bit_size: tensors below it keep fp32 states
_PAGED_NUMEL = 100_000  # optimizer.py, get_state_buffer: states from 1e5 elements on are paged
_BLOCK_NUMEL = 256  # optimizer.py, init_state: one fp32 absmax for so many 8-bit numbers
_CHUNK_NUMEL = 65_536  # MultiTensorApply.cuh, kChunkSize
_COUNTER_BYTES = 4  # adam.py, _init_group: each tensor's step, in fp32; on the device where it is fused
_MAP_BYTES = 256 * 4  # functional.py, create_dynamic_map: one for each state, shared by all tensors


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerMemory:
    """States as the allocator counts them, the most that the step takes beside them, and paged states.

    `paged_bytes` is managed memory of bitsandbytes' own, which torch's allocator does not know.
    """

    states_bytes: int
    temporaries_bytes: int
    paged_bytes: int = 0


def states_are_known(setup: Setup) -> bool:
    """Whether the states follow from what is known: Adafactor's need the shapes of what is trained."""
    shapeless = setup.model.is_bare or isinstance(setup.method, PeftOfSize)
    return not (shapeless and setup.training.optimizer == "adafactor")


def bare_memory(setup: Setup, trainable: int, element_bytes: int) -> OptimizerMemory:
    """States of `trainable` parameters of unknown shapes, `element_bytes` each under torch's optimizers."""
    optimizer = setup.training.optimizer
    count = _STATES[optimizer]
    if optimizer not in FROM_BITSANDBYTES:
        return OptimizerMemory(states_bytes=count * trainable * element_bytes, temporaries_bytes=0)
    eight = optimizer in EIGHT_BIT
    scales = count * 4 * -(-trainable // _BLOCK_NUMEL) if eight else 0
    states = count * trainable * (1 if eight else 4)
    if optimizer in PAGED:
        return OptimizerMemory(states_bytes=scales, temporaries_bytes=0, paged_bytes=states)
    return OptimizerMemory(states_bytes=states + scales, temporaries_bytes=0)


def optimizer_memory(
    setup: Setup, trained: Sequence[TrainedTensor], state_bytes: int | None
) -> OptimizerMemory:
    """The optimizer of the setup over its trained tensors.

    `state_bytes` is one state's element where the recipe says so (textbook), None: the weight's own.
    """
    tensors = list(_in_model_order(trained)) if states_are_known(setup) else []
    states = _states(setup, tensors, state_bytes)
    temporaries = 0
    match setup.training.optimizer:
        case "adamw":  # adam.py, _multi_tensor_adam: exp_avg_sq_sqrt of all tensors at once
            temporaries = packed_bytes([t.numel * (state_bytes or t.element_bytes) for t in tensors])
        case "adamw-single":
            temporaries = _single_adamw_temporaries(
                [t.numel * (state_bytes or t.element_bytes) for t in tensors]
            )
        case "adafactor":
            temporaries = _adafactor_temporaries(tensors)
    return OptimizerMemory(
        states_bytes=packed_bytes(states.on_device),
        temporaries_bytes=temporaries,
        paged_bytes=sum(states.paged),
    )


def saved_state_bytes(setup: Setup) -> int | None:
    """The tensors of `optimizer.state_dict()`, which a run needs to be resumed; None where not known.

    Excludes what torch.save adds: names and groups, some hundred bytes for each tensor.
    """
    if not states_are_known(setup):
        return None
    if isinstance(setup.method, PeftConfig) and peft_form(setup.model, setup.method) is None:
        return None
    recipe = recipe_of(setup)
    trained = trained_tensors(setup)
    if not trained:  # full fine-tuning of a bare number of parameters
        bare = bare_memory(setup, setup.model.parameters, recipe.state or recipe.base)
        return bare.states_bytes + bare.paged_bytes
    states = _states(setup, list(_in_model_order(trained)), recipe.state)
    return sum(states.on_device) + sum(states.paged) + sum(states.on_host)


@dataclass(slots=True)
class _States:
    """Requests for states: from torch's allocator, for managed memory, on the host."""

    on_device: list[int] = field(default_factory=list)
    paged: list[int] = field(default_factory=list)
    on_host: list[int] = field(default_factory=list)


def _states(setup: Setup, tensors: Sequence[TrainedTensor], state_bytes: int | None) -> _States:
    optimizer = setup.training.optimizer
    if optimizer in FROM_BITSANDBYTES:
        embeddings = {t.name for t in setup.model.tensors if t.kind == "embedding"}
        return _of_bitsandbytes(optimizer, tensors, embeddings if optimizer in EIGHT_BIT else set())
    if optimizer == "adafactor":
        return _States(on_device=[size for t in tensors for size in _factored(t.shape)])
    states = _States()
    counters = states.on_device if optimizer == "adamw-fused" else states.on_host
    for t in tensors:
        if optimizer in ("adamw", "adamw-fused", "adamw-single"):
            counters.append(_COUNTER_BYTES)
        states.on_device += [t.numel * (state_bytes or t.element_bytes)] * _STATES[optimizer]
    return states


def clipping_bytes(trained: Sequence[TrainedTensor]) -> int:
    """clip_grad_norm_: a norm of each gradient, and ForeachReduceOp.cu's partial sums in fp32.

    One sum for each 65,536 numbers of the largest tensor, for every tensor.
    """
    count = sum([t.count for t in trained])
    chunks = max([-(-t.numel // _CHUNK_NUMEL) for t in trained], default=0)
    return MIN_BLOCK_BYTES * count + packed_bytes([4 * count * chunks])


def _single_adamw_temporaries(sizes: Iterable[int]) -> int:
    """adam.py, _single_tensor_adam: the square root and its quotient, and the last tensor's `denom`."""
    most = denominator = 0
    for size in map(block_bytes, sizes):
        most = max(most, denominator + 2 * size)
        denominator = size
    return most


def _factored(shape: tuple[int, ...]) -> list[int]:
    """Adafactor's states in fp32: sums over rows and columns of a matrix, else all; and its RMS, a number."""
    if len(shape) < 2:
        return [4 * math.prod(shape), 4]
    return [4 * math.prod(shape[:-1]), 4 * math.prod(shape[:-2]) * shape[-1], 4]


def _adafactor_temporaries(tensors: Iterable[TrainedTensor]) -> int:
    """Adafactor.step: fp32 copies of 16-bit gradient and weight, two more of the update at a time.

    Names are rebound tensor by tensor, so the copy and the update of the tensor before wait for the next.
    """
    most = copy = update = 0
    for t in tensors:
        full = block_bytes(4 * t.numel)
        held = full if t.element_bytes == 2 else 0
        factors = sum([block_bytes(size) for size in _factored(t.shape)[:-1]]) if len(t.shape) > 1 else 0
        most = max(most, copy + update + held, 2 * (held + full) + max(update, factors))
        copy, update = held, full
    return most


def _of_bitsandbytes(
    optimizer: Optimizer, tensors: Iterable[TrainedTensor], embeddings: set[str]
) -> _States:
    """Optimizer1State and Optimizer2State, init_state; the update itself works in place.

    In 8 bits `embeddings` keep fp32 states, as HF Trainer asks for.
    """
    count, states = _STATES[optimizer], _States()
    smallest = _SMALL_NUMEL if optimizer in EIGHT_BIT else None
    maps = [_MAP_BYTES] * count
    for t in tensors:
        single = smallest is None or t.numel < smallest or (not t.added and t.name in embeddings)
        if not single:
            states.on_device += maps
            maps = []
        paged = optimizer in PAGED and t.numel >= _PAGED_NUMEL
        place = states.paged if paged else states.on_device
        place += [4 * t.numel if single else t.numel] * count
        if not single:
            states.on_device += [4 * -(-t.numel // _BLOCK_NUMEL)] * count
    return states


def _in_model_order(trained: Sequence[TrainedTensor]) -> Iterator[TrainedTensor]:
    """Each tensor once, in the order of the model's parameters: layer after layer in its place."""
    for _, group in groupby(trained, key=lambda t: t.name.partition("*")[0] if t.layers else ""):
        by_layer: dict[int, list[TrainedTensor]] = {}
        for tensor in group:
            for layer in tensor.layers or (0,):
                by_layer.setdefault(layer, []).append(tensor)
        for layer in sorted(by_layer):
            yield from by_layer[layer]
