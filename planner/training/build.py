"""Build the model of a setup on any device, with random weights; nothing is downloaded."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn

from planner.errors import ModelError
from planner.model import Model
from planner.training.recipe import weight_dtype

__all__ = ["built_model", "materialized", "skeleton"]

_AUTO_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
}


def skeleton(model: Model, *, dtype: torch.dtype, eager: bool = False) -> nn.Module:
    """transformers' own class for the model, on the `meta` device, in training mode.

    Remote code is never run. Raises ModelError with transformers' reason where it cannot be built.
    """
    if model.is_bare:
        raise ModelError(
            f"{model.id} is only a number of parameters; give a model's id or config.json to run its step."
        )
    values = model.config
    values.pop("auto_map", None)
    try:
        config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
        config.use_cache = False  # as HF Trainer runs it: TrainingArguments.use_cache is False
        factory = getattr(transformers, _AUTO_CLASSES[model.task])
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            net = factory.from_config(
                config,
                dtype=dtype,
                attn_implementation="eager" if eager else "sdpa",
                trust_remote_code=False,
            )
    except (ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"transformers cannot build {model.id}: {reason}") from error
    net.train()
    return net  # type: ignore[no-any-return]


def materialized(net: nn.Module, device: torch.device) -> nn.Module:
    """Give every parameter and buffer storage on `device`, in the order of `nn.Module.to`.

    Children come before a module's own tensors; tied weights stay tied and are allocated once.
    Values are uninitialised until `initialize_weights` is called.
    """
    moved: dict[torch.Tensor, torch.Tensor] = {}
    for module in _children_first(net):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in moved:
                moved[parameter] = nn.Parameter(
                    torch.empty_like(parameter, device=device), requires_grad=parameter.requires_grad
                )
            module.register_parameter(name, moved[parameter])  # type: ignore[arg-type]
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer not in moved:
                moved[buffer] = torch.empty_like(buffer, device=device)
            persistent = name not in module._non_persistent_buffers_set
            module.register_buffer(name, moved[buffer], persistent=persistent)
            if hasattr(module, "original_" + name):  # rotary embeddings keep a second reference
                setattr(module, "original_" + name, moved[buffer])
    return net


def built_model(model: Model, *, precision: str, attention: str, device: torch.device) -> nn.Module:
    """The model on `device` with random weights in the recipe's dtype."""
    net = skeleton(model, dtype=weight_dtype(precision), eager=attention == "eager")
    materialized(net, device)
    if device.type != "meta":
        _initialized(net)
    return net


def _initialized(net: Any) -> None:
    """Random values by the model's own rule: transformers' `_init_weights`."""
    for module in net.modules():
        module._is_hf_initialized = False
    for tensor in (*net.parameters(), *net.buffers()):
        tensor._is_hf_initialized = False
    net.initialize_weights()


def _children_first(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield from _children_first(child)
    yield module
