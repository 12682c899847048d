"""Put a PEFT method on a model in place, switch it off for a while, merge it, count what it trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from planner.errors import SetupError
from planner.training.peft.adapter import BottleneckAdapter, attach_adapters
from planner.training.peft.bitfit import attach_bitfit
from planner.training.peft.lora import LoRALayer, attach_lora
from planner.training.peft.methods import AdapterSettings, LoRASettings, MethodSettings

__all__ = [
    "attach",
    "disabled",
    "merge",
    "merge_and_unload",
    "trainable_count",
    "trainable_parameters",
    "unmerge",
]


def attach(model: nn.Module, settings: MethodSettings) -> nn.Module:
    """Freeze the model and add the method in place; the same model is returned.

    Any device, `meta` included; new tensors lie beside the weights they adapt. Raises SetupError, with
    the model unchanged, where the settings do not fit it or it has a method already.
    """
    if any(isinstance(module, (LoRALayer, BottleneckAdapter)) for module in model.modules()):
        raise SetupError(f"this {type(model).__name__} has a PEFT method already; attach to a fresh model.")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        if isinstance(settings, LoRASettings):
            attach_lora(model, settings)
        elif isinstance(settings, AdapterSettings):
            attach_adapters(model, settings)
        else:
            attach_bitfit(model)
    except SetupError:
        for parameter in trained:
            parameter.requires_grad_(True)
        raise
    return model


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name; a tied one once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def trainable_count(model: nn.Module) -> int:
    """How many elements are trained, as peft's `get_nb_trainable_parameters` counts them."""
    return sum(parameter.numel() for parameter in trainable_parameters(model).values())


def merge(model: nn.Module) -> None:
    """Merge every LoRA layer; see LoRALayer.merge. Safe to call twice."""
    for layer in _lora_layers(model).values():
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Restore every original weight bit for bit. Safe to call twice."""
    for layer in _lora_layers(model).values():
        layer.unmerge()


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The base model for the length of a `with` block, merged layers included.

    Trained biases (BitFit, `lora_bias`) have no copy of their old values and stay as they are.
    """
    parts = [part for part in model.modules() if isinstance(part, (LoRALayer, BottleneckAdapter))]
    before = [part.enabled for part in parts]
    merged = [part for part in parts if isinstance(part, LoRALayer) and part.merged]
    for layer in merged:
        layer.unmerge()
    for part in parts:
        part.enabled = False
    try:
        yield
    finally:
        for part, enabled in zip(parts, before, strict=True):
            part.enabled = enabled
        for layer in merged:
            layer.merge()


@torch.no_grad()
def merge_and_unload(model: nn.Module) -> nn.Module:
    """The plain model with LoRA's updates in its weights, all frozen; safe to call twice.

    Layer by layer, so that one more weight at most is alive. A merged embedding or head that was tied is
    no longer: the config says so then. BitFit's biases are the model's already. Raises SetupError for
    bottleneck adapters, which no weight can absorb.
    """
    if any(isinstance(module, BottleneckAdapter) for module in model.modules()):
        raise SetupError("bottleneck adapters are not linear and cannot be merged; keep them, or use lora.")
    layers = _lora_layers(model)
    ends = _tied_ends(model)
    for name, layer in layers.items():
        layer.merge(keep_original=False)
        model.set_submodule(name, layer.base_layer)
    if any(layer is end for layer in layers.values() for end in ends):
        model.config.tie_word_embeddings = False  # type: ignore[union-attr]
    model.requires_grad_(False)
    return model


def _lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALayer)}


def _tied_ends(model: nn.Module) -> list[nn.Module]:
    """Input embedding and output head of a transformers model that ties them."""
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return []
    return [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[operator]
