"""Run as a process: the inventory of every language model class of transformers, against transformers.

Prints {"counted": [...], "wrong": [...], "unbuildable": {...}}: `counted` are classes whose inventory lists
exactly the parameters of the class that transformers' own Auto class builds from the same config, two
layers deep where the config allows; `unbuildable` are those that transformers cannot build from its own
default config either.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

from planner.model import WeightTensor
from planner.training.inventory import inventory, tensors_of

AUTO_CLASSES = {
    "causal-lm": ("AutoModelForCausalLM", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING),
    "masked-lm": ("AutoModelForMaskedLM", modeling_auto.MODEL_FOR_MASKED_LM_MAPPING),
    "seq2seq-lm": ("AutoModelForSeq2SeqLM", modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING),
}


def small_config(config_class: Any) -> dict[str, Any]:
    """The class's default config as a config.json would hold it, with two layers where it allows."""
    try:
        config = config_class(num_hidden_layers=2)
    except Exception:
        config = config_class()
    values = json.loads(json.dumps(config.to_dict(), default=str))
    return {**values, "model_type": config_class.model_type}


def difference(entries: list[dict[str, Any]], model: torch.nn.Module) -> str:
    """What the inventory says other than the model; empty where nothing."""
    listed: dict[str, tuple[int, ...]] = {}
    total = 0
    for entry in entries:
        values = {**entry, "shape": tuple(entry["shape"]), "layers": tuple(entry["layers"])}
        tensor = WeightTensor(**values)
        total += tensor.parameters
        listed |= dict.fromkeys(tensor.names(), tensor.shape)
    real = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    parameters = sum(p.numel() for p in model.parameters())
    if listed != real:
        return f"names or shapes: {sorted(set(listed.items()) ^ set(real.items()))[:3]}"
    return "" if total == parameters else f"{total} parameters instead of {parameters}"


def main() -> None:
    """Every config class of the three mappings."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    counted: list[str] = []
    wrong: list[str] = []
    unbuildable: dict[str, str] = {}
    for task, (auto_name, mapping) in AUTO_CLASSES.items():
        for config_class in mapping:
            name = f"{config_class.model_type} {task}"
            try:
                config = small_config(config_class)
                with torch.device("meta"):
                    model = getattr(transformers, auto_name).from_config(config_class.from_dict(config))
            except Exception as error:
                unbuildable[name] = f"{type(error).__name__}: {error}"[:200]
                continue
            try:
                found = inventory(config, task)  # type: ignore[arg-type]
                problem = difference(tensors_of(model), model) or difference(found["tensors"], model)
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"[:200]
            if problem:
                wrong.append(f"{name}: {problem}")
            else:
                counted.append(name)
    answer = {"counted": counted, "wrong": wrong, "unbuildable": unbuildable}
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as answers:
        json.dump(answer, answers)


if __name__ == "__main__":
    main()
