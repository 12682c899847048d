"""What stays: weights, gradients and optimizer states, tensor by tensor as the allocator rounds them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from planner.estimate.parameters import TrainedTensor, parameters, trained_tensors
from planner.estimate.recipes import RECIPES, state_bytes
from planner.report import Parameters
from planner.spec import PeftOfSize, Setup
from planner.units import MIB

__all__ = ["MIN_BLOCK_BYTES", "Resident", "block_bytes", "resident"]

# c10/core/AllocatorConfig.h and c10/cuda/CUDACachingAllocator.cpp
MIN_BLOCK_BYTES = 512  # kMinBlockSize: every request is rounded up to it
_LARGE_BYTES = 10 * MIB  # kMinLargeAlloc: from here on a request gets a segment of its own ...
_SEGMENT_BYTES = 2 * MIB  # kRoundLarge: ... rounded up to this
_UNSPLIT_BYTES = MIB  # kSmallSize: a rest up to this is not split off and counts as allocated
_FUSED_STEP_BYTES = 512  # fused AdamW keeps each tensor's step counter on the device: torch/optim/adam.py


@dataclass(frozen=True, kw_only=True, slots=True)
class Resident:
    """Bytes that outlive a step, and the trained tensors they come from."""

    parameters: Parameters
    trained: tuple[TrainedTensor, ...]
    base_weights_bytes: int
    adapter_weights_bytes: int
    gradients_bytes: int
    optimizer_states_bytes: int


def block_bytes(size_bytes: int) -> int:
    """A request as the allocator counts it: rounded up to 512 bytes, a small rest of its segment included.

    Exact for a tensor in a new segment; one that takes over an old block may count up to 1 MiB more.
    """
    size = -(-size_bytes // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES
    if size >= _LARGE_BYTES and (rest := -size % _SEGMENT_BYTES) <= _UNSPLIT_BYTES:
        return size + rest
    return size


def resident(setup: Setup) -> Resident:
    """Weights, gradients and states of the setup's recipe, each tensor rounded to 512 bytes.

    A bare parameter count has no tensors: there the bytes are the textbook's products, unrounded.
    """
    recipe = RECIPES[setup.training.precision]
    trained = trained_tensors(setup)
    counts = parameters(setup)
    if setup.model.is_bare:
        return _bare(setup, counts, trained)
    optimizer = setup.training.optimizer
    return Resident(
        parameters=counts,
        trained=trained,
        base_weights_bytes=sum(
            block_bytes(t.numel * recipe.base) * t.count for t in setup.model.tensors if not t.tied_to
        ),
        adapter_weights_bytes=_weights(t for t in trained if t.added),
        gradients_bytes=_weights(trained),
        optimizer_states_bytes=sum(
            _states(t, state_bytes(recipe, optimizer, t.element_bytes), optimizer) for t in trained
        ),
    )


def _weights(tensors: Iterable[TrainedTensor]) -> int:
    return sum(block_bytes(t.numel * t.element_bytes) * t.count for t in tensors)


def _states(tensor: TrainedTensor, element_bytes: int, optimizer: str) -> int:
    """AdamW's two states, each a tensor of its own."""
    step = _FUSED_STEP_BYTES if optimizer == "adamw-fused" else 0
    return (2 * block_bytes(tensor.numel * (element_bytes // 2)) + step) * tensor.count


def _bare(setup: Setup, counts: Parameters, trained: tuple[TrainedTensor, ...]) -> Resident:
    recipe = RECIPES[setup.training.precision]
    base = setup.model.parameters
    added_element = recipe.adapter if isinstance(setup.method, PeftOfSize) else 0
    element = added_element or recipe.base
    return Resident(
        parameters=counts,
        trained=trained,
        base_weights_bytes=base * recipe.base,
        adapter_weights_bytes=counts.added * added_element,
        gradients_bytes=counts.trainable * element,
        optimizer_states_bytes=counts.trainable * state_bytes(recipe, setup.training.optimizer, element),
    )
