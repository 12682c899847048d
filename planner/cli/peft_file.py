"""`--method peft:PATH`: any method of the peft library, by the adapter_config.json that peft writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from planner.errors import SetupError
from planner.targets import PRESETS
from planner.units import MIB

__all__ = ["PREFIX", "peft_method"]

PREFIX = "peft:"
_FILE = "adapter_config.json"
_MOST_BYTES = 1 * MIB  # the longest that peft writes, with thousands of module names, is a tenth of it

# peft.LoraConfig: what is said of the run or of a file, or changes values alone, never sizes.
_NO_MATTER = (
    *("task_type", "inference_mode", "auto_mapping", "base_model_name_or_path", "revision", "peft_version"),
    *("fan_in_fan_out", "use_rslora", "alpha_pattern", "megatron_core", "qalora_group_size"),
)
_PLAIN_STARTS = (None, True, False, "gaussian")  # init_lora_weights; others decompose the weights first


def peft_method(text: str) -> dict[str, Any]:
    """The keys of a setup for `peft:PATH`; PATH is the file, or the folder that holds it.

    A LoRA without further options is the method `lora`, for which there are formulas; all else stays
    `peft_config`. Raises SetupError for what is no such file.
    """
    path = Path(text.removeprefix(PREFIX))
    values = _object(path)
    if not isinstance(values.get("peft_type"), str):
        raise SetupError(f"{path} has no peft_type; name an {_FILE} that peft's save_pretrained wrote.")
    return _plain_lora(values) or {"method": "peft", "peft_config": values}


def _object(path: Path) -> dict[str, Any]:
    try:
        if path.is_dir():
            path = path / _FILE
        if not path.is_file():
            raise SetupError(f"{path} is no file; name an {_FILE}, or the folder that holds it.")
        with open(path, "rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, SetupError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise SetupError(f"{str(path)[:200]!r} cannot be read ({reason}); name an {_FILE}.") from None
    if len(content) > _MOST_BYTES:
        raise SetupError(f"{path} has more than {_MOST_BYTES:,} bytes; an {_FILE} is far shorter.")
    try:
        values = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise SetupError(f"{path} is not JSON ({error}); name an {_FILE} that peft wrote.") from None
    if not isinstance(values, dict):
        raise SetupError(f"{path} holds no JSON object; name an {_FILE} that peft wrote.")
    return values


def _plain_lora(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """LoRA's own fields, None where the configuration asks for more than rank, alpha, targets and bias."""
    rest = dict(values)
    kind, rank, targets = rest.pop("peft_type"), rest.pop("r", 8), rest.pop("target_modules", None)
    alpha, dropout, bias = rest.pop("lora_alpha", 8), rest.pop("lora_dropout", 0.0), rest.pop("bias", "none")
    start = rest.pop("init_lora_weights", None)
    if kind.upper() != "LORA" or start not in _PLAIN_STARTS:
        return None
    if any(value for key, value in rest.items() if key not in _NO_MATTER):
        return None
    if targets != "all-linear" and not isinstance(targets, list):  # a pattern, or left to peft
        return None
    if isinstance(targets, list) and (not targets or set(targets) & set(PRESETS)):
        return None
    return {
        "method": "lora",
        "lora_rank": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "lora_bias": bias,
        "target_modules": targets,
    }
