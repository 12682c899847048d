"""Closed-form families: config.json -> weight tensors and architecture, without torch.

One function for each `model_type`; a family's module is imported when it is first asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from planner.catalog.families.decoder import FamilyModel
from planner.catalog.families.fields import Fields, UnknownFamily
from planner.errors import ModelError
from planner.model import Task

__all__ = ["TASKS", "FamilyModel", "UnknownFamily", "families", "family_model"]

_MODULES = {
    "bert": "bert",
    "bloom": "gpt",
    "distilbert": "bert",
    "falcon": "gpt",
    "gemma": "llama",
    "gemma2": "llama",
    "gemma3_text": "llama",
    "gpt2": "gpt",
    "gpt_neox": "gpt",
    "gpt_oss": "experts",
    "granite": "llama",
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "experts",
    "olmo": "llama",
    "olmo2": "llama",
    "opt": "gpt",
    "phi": "llama",
    "phi3": "llama",
    "qwen2": "llama",
    "qwen3": "llama",
    "qwen3_moe": "experts",
    "roberta": "bert",
    "smollm3": "llama",
    "stablelm": "llama",
    "starcoder2": "llama",
    "t5": "t5",
}
_EAGER_ONLY = frozenset({"bloom", "gemma2", "gpt_oss"})  # _supports_sdpa is False in transformers 5
TASKS: dict[str, Task] = {  # the others are causal language models
    "bert": "masked-lm",
    "distilbert": "masked-lm",
    "roberta": "masked-lm",
    "t5": "seq2seq-lm",
}


def families() -> tuple[str, ...]:
    """The model types with closed formulas, sorted."""
    return tuple(sorted(_MODULES))


def family_model(
    config: Mapping[str, Any], *, model_id: str, task: Task | None = None
) -> tuple[FamilyModel, Task]:
    """The tensors and numbers of `config`, and the task they are for.

    `task` None: the one the family is pretrained for. Raises UnknownFamily where there is no closed
    formula, ModelError for a config.json that is malformed or would run code from the hub.
    """
    family = config.get("model_type")
    native = isinstance(family, str) and family in _MODULES
    if not native and config.get("auto_map"):
        raise ModelError(
            f"{model_id}: its architecture {family!r} runs code from the hub (auto_map in config.json); "
            "the planner never runs remote code. Choose a model that transformers itself provides."
        )
    if not isinstance(family, str) or not family:
        raise ModelError(
            f"{model_id}: config.json has no model_type; use the config.json of a transformers model."
        )
    if not native:
        raise UnknownFamily(
            f"{model_id}: model_type {family!r} has no closed formula; counting it needs transformers."
        )
    pretrained = TASKS.get(family, "causal-lm")
    if task is not None and task != pretrained:
        raise UnknownFamily(
            f"{model_id}: a {family} model for {task} has no closed formula; counting it needs transformers."
        )
    make: Callable[[Fields], FamilyModel] = import_module(
        f"planner.catalog.families.{_MODULES[family]}"
    ).FAMILIES[family]
    made = make(Fields(config, model_id))
    if family in _EAGER_ONLY:
        made = dataclasses.replace(made, architecture=dataclasses.replace(made.architecture, sdpa=False))
    return made, pretrained
