"""Build the model of a setup on any device, with random weights; nothing is downloaded."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from typing import Any

import torch
import transformers
from torch import nn

from planner.errors import ModelError
from planner.model import Model
from planner.spec import Training

__all__ = ["brought", "checkpoints_layers", "initialized", "loaded", "skeleton"]

_AUTO_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
}


def skeleton(model: Model, *, dtype: torch.dtype, attention: str = "sdpa") -> nn.Module:
    """transformers' own class for the model, on the `meta` device, in training mode.

    `attention` is transformers' name of an implementation. Remote code is never run. Raises ModelError with
    transformers' reason where it cannot be built.
    """
    if model.is_bare:
        raise ModelError(
            f"{model.id} is only a number of parameters; give a model's id or config.json to run its step."
        )
    try:
        config = _config(model)
        factory = getattr(transformers, _AUTO_CLASSES[model.task])
        fused = factory._model_mapping[type(config)]._supports_sdpa
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            net = factory.from_config(
                config,
                dtype=dtype,
                attn_implementation=attention if fused else "eager",
                trust_remote_code=False,
            )
    except (ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"transformers cannot build {model.id}: {reason}") from error
    _keep_wide(net, dtype)
    net.train()
    return net  # type: ignore[no-any-return]


def _keep_wide(net: Any, dtype: torch.dtype) -> None:
    """fp32 for the parameters that `from_pretrained` keeps so, as in T5; `from_config` does not.

    transformers 5.23, core_model_loading.py: the patterns of the class are searched in a parameter's name.
    """
    kept = net._get_dtype_plan(dtype)
    pattern = re.compile("|".join(kept))
    for name, parameter in net.named_parameters():
        if kept and pattern.search(name):
            parameter.data = parameter.data.to(torch.float32)


def _config(model: Model) -> Any:
    """transformers' config object, without code from the hub and without the generation cache."""
    values = model.config
    values.pop("auto_map", None)
    config: Any = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    config.use_cache = False  # as HF Trainer runs it: TrainingArguments.use_cache is False
    if model.task == "seq2seq-lm" and getattr(config, "decoder_start_token_id", None) is None:
        padding = getattr(config, "pad_token_id", None)  # models that hear have none
        config.decoder_start_token_id = padding or 0  # T5's own config.json says 0
    return config


def checkpoints_layers(net: Any, training: Training) -> None:
    """Turn on activation checkpointing of the layers that are asked for, non-reentrant.

    transformers 5.23, modeling_utils.py: the name of before, `gradient_checkpointing_enable`, warns.
    """
    enable = getattr(net, "activation_checkpointing_enable", net.gradient_checkpointing_enable)
    enable(
        {"use_reentrant": False},
        every_n_layers=training.checkpoint_every,
        offload=training.checkpoint_offload,
    )


def loaded(net: nn.Module, device: torch.device) -> nn.Module:
    """A skeleton brought to `device` with random weights, tensor by tensor as `nn.Module.to` moves one.

    Modules come in order, a module's parameters before its buffers; tied weights are allocated once and stay
    tied. This is the order of HF Trainer, which loads on the CPU and moves the model; loading with a
    `device_map` takes one large block first (transformers' caching_allocator_warmup) and reserves otherwise.
    """
    brought(net.modules(), device)
    if device.type != "meta":
        _initialized(net)
    return net


def brought(modules: Iterable[nn.Module], device: torch.device) -> None:
    """Give these modules tensors of their own on `device`, without values; what is tied stays tied."""
    moved: dict[int, torch.Tensor] = {}
    for module in modules:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in moved:
                    storage = torch.empty_like(parameter, device=device, requires_grad=False)
                    moved[id(parameter)] = nn.Parameter(storage, requires_grad=parameter.requires_grad)
                module._parameters[name] = moved[id(parameter)]  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                if id(buffer) not in moved:
                    moved[id(buffer)] = torch.empty_like(buffer, device=device)
                module._buffers[name] = moved[id(buffer)]
        for name, value in list(vars(module).items()):  # rotary embeddings keep a second reference
            if isinstance(value, torch.Tensor) and id(value) in moved:
                vars(module)[name] = moved[id(value)]


def initialized(net: Any, modules: Iterable[nn.Module]) -> None:
    """Random values for some of a model's modules: the model's own rule, N(0, 0.02) where it has none."""
    model = net.get_base_model() if hasattr(net, "get_base_model") else net
    for module in modules:
        module._is_hf_initialized = False  # type: ignore[assignment]
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            tensor._is_hf_initialized = False  # type: ignore[attr-defined]
        with torch.no_grad():
            for parameter in module.parameters(recurse=False):
                parameter.normal_(std=0.02)
            model._initialize_weights(module)


def _initialized(net: Any) -> None:
    """Random values by the model's own rule: transformers' `_init_weights`."""
    for module in net.modules():
        module._is_hf_initialized = False
    for tensor in (*net.parameters(), *net.buffers()):
        tensor._is_hf_initialized = False
    net.initialize_weights()
