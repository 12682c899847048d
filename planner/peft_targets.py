"""Which modules the names and patterns of an adapter_config.json mean: peft's rule, without peft.

Source: peft 0.21, tuners/tuners_utils.py, `check_target_module_exists`; for experts
utils/transformers_weight_conversion.py, `_resolve_string_target_modules`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from planner.model import Model
from planner.targets import OLD_EXPERT_NAMES, module_matches

__all__ = ["file_adapts_experts", "file_adapts_head", "file_matches"]

_ALL_LINEAR = "all-linear"


def file_matches(module: str, values: Mapping[str, Any], targets: str | Collection[str] | None) -> bool:
    """Whether a module (a full dotted name) is meant by the file's `values` with these target_modules.

    `targets` None: every module that is not excluded. Raises re.error and TypeError at values that are no
    names or patterns.
    """
    excluded = values.get("exclude_modules") or ()
    if isinstance(excluded, str):
        if re.fullmatch(excluded, module):
            return False
    elif any(module_matches(module, name) for name in excluded):
        return False
    if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in values.get("modules_to_save") or ()):
        return False
    if targets is None:
        return True
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    if module in targets:
        return True
    return any(module.endswith(f".{name}") for name in targets) and _in_layers(module, values)


def _in_layers(module: str, values: Mapping[str, Any]) -> bool:
    wanted = values.get("layers_to_transform")
    if wanted is None or wanted == []:
        return True
    patterns = values.get("layers_pattern") or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = re.match(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.", module)
        if found:
            layer = int(found["index"])
            return bool(layer == wanted if isinstance(wanted, int) else layer in wanted)
    return False


def _kind(values: Mapping[str, Any]) -> str:
    return str(values.get("peft_type")).upper()


def file_adapts_head(model: Model, values: Mapping[str, Any]) -> bool:
    """Whether the file puts something around the output layer, a copy in modules_to_save not counted.

    "all-linear" leaves that layer out. Where it is tied to the embeddings, trained tokens are there too, and
    with ensure_weight_tying what the embeddings get (peft 0.21, utils/other.py and tuners/tuners_utils.py).
    False where the file's values are none that can be read: peft says what is wrong with them.
    """
    heads = [t for t in model.tensors if t.role == "head"]
    tied = any(t.tied_to for t in heads)
    tokens = values.get("trainable_token_indices")
    if tied and (tokens or _kind(values) == "TRAINABLE_TOKENS"):
        return True
    modules = {t.module for t in heads}
    if isinstance(tokens, dict) and any(module_matches(m, str(name)) for m in modules for name in tokens):
        return True
    if tied and values.get("ensure_weight_tying"):
        modules |= {t.module for t in model.tensors if t.role == "embedding"}
    targets = values.get("target_modules")
    if not targets or (isinstance(targets, str) and targets.lower() == _ALL_LINEAR):
        return False
    try:
        return any(file_matches(module, values, targets) for module in modules)
    except (re.error, TypeError):
        return False


def file_adapts_experts(model: Model, values: Mapping[str, Any]) -> bool:
    """Whether a LoRA file means the fused experts of a layer: by their old names, or as parameters.

    False where its values are none that can be read, as in `file_adapts_head`.
    """
    fused = [t for t in model.tensors if len(t.shape) == 3]
    if _kind(values) != "LORA" or not fused:
        return False
    names = [name for tensor in fused for name in tensor.names()]
    try:
        parameters = values.get("target_parameters") or ()
        if any(module_matches(name, target) for name in names for target in parameters):
            return True
        old = OLD_EXPERT_NAMES.get(str(model.config.get("model_type")), ())
        targets = values.get("target_modules") or ()
        if not isinstance(targets, str):
            return any(module_matches(target, name) for target in targets for name in old)
        if targets.lower() == _ALL_LINEAR:
            return bool(old)
        before = {f"{name.rpartition('.')[0]}.{old_name}" for name in names for old_name in old}
        return any(file_matches(name, values, targets) for name in before)
    except (re.error, TypeError, AttributeError):
        return False
