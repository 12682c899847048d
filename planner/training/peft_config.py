"""Any method of the peft library, from its adapter_config.json."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import peft
from torch import nn

from planner.errors import SetupError, nearest
from planner.methods import PeftConfig
from planner.model import Model

__all__ = ["with_peft_config"]

_MADE_FOR_LOADING = ("inference_mode", "auto_mapping", "base_model_name_or_path", "revision", "peft_version")


def with_peft_config(net: nn.Module, model: Model, method: PeftConfig, *, task: str | None) -> nn.Module:
    """The model with peft's method attached for training.

    Unknown keys of a newer peft are refused by name. Raises SetupError with peft's reason.
    """
    config = _config(method, task)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted: Any = peft.get_peft_model(net, config)
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, ImportError) as error:
        raise SetupError(
            f"peft {peft.__version__} cannot attach {config.peft_type} to {model.id}: {_reason(error)}"
        ) from error
    return adapted  # type: ignore[no-any-return]


def _config(method: PeftConfig, task: str | None) -> peft.PeftConfig:
    values = method.values
    kind = str(values.pop("peft_type")).upper()
    if kind not in peft.PEFT_TYPE_TO_CONFIG_MAPPING:
        names = [str(getattr(name, "value", name)) for name in peft.PEFT_TYPE_TO_CONFIG_MAPPING]
        raise SetupError(f"peft {peft.__version__} knows no peft_type {kind!r}; {nearest(kind, names)}")
    cls = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)]
    known = {f.name for f in dataclasses.fields(cls)}
    for key in _MADE_FOR_LOADING:
        values.pop(key, None)
    unknown = sorted(key for key, value in values.items() if key not in known and value is not None)
    if unknown:
        raise SetupError(
            f"peft {peft.__version__}'s {cls.__name__} has no setting {unknown[0]!r}; "
            f"{nearest(unknown[0], known)}"
        )
    values = {key: value for key, value in values.items() if key in known}
    values.setdefault("task_type", task)
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:
        raise SetupError(f"peft refuses this {cls.__name__}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
