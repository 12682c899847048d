"""How a quantized model comes onto the card: request by request through the model of the allocator.

What stays of it depends on the blocks that its temporaries leave: a packed weight that takes over a block of
the weights it was packed from counts for up to 1 MiB more than it needs.
Source: transformers 5.23, core_model_loading.py (from 5.4 on one thread brings the weights, in the order of
their names, and quantizes each before the next comes) and modeling_utils.py (caching_allocator_warmup);
bitsandbytes 0.50, functional.py; peft 0.21, prepare_model_for_kbit_training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from planner.allocator import CachingAllocator
from planner.estimate.quantized import kept_sizes, quantized_tensors
from planner.methods import QLoRA, Quantization
from planner.model import Model, WeightTensor

__all__ = ["QuantizedLoad", "quantized_load"]

_FP32_BYTES = 4
_HALF_BYTES = 2
_SHARED_CODE_BYTES = 256 * _FP32_BYTES  # of the scales under nf4-double: once for all weights


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizedLoad:
    """Bytes that are allocated when the model is there and prepared, and what the worst moment had beside.

    `rests_bytes` are what is free in the segments that stay, for requests of more than 1 MiB; ascending.
    """

    allocated_bytes: int
    beside_bytes: int
    rests_bytes: tuple[int, ...]


def quantized_load(model: Model, method: QLoRA, precision: str) -> QuantizedLoad:
    """The load of `model` under the method's quantization; kept with the model."""
    key = (method.quantization, precision.startswith("fp16"))
    cache = model.__dict__.setdefault("_quantized_loads", {})
    if key not in cache:
        cache[key] = _load(model, *key)
    return cache[key]  # type: ignore[no-any-return]


def _load(model: Model, quantization: Quantization, keeps_wide: bool) -> QuantizedLoad:
    card = CachingAllocator()
    packed = {name for tensor in quantized_tensors(model) for name in tensor.names()}
    expected = 0
    for name, tensor in _weights(model):
        parts = 1 if quantization == "int8" else 2
        expected += tensor.numel // parts if name in packed else tensor.numel * _HALF_BYTES
    card.free(card.malloc(expected // 2 * 2))  # caching_allocator_warmup: one block for all that is to come
    if quantization == "nf4-double":
        card.malloc(_SHARED_CODE_BYTES)
    waiting: dict[str, int] = {}
    for name, tensor in sorted(_weights(model), key=lambda weight: _natural(weight[0])):
        if name in packed:
            _packed(card, tensor, quantization)
        elif not (tensor.wide and keeps_wide):
            waiting[name] = card.malloc(tensor.numel * _HALF_BYTES)
        else:
            card.malloc(tensor.numel * _FP32_BYTES)
    for name, tensor in _weights(model):
        if name in waiting:
            card.malloc(tensor.numel * _FP32_BYTES)
            card.free(waiting.pop(name))
    card.empty_cache()
    rests = [
        block.size_bytes
        for segment in card.segments()
        for block in segment.blocks
        if segment.pool == "large" and not block.allocated
    ]
    return QuantizedLoad(
        allocated_bytes=card.allocated_bytes,
        beside_bytes=card.peak_allocated_bytes - card.allocated_bytes,
        rests_bytes=tuple(sorted(rests)),
    )


def _packed(card: CachingAllocator, tensor: WeightTensor, quantization: Quantization) -> None:
    """One weight arrives, is packed beside itself, and goes."""
    given = [card.malloc(tensor.numel * _HALF_BYTES)]
    stays = kept_sizes(tensor, quantization)
    if quantization == "int8":
        given.append(card.malloc(tensor.numel * _HALF_BYTES))
        stays.reverse()  # scales first
    elif tensor.kind == "conv1d":
        given.append(card.malloc(tensor.numel * _HALF_BYTES))  # its transpose, contiguous
    if quantization == "nf4-double":
        numbers, code, blocks, *small = stays
        card.malloc(numbers)
        scales = [card.malloc(blocks * _FP32_BYTES)]
        card.malloc(code)
        scales.append(card.malloc(blocks * _FP32_BYTES))  # less their mean
        stays = [blocks, *small]
        given = [*given, *scales]
    for size_bytes in stays:
        card.malloc(size_bytes)
    for block in reversed(given):
        card.free(block)


def _weights(model: Model) -> Iterator[tuple[str, WeightTensor]]:
    """Every weight by its name, in the model's order: layer after layer; tied ones once."""
    tensors = [tensor for tensor in model.tensors if not tensor.tied_to]
    while tensors:
        place = tensors[0].name.partition("*")[0]
        block = []
        while tensors and tensors[0].layers and tensors[0].name.partition("*")[0] == place:
            block.append(tensors.pop(0))
        if not block:
            yield tensors[0].name, tensors.pop(0)
        for layer in sorted({layer for tensor in block for layer in tensor.layers}):
            for tensor in block:
                if layer in tensor.layers:
                    yield tensor.name.replace("*", str(layer)), tensor


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """core_model_loading.py, dot_natural_key: parts between dots, numbers by value."""
    parts = name.split(".")
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]
