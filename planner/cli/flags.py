"""The flags of a setup, made from the fields of the dataclasses in `planner.spec`.

A new field needs one entry in HELP; its flag, its type and its default come from the dataclass.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from planner.cli.peft_file import PREFIX, peft_method
from planner.errors import SetupError
from planner.spec import METHODS, Setup, Sharding, Training
from planner.units import parse_count

__all__ = ["HELP", "add_setup_flags", "flag", "setup_from", "whole"]

HELP: dict[str, str] = {
    "model": "what is fine-tuned: a Hugging Face id, a folder, a config.json, or params:7e9",
    "method": "how it is fine-tuned",
    "gpu": "the GPU: its name, such as t4 or 'NVIDIA H200', or a size such as 24GiB",
    "lora_rank": "rank r of LoRA's matrices",
    "lora_alpha": "LoRA's alpha; the update is scaled by alpha / r (default: 2 r)",
    "lora_dropout": "dropout before LoRA's first matrix, from 0 and below 1",
    "target_modules": "layers that get LoRA: names such as q_proj,v_proj, or attention, or all-linear",
    "lora_bias": "bias terms trained along with LoRA",
    "quantization": "how bitsandbytes holds the linear layers under qlora",
    "adapter_kind": "bottleneck adapters: houlsby puts two in each layer, pfeiffer one",
    "adapter_size": "width of the adapter's bottleneck (default: 64)",
    "adapter_reduction_factor": "hidden size over the adapter's width, instead of --adapter-size",
    "trainable_params": "trained parameters of a PEFT method of unknown shape, such as 4e6",
    "micro_batch_size": "samples in one forward and backward pass",
    "seq_len": "tokens in each sample",
    "gradient_accumulation_steps": "micro batches in one optimizer step",
    "precision": "recipe of number formats for weights, gradients and optimizer states",
    "optimizer": "optimizer; adamw is torch's own default on CUDA, -8bit and -32bit are bitsandbytes'",
    "activation_checkpointing": "compute activations again in the backward pass instead of keeping them",
    "checkpoint_every": "checkpoint only every so-many-th layer; the others keep their activations",
    "checkpoint_offload": "let the checkpoints' inputs wait in the host's memory",
    "attention": "implementation of attention; sdpa is torch's own choice for the device",
    "clip_grad_norm": "clip gradients to this norm before each optimizer step (default: no clipping)",
    "zero_grad": "after a step gradients are given up (none), or set to zero and kept (zero)",
    "num_gpus": "GPUs that share the run",
    "gpus_per_node": "GPUs in one machine (default: 8, or all where they are fewer)",
    "sharding": "what each GPU holds: a copy (ddp), or shards by PyTorch's FSDP2 or DeepSpeed's ZeRO",
    "cpu_offload": "what lives in the host's memory between uses: optimizer states, or the parameters too",
    "reduce_dtype": "type that FSDP reduces gradients in (default: the one the step computes in)",
    "prefetch": "units that FSDP gathers ahead, in forward and backward (default: its own)",
    "shard_unit": "module class that FSDP gathers as one unit (default: the model's layer)",
    "loop": "who writes the loop: plain keeps the logits through the backward pass, HF's trainer does not",
    "loss": "full makes all logits at once, chunked those of 1,024 tokens at a time, twice; liger is "
    "liger_kernel's fused loss, without its other kernels",
    "kernels": "what computes norms, gated activations and rotary positions; liger beside --loss liger is HF "
    "Trainer's use_liger_kernel",
    "batching": "samples all of one length (full), padded to it with a mask, or packed into one row",
}

_WHOLE = re.compile(r"[+-]?[0-9]{1,30}")
_METAVARS = {
    "model": "ID|PATH|params:N",
    "gpu": "NAME|SIZE",
    "target_modules": "NAME,NAME",
    "shard_unit": "CLASS",
}


def flag(field: str) -> str:
    """The flag of a field: `--seq-len` of `seq_len`."""
    return "--" + field.replace("_", "-")


def whole(text: str) -> Any:
    """The whole number that was typed, or the text itself, for the code behind to refuse in its words."""
    return int(text) if _WHOLE.fullmatch(text) else text


def add_setup_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every field of a setup, grouped as model, method, training and GPUs."""
    group = parser.add_argument_group("what is planned")
    group.add_argument("--model", metavar=_METAVARS["model"], help=HELP["model"])
    group.add_argument("--gpu", metavar=_METAVARS["gpu"], help=HELP["gpu"])
    method = parser.add_argument_group("method")
    names = "|".join((*METHODS, f"{PREFIX}PATH"))
    method.add_argument("--method", metavar=names, help=f"{HELP['method']} (default: full)")
    fields = {item.name: (cls, item) for cls in METHODS.values() for item in dataclasses.fields(cls)}
    for cls, item in fields.values():
        _add_field(method, cls, item)
    training = parser.add_argument_group("training")
    for item in dataclasses.fields(Training):
        _add_field(training, Training, item)
    sharding = parser.add_argument_group("several GPUs")
    for item in dataclasses.fields(Sharding):
        _add_field(sharding, Sharding, item)


def setup_from(args: argparse.Namespace) -> Setup:
    """The setup that the flags describe. Raises SetupError, in the words of the field."""
    given = vars(args)
    flat: dict[str, Any] = {key: given[key] for key in ("model", "method", "gpu") if key in given}
    if str(flat.get("method", "")).startswith(PREFIX):
        _check_alone(given)
        flat |= peft_method(flat["method"])
    for cls in (*METHODS.values(), Training, Sharding):
        hints = get_type_hints(cls)
        for item in dataclasses.fields(cls):
            if item.name in given:
                flat[item.name] = _value(item.name, hints[item.name], given[item.name])
    return Setup.from_dict(flat)


def _check_alone(given: Mapping[str, Any]) -> None:
    """Raises SetupError for a flag of a method beside `--method peft:PATH`."""
    for cls in METHODS.values():
        for item in dataclasses.fields(cls):
            if item.name in given:
                raise SetupError(
                    f"{flag(item.name)} does not belong to --method {PREFIX}PATH, whose file says it all; "
                    "leave it out, or change the file."
                )


def _add_field(group: argparse._ArgumentGroup, cls: type[Any], item: dataclasses.Field[Any]) -> None:
    hint, text = get_type_hints(cls)[item.name], HELP[item.name] + _default(item)
    if hint is bool:
        group.add_argument(flag(item.name), action="store_true", help=text)
    else:
        group.add_argument(flag(item.name), metavar=_METAVARS.get(item.name) or _metavar(hint), help=text)


def _default(item: dataclasses.Field[Any]) -> str:
    if item.default is None or item.default is False or item.default is dataclasses.MISSING:
        return ""
    shown = ",".join(item.default) if isinstance(item.default, tuple) else item.default
    return f" (default: {shown})"


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The types a hint allows, None left out: `float | None` is (float,)."""
    if get_origin(hint) in (types.UnionType, Union):
        return tuple(kind for kind in get_args(hint) if kind is not types.NoneType)
    return (hint,)


def _metavar(hint: Any) -> str:
    kind = _kinds(hint)[0]
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    return "N" if kind is int else "X"


def _value(name: str, hint: Any, text: Any) -> Any:
    """The field's value for what was typed; what is no number stays text, for the setup to refuse."""
    if name == "trainable_params":
        return parse_count(text)
    kind = _kinds(hint)[0]
    if kind is int:
        return whole(text)
    if kind is float:
        try:
            return float(text)
        except ValueError:
            return text
    return text
