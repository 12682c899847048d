"""What a PEFT method is told: frozen settings, validated where they enter."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch

from planner.catalog.outputs import OUTPUTS
from planner.errors import SetupError
from planner.model import Model
from planner.spec import Adapter, BitFit, LoRA

__all__ = ["ACTIVATIONS", "AdapterSettings", "BitFitSettings", "LoRASettings", "MethodSettings", "settings"]

ACTIVATIONS = ("relu", "gelu", "silu", "tanh")
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class LoRASettings:
    """y = W x + (alpha / r) B A x on every module of `target_modules` (Hu et al. 2021, section 4.1).

    Names or suffixes as in peft, or one preset, `("attention",)` or `("all-linear",)`. `lora_bias`
    trains no bias, `all`, or those of the targets (`lora_only`). `adapter_dtype` None is fp32 over a
    16-bit base, as peft's `autocast_adapter_dtype=True`. Raises SetupError.
    """

    lora_rank: int
    lora_alpha: float
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] = ("attention",)
    lora_bias: str = "none"
    adapter_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        """Refuse what no model could take."""
        _whole("lora_rank", self.lora_rank)
        _finite("lora_alpha", self.lora_alpha)
        if self.lora_alpha <= 0:
            raise SetupError(f"lora_alpha must be a number above 0, got {self.lora_alpha!r}.")
        _finite("lora_dropout", self.lora_dropout)
        if not 0 <= self.lora_dropout < 1:
            raise SetupError(f"lora_dropout must be a number from 0 and below 1, got {self.lora_dropout!r}.")
        _names("target_modules", self.target_modules)
        _choice("lora_bias", self.lora_bias, ("none", "all", "lora_only"))
        _float_dtype(self.adapter_dtype)


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """Bottleneck adapters h -> m -> h after the modules whose names end in the given outputs.

    `houlsby`: after attention and after the MLP (Houlsby et al. 2019, figure 2); `pfeiffer`: after the
    MLP only (Pfeiffer et al. 2020). `planner.catalog.outputs.OUTPUTS` has the names of many model
    types. `adapter_dtype` as for LoRA. Raises SetupError.
    """

    adapter_kind: str
    adapter_size: int
    attention_outputs: tuple[str, ...]
    mlp_outputs: tuple[str, ...]
    activation: str = "relu"
    adapter_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        """Refuse what no model could take."""
        _choice("adapter_kind", self.adapter_kind, ("houlsby", "pfeiffer"))
        _whole("adapter_size", self.adapter_size)
        _names("attention_outputs", self.attention_outputs, empty_allowed=self.adapter_kind == "pfeiffer")
        _names("mlp_outputs", self.mlp_outputs)
        _choice("activation", self.activation, ACTIVATIONS)
        _float_dtype(self.adapter_dtype)


@dataclass(frozen=True, kw_only=True)
class BitFitSettings:
    """Only the bias terms are trained (Ben Zaken et al. 2021)."""


MethodSettings = LoRASettings | AdapterSettings | BitFitSettings


def settings(model: Model, method: LoRA | Adapter | BitFit) -> MethodSettings:
    """A setup's method in the terms of these modules; an adapter's size and places follow from the model.

    Raises SetupError for adapters in a model whose layers are not known.
    """
    if isinstance(method, BitFit):
        return BitFitSettings()
    if isinstance(method, LoRA):
        return LoRASettings(
            lora_rank=method.lora_rank,
            lora_alpha=method.alpha,
            lora_dropout=method.lora_dropout,
            target_modules=method.target_modules,
            lora_bias=method.lora_bias,
        )
    shape = model.architecture
    if shape is None:
        raise SetupError(f"where adapters go in {model.id} is not known; choose lora, bitfit or full.")
    attention, mlp = OUTPUTS.get(shape.family, ((shape.attention_output,), (shape.mlp_output,)))
    return AdapterSettings(
        adapter_kind=method.adapter_kind,
        adapter_size=method.bottleneck(shape.hidden_size),
        attention_outputs=attention,
        mlp_outputs=mlp,
    )


def _whole(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SetupError(f"{name} must be a whole number of at least 1, got {value!r}.")


def _finite(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise SetupError(f"{name} must be a finite number, got {value!r}.")


def _choice(name: str, value: Any, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise SetupError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")


def _names(name: str, value: Any, *, empty_allowed: bool = False) -> None:
    if not isinstance(value, tuple) or not all(isinstance(part, str) and part for part in value):
        raise SetupError(f"{name} must be a tuple of module names, got {value!r}.")
    if not value and not empty_allowed:
        raise SetupError(f"{name} is empty; name at least one module.")


def _float_dtype(value: Any) -> None:
    if value is not None and value not in _FLOATS:
        raise SetupError(
            f"adapter_dtype must be one of {', '.join(str(d) for d in _FLOATS)} or None, got {value!r}."
        )
