"""What stays: weights, gradients and optimizer states, tensor by tensor as the allocator rounds them."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from planner.estimate.parameters import TrainedTensor, parameters, trained_tensors
from planner.estimate.quantized import tensor_sizes
from planner.estimate.recipes import RECIPES, state_bytes
from planner.report import Parameters
from planner.spec import PeftOfSize, QLoRA, Setup
from planner.units import MIB

__all__ = ["MIN_BLOCK_BYTES", "Resident", "block_bytes", "resident"]

# c10/core/AllocatorConfig.h and c10/cuda/CUDACachingAllocator.cpp
MIN_BLOCK_BYTES = 512  # kMinBlockSize: every request is rounded up to it
_LARGE_BYTES = 10 * MIB  # kMinLargeAlloc: from here on a request gets a segment of its own ...
_SEGMENT_BYTES = 2 * MIB  # kRoundLarge: ... rounded up to this
_SHARED_SEGMENT_BYTES = 20 * MIB  # kLargeBuffer: smaller ones share such a segment
_UNSPLIT_BYTES = MIB  # kSmallSize: a rest up to this is not split off and counts as allocated
_FUSED_STEP_BYTES = 512  # fused AdamW keeps each tensor's step counter on the device: torch/optim/adam.py


@dataclass(frozen=True, kw_only=True, slots=True)
class Resident:
    """Bytes that outlive a step, and the trained tensors they come from.

    `step_temporaries_bytes` live in the optimizer step: torch's foreach AdamW holds the square roots of
    all second moments at once (torch/optim/adam.py, `_multi_tensor_adam`: exp_avg_sq_sqrt); fused AdamW
    and SGD without momentum work in place.
    """

    parameters: Parameters
    trained: tuple[TrainedTensor, ...]
    base_weights_bytes: int
    adapter_weights_bytes: int
    gradients_bytes: int
    optimizer_states_bytes: int
    step_temporaries_bytes: int = 0


def block_bytes(size_bytes: int) -> int:
    """A request as the allocator counts it: rounded up to 512 bytes, a small rest of its segment included.

    Exact for a tensor in a new segment; one that takes over an old block may count up to 1 MiB more.
    """
    size = -(-size_bytes // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES
    if size >= _LARGE_BYTES and (rest := -size % _SEGMENT_BYTES) <= _UNSPLIT_BYTES:
        return size + rest
    return size


def packed_bytes(sizes: Iterable[int]) -> int:
    """What tensors allocated one after the other count for, the unsplit rests of their segments included.

    Requests of 1 to 10 MiB share segments of 20 MiB; each goes to the smallest free rest that holds it
    (best fit), and a rest of up to 1 MiB stays with it.
    """
    total = 0
    rests: list[int] = []  # free rests of segments, ascending
    for size_bytes in sizes:
        size = -(-size_bytes // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES
        if size > _UNSPLIT_BYTES:
            at = bisect_left(rests, size)
            if at < len(rests):
                rest = rests.pop(at) - size
            elif size >= _LARGE_BYTES:
                rest = -size % _SEGMENT_BYTES
            else:
                rest = _SHARED_SEGMENT_BYTES - size
            if rest > _UNSPLIT_BYTES:
                insort(rests, rest)
            else:
                size += rest
        total += size
    return total


def resident(setup: Setup) -> Resident:
    """Weights, gradients and states of the setup's recipe, tensor by tensor; kept with the model.

    A bare parameter count has no tensors: there the bytes are the textbook's products, unrounded.
    """
    training = setup.training
    cache = setup.model.__dict__.setdefault("_resident", {})
    key = (setup.method, training.precision, training.optimizer)
    found = cache.get(key)
    if found is None:
        found = cache[key] = _bare(setup) if setup.model.is_bare else _resident(setup)
    return found  # type: ignore[no-any-return]


def _resident(setup: Setup) -> Resident:
    recipe, optimizer = RECIPES[setup.training.precision], setup.training.optimizer
    trained = trained_tensors(setup)
    if isinstance(setup.method, QLoRA):
        kept = tensor_sizes(setup.model, setup.method)
        weights = [(size, layers) for sizes, layers in kept for size in sizes]
    else:
        weights = [(t.numel * recipe.base, t.layers) for t in setup.model.tensors if not t.tied_to]
    gradients = _in_order([(t.numel * t.element_bytes, t.layers) for t in trained])
    states = _in_order(
        [(t.numel * state_bytes(recipe, optimizer, t.element_bytes) // 2, t.layers) for t in trained]
    )
    counters = _FUSED_STEP_BYTES * len(states) if optimizer == "adamw-fused" else 0
    return Resident(
        parameters=parameters(setup),
        trained=trained,
        base_weights_bytes=packed_bytes(_in_order(weights)),
        adapter_weights_bytes=packed_bytes(
            _in_order([(t.numel * t.element_bytes, t.layers) for t in trained if t.added])
        ),
        gradients_bytes=packed_bytes(reversed(gradients)),
        optimizer_states_bytes=counters + packed_bytes([size for size in states for _ in range(2)]),
        step_temporaries_bytes=packed_bytes(states) if optimizer == "adamw" else 0,
    )


def _in_order(tensors: Sequence[tuple[int, tuple[int, ...]]]) -> list[int]:
    """Sizes in the order of the model: what is outside layers, then layer after layer."""
    sizes = [size for size, layers in tensors if not layers]
    by_layer: dict[int, list[int]] = {}
    for size, layers in tensors:
        for layer in layers:
            by_layer.setdefault(layer, []).append(size)
    for layer in sorted(by_layer):
        sizes += by_layer[layer]
    return sizes


def _bare(setup: Setup) -> Resident:
    recipe = RECIPES[setup.training.precision]
    counts = parameters(setup)
    base = setup.model.parameters
    added_element = recipe.adapter if isinstance(setup.method, PeftOfSize) else 0
    element = added_element or recipe.base
    return Resident(
        parameters=counts,
        trained=trained_tensors(setup),
        base_weights_bytes=base * recipe.base,
        adapter_weights_bytes=counts.added * added_element,
        gradients_bytes=counts.trainable * element,
        optimizer_states_bytes=counts.trainable * state_bytes(recipe, setup.training.optimizer, element),
    )
