"""A model under bitsandbytes' quantization, as transformers loads it and peft prepares it for QLoRA.

Read off transformers 5.23 (quantizers/quantizer_bnb_4bit.py, integrations/bitsandbytes.py), peft 0.21
(utils/other.py, prepare_model_for_kbit_training) and bitsandbytes 0.50 (nn/modules.py, functional.py).
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import peft
import torch
from torch import nn
from transformers import BitsAndBytesConfig

from planner.errors import SetupError
from planner.spec import QLoRA

__all__ = ["load_quantized", "parameter_count", "prepare", "quantizable"]

_STD = 0.02  # random weights of a measured run; no number of bytes depends on them


def quantizable(net: nn.Module, method: QLoRA, dtype: torch.dtype) -> nn.Module:
    """The skeleton with its linear layers exchanged for bitsandbytes', all but the head and tied ones.

    Layers are exchanged by transformers itself; fused experts are no linear layers and stay as they are.
    Raises SetupError where bitsandbytes is not installed or nothing would be quantized.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise SetupError(
            "method qlora needs bitsandbytes, which is not installed; "
            "install it with: pip install -r requirements-qlora.txt"
        )
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import HfQuantizer

    model: Any = net
    config = _config(method, dtype)
    kept = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    replace_with_bnb_linear(model, modules_to_not_convert=kept, quantization_config=config)
    if not any(True for _ in _quantized_linears(net)):
        raise SetupError("method qlora finds no linear layer to quantize in this model; choose lora.")
    for module in _quantized_linears(net):
        if module.bias is not None:
            bias = torch.empty_like(module.bias, dtype=dtype)
            module.bias = nn.Parameter(bias, requires_grad=False)
    four_bit = method.quantization != "int8"
    model.is_loaded_in_4bit, model.is_loaded_in_8bit, model.is_quantized = four_bit, not four_bit, True
    return net


def _config(method: QLoRA, dtype: torch.dtype) -> Any:
    if method.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=method.quantization == "nf4-double",
    )


def load_quantized(
    net: nn.Module, device: torch.device, dtype: torch.dtype, arrived: Callable[[], None] = lambda: None
) -> nn.Module:
    """The skeleton on `device`, every weight brought there in `dtype` and quantized before the next comes.

    In the order of a checkpoint (names, numbers by value), after one block of the expected size was taken
    and freed (caching_allocator_warmup). `arrived` is called when a weight is there, before it is quantized.
    transformers before 5.4 brings weights in several threads: planner.simulate.arrivals.
    """
    from bitsandbytes import functional

    _warm_up(net, device, dtype)
    maps = {} if device.type == "meta" else functional.name2qmap
    moved: dict[int, nn.Parameter] = {}
    with mock.patch.object(functional, "name2qmap", maps):
        for name, parameter in sorted(net.named_parameters(), key=lambda pair: _natural(pair[0])):
            module = net.get_submodule(name.rpartition(".")[0])
            if parameter is module._parameters.get("weight") and _is_quantized(module):
                _quantize(module, device, dtype, arrived)
            else:
                storage = torch.empty_like(parameter, device=device, requires_grad=False)
                arrived()
                moved[id(parameter)] = nn.Parameter(storage, requires_grad=parameter.requires_grad)
    net._shared_maps = maps  # type: ignore[assignment]  # bitsandbytes keeps its code for the absmax for good
    _exchange(net, moved, device)
    if device.type != "meta":
        _fill(net)
    return net


def prepare(net: nn.Module, *, activation_checkpointing: bool) -> nn.Module:
    """peft's prepare_model_for_kbit_training: all is frozen, and what is not quantized becomes fp32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = peft.prepare_model_for_kbit_training(
            net, use_gradient_checkpointing=activation_checkpointing, auto_clear_cache=False
        )
    torch.cuda.empty_cache()  # what auto_clear_cache does where CUDA is there
    return prepared  # type: ignore[no-any-return]


def parameter_count(parameter: nn.Parameter) -> int:
    """Numbers that a parameter stands for; a packed one holds two in each byte (peft counts so too)."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(torch.Size(state.shape).numel())


def _quantized_linears(net: nn.Module) -> Iterator[Any]:
    return (module for module in net.modules() if _is_quantized(module))


def _is_quantized(module: nn.Module) -> bool:
    return type(module).__name__ in ("Linear4bit", "Linear8bitLt")


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """core_model_loading.py, dot_natural_key: parts between dots, numbers by value."""
    parts = name.split(".")
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]


def _warm_up(net: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """One block of the model's expected size, taken and given back (param_element_size of the quantizers)."""
    size_bytes = 0
    for name, parameter in net.named_parameters():
        module = net.get_submodule(name.rpartition(".")[0])
        packed = name.endswith(".weight") and _is_quantized(module)
        if packed and type(module).__name__ == "Linear4bit":
            size_bytes += parameter.numel() // 2
        else:
            size_bytes += parameter.numel() * (1 if packed else dtype.itemsize)
    torch.empty(size_bytes // 2, dtype=torch.float16, device=device)


def _quantize(module: Any, device: torch.device, dtype: torch.dtype, arrived: Callable[[], None]) -> None:
    from bitsandbytes import functional
    from bitsandbytes.nn import modules as layers

    old, turned = module.weight, module.source_cls is not nn.Linear
    shape = tuple(reversed(old.shape)) if turned else old.shape  # transformers' Conv1D holds [in, out]
    weight = torch.empty(shape, dtype=dtype, device=device)
    arrived()
    if device.type != "meta":
        nn.init.normal_(weight, std=_STD)
    given = weight.T if turned else weight
    if type(module).__name__ == "Linear8bitLt":
        # Bnb8bitQuantize: over the host to Int8Params, which brings it into a second block beside the first
        codes, scales, _ = functional.int8_vectorwise_quant(
            given.to(torch.float16, copy=True, memory_format=torch.contiguous_format)
        )
        module.weight = layers.Int8Params(codes, requires_grad=False, CB=codes, SCB=scales)
        return
    packed, state = functional.quantize_4bit(
        given.contiguous(),
        blocksize=old.blocksize,
        compress_statistics=old.compress_statistics,
        quant_type=old.quant_type,
        quant_storage=old.quant_storage,
    )
    module.weight = layers.Params4bit(
        packed,
        requires_grad=False,
        quant_state=state,
        blocksize=old.blocksize,
        compress_statistics=old.compress_statistics,
        quant_type=old.quant_type,
        quant_storage=old.quant_storage,
        module=module,
        bnb_quantized=True,
    )
    module.quant_state = state


def _exchange(net: nn.Module, moved: dict[int, nn.Parameter], device: torch.device) -> None:
    """Put the moved parameters in their places, tied ones in all of them, and bring the buffers."""
    buffers: dict[int, torch.Tensor] = {}
    for module in net.modules():
        for name, parameter in module._parameters.items():
            if id(parameter) in moved:
                module._parameters[name] = moved[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                if id(buffer) not in buffers:
                    buffers[id(buffer)] = torch.empty_like(buffer, device=device)
                module._buffers[name] = buffers[id(buffer)]
        for name, value in list(vars(module).items()):  # rotary embeddings keep a second reference
            if isinstance(value, torch.Tensor) and id(value) in buffers:
                vars(module)[name] = buffers[id(value)]


def _fill(net: Any) -> None:
    """Random values by transformers' own rule for all that is not quantized."""
    for module in net.modules():
        module._is_hf_initialized = _is_quantized(module)
        if module._is_hf_initialized and module.bias is not None:
            nn.init.zeros_(module.bias)
    net.initialize_weights()
