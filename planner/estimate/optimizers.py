"""What an optimizer keeps for each trained tensor, and what it takes while it steps.

Letters: `n` elements of a tensor. Sources: torch 2.13, torch/optim; transformers 5.23, optimization.py;
bitsandbytes 0.50, optim/optimizer.py. Sizes are requests in the order in which they are made.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from planner.estimate.parameters import TrainedTensor
from planner.estimate.rounding import MIN_BLOCK_BYTES, block_bytes, packed_bytes
from planner.optimizers import EIGHT_BIT, Optimizer
from planner.spec import PeftOfSize, Setup

__all__ = ["OptimizerMemory", "bare_state_bytes", "optimizer_memory", "states_are_known"]

# States for each trained element; Adafactor's depend on the shape.
_STATES: dict[Optimizer, int] = {
    "adamw": 2,
    "adamw-fused": 2,
    "adamw-single": 2,
    "adamw-8bit": 2,
    "paged-adamw-8bit": 2,
    "adafactor": 0,
    "sgd": 0,
    "sgd-momentum": 1,
    "lion-8bit": 1,
}
_SMALL_NUMEL = 4096  # optim/adamw.py, min_8bit_size: tensors below it keep fp32 states
_PAGED_NUMEL = 100_000  # optimizer.py, get_state_buffer: states from 1e5 elements on are paged
_BLOCK_NUMEL = 256  # optimizer.py, init_state: one fp32 absmax for so many 8-bit numbers
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


def bare_state_bytes(setup: Setup, trainable: int, element_bytes: int) -> int:
    """States of `trainable` parameters of unknown shapes, `element_bytes` each where they are not 8-bit."""
    optimizer = setup.training.optimizer
    if optimizer in EIGHT_BIT:
        numel = trainable + 4 * -(-trainable // _BLOCK_NUMEL)
        return 0 if optimizer == "paged-adamw-8bit" else _STATES[optimizer] * numel
    return _STATES[optimizer] * trainable * element_bytes


def optimizer_memory(
    setup: Setup, trained: Sequence[TrainedTensor], state_bytes: int | None
) -> OptimizerMemory:
    """The optimizer of the setup over its trained tensors.

    `state_bytes` is one state's element where the recipe says so (textbook), None: the weight's own.
    """
    optimizer = setup.training.optimizer
    if not states_are_known(setup):
        return OptimizerMemory(states_bytes=0, temporaries_bytes=0)
    tensors = list(_in_model_order(trained))
    if optimizer in EIGHT_BIT:
        embeddings = {t.name for t in setup.model.tensors if t.kind == "embedding"}
        return _eight_bits(optimizer, tensors, embeddings)
    if optimizer == "adafactor":
        return OptimizerMemory(
            states_bytes=packed_bytes(size for t in tensors for size in _factored(t.shape)),
            temporaries_bytes=_adafactor_temporaries(tensors),
        )
    sizes = [t.numel * (state_bytes or t.element_bytes) for t in tensors]
    temporaries = 0
    if optimizer == "adamw":  # adam.py, _multi_tensor_adam: exp_avg_sq_sqrt of all tensors at once
        temporaries = packed_bytes(sizes)
    elif optimizer == "adamw-single":
        temporaries = _single_adamw_temporaries(sizes)
    # adam.py, _init_group: fused keeps each tensor's step counter on the device
    counters = MIN_BLOCK_BYTES * len(sizes) if optimizer == "adamw-fused" else 0
    return OptimizerMemory(
        states_bytes=counters + packed_bytes([size for size in sizes for _ in range(_STATES[optimizer])]),
        temporaries_bytes=temporaries,
    )


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


def _eight_bits(
    optimizer: Optimizer, tensors: Iterable[TrainedTensor], embeddings: set[str]
) -> OptimizerMemory:
    """Optimizer1State and Optimizer2State, init_state; the update itself works in place.

    `embeddings` keep fp32 states, as HF Trainer asks for.
    """
    count, paged = _STATES[optimizer], 0
    sizes: list[int] = []
    maps = [_MAP_BYTES] * count
    for t in tensors:
        single = t.numel < _SMALL_NUMEL or (not t.added and t.name in embeddings)
        states = [4 * t.numel if single else t.numel] * count
        if not single:
            sizes += maps
            maps = []
        if optimizer == "paged-adamw-8bit" and t.numel >= _PAGED_NUMEL:
            paged += sum(states)
        else:
            sizes += states
        if not single:
            sizes += [4 * -(-t.numel // _BLOCK_NUMEL)] * count
    return OptimizerMemory(states_bytes=packed_bytes(sizes), temporaries_bytes=0, paged_bytes=paged)


def _in_model_order(trained: Sequence[TrainedTensor]) -> Iterator[TrainedTensor]:
    """Each tensor once, in the order of the model's parameters: layer after layer in its place."""
    for _, group in groupby(trained, key=lambda t: t.name.partition("*")[0] if t.layers else ""):
        by_layer: dict[int, list[TrainedTensor]] = {}
        for tensor in group:
            for layer in tensor.layers or (0,):
                by_layer.setdefault(layer, []).append(tensor)
        for layer in sorted(by_layer):
            yield from by_layer[layer]
