"""What bitsandbytes keeps of a model for QLoRA: packed weights, their scales, and the rest in fp32.

Source: bitsandbytes 0.50, functional.py (quantize_4bit, quantize_blockwise) and nn/modules.py (Int8Params);
transformers 5.23, quantizers/base.py (get_keys_to_not_convert); peft 0.21, prepare_model_for_kbit_training.
"""

from __future__ import annotations

from dataclasses import replace

from planner.methods import Quantization
from planner.model import Model, WeightTensor

__all__ = ["is_quantized", "kept_sizes", "quantized_tensors"]

_BLOCK = 64  # numbers that share a scale
_SCALES_BLOCK = 256  # scales that share a scale, under nf4-double
_CODE_BYTES = 16 * 4  # the 16 values of nf4, kept with every weight
_SCALES_CODE_BYTES = 256 * 4  # the 256 values of the scales' own code, kept with every weight
_FP32_BYTES = 4
_KEPT = {"t5": "wo", "mt5": "wo", "umt5": "wo", "longt5": "wo"}  # their _keep_in_fp32_modules


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


def kept_sizes(tensor: WeightTensor, quantization: Quantization) -> list[int]:
    """Bytes of the tensors in which one packed weight is kept."""
    numbers = tensor.numel
    if quantization == "int8":
        return [numbers, tensor.out_features * _FP32_BYTES]
    packed, blocks = (numbers + 1) // 2, -(-numbers // _BLOCK)
    if quantization == "nf4":
        return [packed, blocks * _FP32_BYTES, _CODE_BYTES]
    scales = -(-blocks // _SCALES_BLOCK) * _FP32_BYTES
    return [packed, _CODE_BYTES, blocks, scales, _SCALES_CODE_BYTES, _FP32_BYTES]
