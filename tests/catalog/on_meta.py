"""transformers' own model classes built on the meta device, read tensor by tensor."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM
from transformers.pytorch_utils import Conv1D

from planner.model import Model

CLASSES = {
    "causal-lm": AutoModelForCausalLM,
    "masked-lm": AutoModelForMaskedLM,
    "seq2seq-lm": AutoModelForSeq2SeqLM,
}


class Tensor(NamedTuple):
    """One parameter: its shape, the kind of its module, and the tensor whose storage it shares."""

    shape: tuple[int, ...]
    kind: str
    tied_to: str | None


def built(config: dict[str, Any], task: str) -> torch.nn.Module:
    """The class that transformers chooses for `config`, without storage and without remote code."""
    values = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        return CLASSES[task].from_config(AutoConfig.for_model(config["model_type"], **values))


def tensors_of(module: torch.nn.Module) -> dict[str, Tensor]:
    """Every parameter of a built model by name, tied ones too."""
    modules = dict(module.named_modules())
    first: dict[int, str] = {}
    found = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owner = first.setdefault(id(parameter), name)
        found[name] = Tensor(
            shape=tuple(parameter.shape),
            kind=_kind(modules[name.rpartition(".")[0]]),
            tied_to=None if owner == name else owner,
        )
    return found


def tensors_by_formula(model: Model) -> dict[str, Tensor]:
    """The same for the planner's model; a name listed twice fails."""
    found: dict[str, Tensor] = {}
    for tensor in model.tensors:
        for name in tensor.names():
            assert name not in found, f"{name} is listed twice"
            found[name] = Tensor(tensor.shape, tensor.kind, tensor.tied_to)
    return found


def _kind(module: torch.nn.Module) -> str:
    if isinstance(module, torch.nn.Linear):
        return "linear"
    if isinstance(module, Conv1D):
        return "conv1d"
    if isinstance(module, torch.nn.Embedding):
        return "embedding"
    return "norm" if "Norm" in type(module).__name__ else "parameter"
