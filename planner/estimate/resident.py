"""What stays: weights, gradients and optimizer states, tensor by tensor as the allocator rounds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from planner.estimate.optimizers import bare_memory, optimizer_memory
from planner.estimate.parameters import TrainedTensor, parameters, trained_tensors
from planner.estimate.quantized_load import quantized_load
from planner.estimate.recipes import recipe_of
from planner.estimate.rounding import block_bytes, packed_bytes
from planner.report import Parameters
from planner.spec import PeftOfSize, QLoRA, Setup

__all__ = ["Resident", "block_bytes", "packed_bytes", "resident"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Resident:
    """Bytes that outlive a step, and the trained tensors they come from.

    `step_temporaries_bytes` live in the optimizer step; `paged_bytes` are states in managed memory, which
    torch does not count. `load_beside_bytes` are there beside the weights while they are loaded.
    """

    parameters: Parameters
    trained: tuple[TrainedTensor, ...]
    base_weights_bytes: int
    adapter_weights_bytes: int
    gradients_bytes: int
    optimizer_states_bytes: int
    step_temporaries_bytes: int = 0
    paged_bytes: int = 0
    load_beside_bytes: int = 0


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
    training, recipe = setup.training, recipe_of(setup)
    trained = trained_tensors(setup)
    if isinstance(setup.method, QLoRA):
        load = quantized_load(setup.model, setup.method, training.precision)
        base, beside, rests = load.allocated_bytes, load.beside_bytes, load.rests_bytes
    else:
        weights = [(t.numel * recipe.weight_bytes(t), t.layers) for t in setup.model.tensors if not t.tied_to]
        base, beside, rests = packed_bytes(_in_order(weights)), 0, ()
    gradients = _in_order([(t.numel * t.element_bytes, t.layers) for t in trained])
    optimizer = optimizer_memory(setup, trained, recipe.state)
    return Resident(
        parameters=parameters(setup),
        trained=trained,
        base_weights_bytes=base,
        adapter_weights_bytes=packed_bytes(
            _in_order([(t.numel * t.element_bytes, t.layers) for t in trained if t.added]), rests
        ),
        gradients_bytes=packed_bytes(reversed(gradients)),
        optimizer_states_bytes=optimizer.states_bytes,
        step_temporaries_bytes=optimizer.temporaries_bytes,
        paged_bytes=optimizer.paged_bytes,
        load_beside_bytes=beside,
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
    recipe = recipe_of(setup)
    counts = parameters(setup)
    base = setup.model.parameters
    added_element = recipe.adapter if isinstance(setup.method, PeftOfSize) else 0
    element = added_element or recipe.base
    optimizer = bare_memory(setup, counts.trainable, recipe.state or element)
    return Resident(
        parameters=counts,
        trained=trained_tensors(setup),
        base_weights_bytes=base * recipe.base,
        adapter_weights_bytes=counts.added * added_element,
        gradients_bytes=counts.trainable * element,
        optimizer_states_bytes=optimizer.states_bytes,
        paged_bytes=optimizer.paged_bytes,
    )
