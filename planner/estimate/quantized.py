"""What bitsandbytes keeps of a model for QLoRA: packed weights, their scales, and the rest in fp32.

Source: bitsandbytes 0.50, functional.py (quantize_4bit, quantize_blockwise) and nn/modules.py (Int8Params);
transformers 5.23, quantizers/base.py (get_keys_to_not_convert); peft 0.21, prepare_model_for_kbit_training.
"""

from __future__ import annotations

from dataclasses import replace

from planner.estimate.rounding import block_bytes
from planner.methods import QLoRA, Quantization
from planner.model import Model, WeightTensor

__all__ = ["is_quantized", "load_beside_bytes", "quantized_tensors", "tensor_sizes"]

_BLOCK = 64  # numbers that share a scale
_SCALES_BLOCK = 256  # scales that share a scale, under nf4-double
_CODE_BYTES = 16 * 4  # the 16 values of nf4, kept with every weight
_SCALES_CODE_BYTES = 256 * 4  # the 256 values of the scales' own code, kept with every weight
_FP32_BYTES = 4
_HALF_BYTES = 2  # as everything arrives
_KEPT = {"t5": "wo", "mt5": "wo", "umt5": "wo", "longt5": "wo"}  # their _keep_in_fp32_modules


def tensor_sizes(model: Model, method: QLoRA) -> list[tuple[list[int], tuple[int, ...]]]:
    """For each weight of the model the bytes of the tensors it is kept in, and its layers; tied ones once."""
    quantized = {t.name: t.layers for t in quantized_tensors(model)}
    answer: list[tuple[list[int], tuple[int, ...]]] = []
    for t in model.tensors:
        if t.tied_to:
            continue
        layers = quantized.get(t.name)
        if layers is not None:
            answer.append((_sizes(t, method.quantization), layers))
        if layers is None or layers != t.layers:
            rest = tuple([layer for layer in t.layers if layer not in (layers or ())])
            answer.append(([t.numel * _FP32_BYTES], rest))
    return answer


def load_beside_bytes(model: Model, method: QLoRA) -> int:
    """What the worst moment of loading needs beyond what stays.

    Everything arrives in 16 bits. Then peft makes what is not quantized fp32, tensor by tensor in the model's
    order: one is there in both, those behind it in 16 bits alone. Before that the last weights are quantized,
    under int8 from a second copy, while all others wait in 16 bits.
    """
    quantized = {t.name: t for t in quantized_tensors(model)}
    wide: list[int] = []  # numbers of each tensor that is made fp32, in the model's order
    for t in model.tensors:
        held = quantized.get(t.name)
        count = (len(t.layers) or 1) - (len(held.layers) or 1 if held else 0)
        wide += [] if t.tied_to else [t.numel] * count
    beside = behind = 0
    for numbers in reversed(wide):
        beside = max(beside, block_bytes(numbers * _HALF_BYTES) - behind)
        behind += block_bytes(numbers * _FP32_BYTES) - block_bytes(numbers * _HALF_BYTES)
    copies = 2 if method.quantization == "int8" else 1
    largest = max((t.numel for t in quantized.values()), default=0)
    return max(beside, block_bytes(largest * _HALF_BYTES) * copies - behind)


def quantized_tensors(model: Model) -> list[WeightTensor]:
    """The weights that bitsandbytes holds, each with the layers in which it does.

    transformers keeps the model's last parameter as it is, meaning the output's; in OLMo, whose head is
    tied and whose norms have no weights, that is a linear layer (get_keys_to_not_convert).
    """
    found = [t for t in model.tensors if is_quantized(model, t)]
    if found and found[-1] is [t for t in model.tensors if not t.tied_to][-1]:
        found[-1] = replace(found[-1], layers=found[-1].layers[:-1])
    return found


def is_quantized(model: Model, tensor: WeightTensor) -> bool:
    """Whether bitsandbytes holds this weight, in most layers: every linear layer's but the output's."""
    if tensor.kind not in ("linear", "conv1d") or tensor.leaf != "weight" or tensor.tied_to:
        return False
    if tensor.module.rpartition(".")[2] == _KEPT.get(str(model.config.get("model_type"))):
        return False
    head = [t for t in model.linear_weights if t.role == "head"][-1:]
    return tensor not in head


def _sizes(tensor: WeightTensor, quantization: Quantization) -> list[int]:
    numbers = tensor.numel
    if quantization == "int8":
        return [numbers, tensor.out_features * _FP32_BYTES]
    packed, blocks = (numbers + 1) // 2, -(-numbers // _BLOCK)
    if quantization == "nf4":
        return [packed, blocks * _FP32_BYTES, _CODE_BYTES]
    scales = -(-blocks // _SCALES_BLOCK) * _FP32_BYTES
    return [packed, _CODE_BYTES, blocks, scales, _SCALES_CODE_BYTES, _FP32_BYTES]
