"""Attach the method of a setup to a built model, in place."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import torch
from torch import nn

from planner.errors import SetupError
from planner.model import Model
from planner.spec import Adapter, BitFit, FullFineTuning, LoRA, Method, PeftConfig, QLoRA
from planner.training.peft_config import PEFT_TASKS, with_peft_config

__all__ = ["attached", "move_trained"]


def attached(
    net: nn.Module, model: Model, method: Method, *, low_memory: bool = False, own_lora: bool = False
) -> nn.Module:
    """The model with the method's parameters trainable and all others frozen.

    LoRA is peft's own, with its defaults (adapters in fp32 over a 16-bit base); adapters and BitFit are
    `planner.training.peft`, and so is LoRA with `own_lora`. `low_memory` creates peft's adapters without
    values (for `meta`).
    Raises SetupError for a method of which only a parameter count is known, and with peft's reason.
    """
    if isinstance(method, FullFineTuning):
        return net
    if isinstance(method, QLoRA) and own_lora:
        raise SetupError("own_lora does not take quantized layers; use peft's LoRA for qlora.")
    if isinstance(method, LoRA) and not own_lora:
        return _with_lora(net, model, method, low_memory=low_memory)
    if isinstance(method, Adapter | BitFit | LoRA):
        from planner.training.peft import attach, settings

        return attach(net, settings(model, method))
    if isinstance(method, PeftConfig):
        return with_peft_config(net, model, method)
    raise SetupError(
        f"method {method.name} with a bare number of trained parameters cannot be run; "
        "choose lora, adapter, bitfit or full."
    )


def move_trained(net: nn.Module, device: torch.device) -> None:
    """Bring trained parameters that peft has made elsewhere (TinyLoRA's vectors) to `device`, in place.

    Buffers stay where peft leaves them: BOFT's permutations and FRoD's projections in the host's memory, from
    where each forward pass copies them. A later `model.to(device)`, as HF Trainer calls it, would bring them.
    """
    moved: dict[int, nn.Parameter] = {}
    for module in net.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad or parameter.device.type == device.type:
                continue
            if id(parameter) not in moved:
                moved[id(parameter)] = nn.Parameter(parameter.detach().to(device))
            module._parameters[name] = moved[id(parameter)]


def _with_lora(net: nn.Module, model: Model, method: LoRA, *, low_memory: bool) -> nn.Module:
    config = peft.LoraConfig(
        r=method.lora_rank,
        lora_alpha=method.alpha,  # peft divides by r: a float is fine
        lora_dropout=method.lora_dropout,
        target_modules=_targets(model, method.target_modules),
        bias=method.lora_bias,
        task_type=PEFT_TASKS[model.task],
    )
    try:
        with warnings.catch_warnings():  # of Conv1D's fan_in_fan_out (peft sets it), of tied embeddings
            warnings.simplefilter("ignore")
            adapted: Any = peft.get_peft_model(net, config, low_cpu_mem_usage=low_memory)
    except ValueError as error:
        reason = str(error).strip().splitlines()[0]
        raise SetupError(f"peft {peft.__version__} adds no such LoRA to {model.id}: {reason}") from error
    return adapted  # type: ignore[no-any-return]


def _targets(model: Model, targets: tuple[str, ...]) -> str | list[str]:
    """peft's spelling of the targets; the preset `attention` becomes the full names it stands for."""
    if targets == ("all-linear",):
        return "all-linear"
    if targets == ("attention",):
        return [
            name.rpartition(".")[0]
            for tensor in model.linear_weights
            if tensor.role == "attention"
            for name in tensor.names()
        ]
    return list(targets)
