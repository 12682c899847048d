"""Any method of the peft library, from its adapter_config.json."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from importlib.util import find_spec
from types import ModuleType
from typing import Any
from unittest import mock

import peft
import torch
from torch import nn

from planner.errors import SetupError, nearest
from planner.methods import Method, PeftConfig
from planner.model import Model

__all__ = ["PEFT_TASKS", "initialisation_notes", "method_batch", "refuse_unknown", "with_peft_config"]

PEFT_TASKS = {"causal-lm": "CAUSAL_LM", "seq2seq-lm": "SEQ_2_SEQ_LM", "masked-lm": None}
_MADE_FOR_LOADING = ("inference_mode", "auto_mapping", "base_model_name_or_path", "revision", "peft_version")
_TEXT_INITS = ("TEXT", "SAMPLE_VOCAB")  # of prompt tuning: other values, the same tensors
_DATA_INITS = {"eva": "EVA", "corda": "CorDA", "lora_ga": "LoRA-GA"}


def with_peft_config(net: nn.Module, model: Model, method: PeftConfig) -> nn.Module:
    """The model with peft's method attached for training.

    Unknown keys of a newer peft are refused by name. Raises SetupError with peft's reason.
    """
    config = _config(method, model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted: Any = peft.get_peft_model(net, config)
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, ImportError) as error:
        raise SetupError(
            f"peft {peft.__version__} cannot attach {_name(config)} to {model.id}: {_reason(error)}"
        ) from error
    return adapted  # type: ignore[no-any-return]


def refuse_unknown(method: Method, model: Model) -> None:
    """Refuse, before a model is built, what peft or a setup alone cannot run. Raises SetupError."""
    if isinstance(method, PeftConfig):
        _config(method, model)


def method_batch(method: Method, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a batch of token ids `[b, s]` must carry for the method; may write into `ids`.

    Poly and multitask prompt tuning ask for the task of each sample, `[b]` (int64); an activated LoRA acts
    from its invocation on, which therefore stands at the beginning.
    """
    if not isinstance(method, PeftConfig):
        return {}
    values = method.values
    tokens = values.get("alora_invocation_tokens") or []
    ids[:, : len(tokens)] = torch.tensor(tokens, dtype=ids.dtype)
    if _kind(values) in ("POLY", "MULTITASK_PROMPT_TUNING"):
        return {"task_ids": torch.zeros(ids.shape[0], dtype=torch.int64)}
    return {}


def initialisation_notes(method: Method) -> tuple[str, ...]:
    """What is said of an initialisation that goes over training data first: it is not part of the run."""
    if not isinstance(method, PeftConfig) or _kind(method.values) != "LORA":
        return ()
    name = _DATA_INITS.get(str(method.values.get("init_lora_weights")))
    return (f"{name}'s own pass over training data, before the first step, is not counted.",) if name else ()


def _config(method: PeftConfig, model: Model) -> peft.PeftConfig:
    values = method.values
    kind = _kind(values)
    values.pop("peft_type")
    if kind not in peft.PEFT_TYPE_TO_CONFIG_MAPPING:
        names = [str(getattr(name, "value", name)) for name in peft.PEFT_TYPE_TO_CONFIG_MAPPING]
        raise SetupError(f"peft {peft.__version__} knows no peft_type {kind!r}; {nearest(kind, names)}")
    reason = _refusal(kind, values)
    if reason:
        raise SetupError(f"peft_type {kind} cannot run from its configuration alone: {reason}")
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
    if values.get("task_type") is None:
        values["task_type"] = PEFT_TASKS[model.task]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config: peft.PeftConfig = _made(cls, values)
            return config
    except (ValueError, TypeError, AttributeError, ImportError) as error:
        raise SetupError(f"peft refuses this {cls.__name__}: {_reason(error)}") from error


def _refusal(kind: str, values: dict[str, Any]) -> str | None:
    """Why a setup does not say enough to run this method, and what to do instead."""
    if kind == "XLORA":
        return (
            "X-LoRA mixes LoRA adapters that were trained before and loads them from disk; "
            "plan one of those adapters as lora instead."
        )
    if values.get("arrow_config") is not None:
        return (
            "arrow routes between LoRA adapters that were trained before and loads them from disk; "
            "plan one of those adapters as lora instead."
        )
    if kind == "LORA" and values.get("init_lora_weights") == "eva":
        rho = (values.get("eva_config") or {}).get("rho", 2.0)  # peft's default
        if rho != 1.0:
            return (
                "EVA with rho above 1 gives each layer a rank by what it sees in training data; "
                'set "eva_config": {"rho": 1.0}, or write the ranks it chose as rank_pattern.'
            )
    if values.get("init_lora_weights") == "lora_ga" and values.get("lora_ga_config") is None:
        return 'LoRA-GA has settings of its own; give "lora_ga_config": {} for peft\'s defaults.'
    if kind == "MULTITASK_PROMPT_TUNING" and values.get("prompt_tuning_init_state_dict_path"):
        return (
            "its prompts begin from a file (prompt_tuning_init_state_dict_path); "
            'set "prompt_tuning_init": "RANDOM" without that path, which needs the same memory.'
        )
    if kind == "SHADOW" and values.get("shadow_model", "mirror") != "mirror":
        return 'its shadow_model is another checkpoint; set "shadow_model": "mirror".'
    targets = values.get("target_modules")
    if kind == "SHADOW" and isinstance(targets, list) and not all(t[-1:].isdigit() for t in targets):
        return (
            f"it goes around whole blocks of layers, got target_modules {', '.join(targets)}; "
            "leave target_modules out, or name blocks such as model.layers.0."
        )
    return None


def _made(cls: Any, values: dict[str, Any]) -> Any:
    """The configuration; what only decides values of tensors gives way to what needs no file."""
    if str(values.get("prompt_tuning_init", "")).upper() in _TEXT_INITS:
        values["prompt_tuning_init"] = "RANDOM"
        values.pop("prompt_tuning_init_text", None)
        values.pop("tokenizer_name_or_path", None)
    values.pop("runtime_config", None)  # for weights in the host's memory; here they are on the device
    if values.get("init_lora_weights") == "loftq" and values.get("loftq_config"):
        config = cls(**values | {"init_lora_weights": True, "loftq_config": {}})  # peft asks for scipy here
        config.init_lora_weights, config.loftq_config = "loftq", dict(values["loftq_config"])
        return config
    if cls.__name__ == "AdamssConfig" and "sklearn" not in sys.modules and find_spec("sklearn") is None:
        with mock.patch.dict(sys.modules, {"sklearn": ModuleType("sklearn")}):  # attaching asks for it again
            return cls(**values)
    return cls(**values)


def _kind(values: dict[str, Any]) -> str:
    return str(values["peft_type"]).upper()


def _name(config: Any) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _reason(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
