"""The settings that train.py reads: the setup's own values, with presets and defaults resolved."""

from __future__ import annotations

import dataclasses
from typing import Any

from planner.catalog.hub import is_hub_id
from planner.catalog.outputs import OUTPUTS, takes_adapter
from planner.estimate import estimate
from planner.model import Model
from planner.spec import Adapter, LoRA, PeftConfig, QLoRA, Setup
from planner.targets import lora_targets

__all__ = ["settings"]

_LEARNING_RATE = 1e-4  # as in planner.training.optimizers; no number of the plan depends on it
_PEFT_TASKS = {"causal-lm": "CAUSAL_LM", "seq2seq-lm": "SEQ_2_SEQ_LM", "masked-lm": None}
_MADE_FOR_LOADING = ("inference_mode", "auto_mapping", "base_model_name_or_path", "revision", "peft_version")

_MOST_PARTS = 3  # of a dotted ending such as attn.c_attn
_OWN = ("the given config.json", "a local config.json")  # planner.catalog.resolve


def settings(setup: Setup) -> dict[str, Any]:
    """JSON values under the names of the setup's fields, and `planned`: what the formulas say of it.

    `model` is a Hugging Face id, or `model`: the exported folder, for a config.json of one's own.
    """
    report = estimate(setup)
    unknown = bool(report.not_known)
    return {
        "model": _weights(setup.model),
        "method": setup.method.name,
        **_method(setup),
        **dataclasses.asdict(setup.training),
        **(dataclasses.asdict(setup.sharding) if setup.sharding.is_distributed else {}),
        "learning_rate": _LEARNING_RATE,
        "seed": 0,
        "planned": {
            "trainable_parameters": None
            if isinstance(setup.method, PeftConfig)
            else report.parameters.trainable,
            "peak_allocated_bytes": None if unknown else report.peak_allocated_bytes,
            "gpu": setup.gpu.name if setup.gpu else None,
            **report.provenance,
        },
    }


def _weights(model: Model) -> str:
    """Where the weights come from: the hub's id, where the model is one."""
    return model.id if is_hub_id(model.id) and model.source not in _OWN else "model"


def _method(setup: Setup) -> dict[str, Any]:
    model, method = setup.model, setup.method
    if isinstance(method, LoRA):
        alpha = method.alpha
        return {
            "lora_rank": method.lora_rank,
            "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
            "lora_dropout": method.lora_dropout,
            "target_modules": _targets(model, method.target_modules),
            "lora_bias": method.lora_bias,
            "task_type": _PEFT_TASKS[model.task],
            **({"quantization": method.quantization} if isinstance(method, QLoRA) else {}),
        }
    if isinstance(method, Adapter):
        return _adapter(model, method)
    if isinstance(method, PeftConfig):
        values = {key: value for key, value in method.values.items() if key not in _MADE_FOR_LOADING}
        if values.get("task_type") is None:
            values["task_type"] = _PEFT_TASKS[model.task]
        return {"peft_config": values}
    return {}


def _targets(model: Model, targets: tuple[str, ...]) -> str | list[str]:
    """peft's spelling: `attention` becomes the shortest endings that mean the same modules, or all names."""
    if targets == ("all-linear",):
        return "all-linear"
    if targets != ("attention",):
        return list(targets)
    wanted = lora_targets(model, targets)
    for parts in range(1, _MOST_PARTS + 1):
        endings = tuple(dict.fromkeys(_ending(target.weight.module, parts) for target in wanted))
        if not any("*" in name for name in endings) and set(lora_targets(model, endings)) == set(wanted):
            return list(endings)
    return [name.rpartition(".")[0] for target in wanted for name in target.weight.names()]


def _ending(module: str, parts: int) -> str:
    return ".".join(module.split(".")[-parts:])


def _adapter(model: Model, method: Adapter) -> dict[str, Any]:
    """The size of the bottleneck, and the modules that get one, `*` for the layer's index."""
    shape = model.architecture
    assert shape is not None  # refused by Setup
    attention, mlp = OUTPUTS.get(shape.family, ((shape.attention_output,), (shape.mlp_output,)))
    modules = {
        ".".join(parts[:end])
        for tensor in model.tensors
        for parts in [tensor.module.split(".")]
        for end in range(1, len(parts) + 1)
    }
    return {
        "adapter_kind": method.adapter_kind,
        "adapter_size": method.bottleneck(shape.hidden_size),
        "adapter_modules": sorted(
            name for name in modules if takes_adapter(name, method.adapter_kind, attention, mlp)
        ),
    }
