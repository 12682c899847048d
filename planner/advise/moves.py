"""Which keys each change of `planner.advise.ideas` sets; None where it does not apply to a setup."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from planner.batching import has_flash, takes_lengths
from planner.liger import replaced
from planner.losses import LOSS_CHUNK_TOKENS
from planner.spec import Adapter, FullFineTuning, LoRA, QLoRA, Setup

__all__ = [
    "adafactor",
    "attention_only",
    "autocast",
    "by_lengths",
    "checkpointing",
    "chunked_loss",
    "eight_bits",
    "every_layer",
    "four_bits",
    "fused",
    "fused_attention",
    "fused_loss",
    "half_batch",
    "half_sequence",
    "liger_kernels",
    "lora",
    "no_gradients",
    "offloaded",
    "one_adapter",
    "paged",
    "paged_alone",
    "qlora",
    "sgd",
    "single",
    "sixteen_bits",
    "sixteen_bits_frozen",
]

_ADAMW = ("adamw", "adamw-fused", "adamw-single")


def fused(setup: Setup) -> Mapping[str, Any] | None:
    """AdamW in one kernel."""
    return {"optimizer": "adamw-fused"} if setup.training.optimizer in ("adamw", "adamw-single") else None


def no_gradients(setup: Setup) -> Mapping[str, Any] | None:
    """Gradients set to None after each step."""
    return {"zero_grad": "none"} if setup.training.zero_grad == "zero" else None


def fused_attention(setup: Setup) -> Mapping[str, Any] | None:
    """torch's own attention instead of eager."""
    return {"attention": "sdpa"} if setup.training.attention == "eager" else None


def by_lengths(setup: Setup) -> Mapping[str, Any] | None:
    """One row of packed samples under flash attention."""
    training = setup.training
    masked = training.batching != "full" and not takes_lengths(training)
    return {"batching": "packed", "attention": "flash"} if masked and has_flash(setup.gpu) else None


def single(setup: Setup) -> Mapping[str, Any] | None:
    """Micro batches of one sample, accumulated."""
    batch = setup.training.micro_batch_size
    steps = setup.training.gradient_accumulation_steps
    return {"micro_batch_size": 1, "gradient_accumulation_steps": steps * batch} if batch > 1 else None


def half_batch(setup: Setup) -> Mapping[str, Any] | None:
    """Half the micro batch, accumulated twice as often."""
    batch = setup.training.micro_batch_size
    steps = setup.training.gradient_accumulation_steps
    if batch < 4 or batch % 2:
        return None
    return {"micro_batch_size": batch // 2, "gradient_accumulation_steps": 2 * steps}


def checkpointing(setup: Setup) -> Mapping[str, Any] | None:
    """Activation checkpointing."""
    return None if setup.training.activation_checkpointing else {"activation_checkpointing": True}


def every_layer(setup: Setup) -> Mapping[str, Any] | None:
    """A checkpoint of each layer instead of some."""
    return {"checkpoint_every": 1} if setup.training.checkpoint_every > 1 else None


def offloaded(setup: Setup) -> Mapping[str, Any] | None:
    """Checkpoints' inputs on the host."""
    training = setup.training
    here = training.activation_checkpointing and not training.checkpoint_offload
    return {"checkpoint_offload": True} if here else None


def liger_kernels(setup: Setup) -> Mapping[str, Any] | None:
    """Liger's kernels for the model's layers."""
    what = replaced("liger", setup.model)  # of its experts nothing is known by formula
    known = what is not None and what.gate != "experts"
    return {"kernels": "liger"} if known and setup.training.kernels != "liger" else None


def fused_loss(setup: Setup) -> Mapping[str, Any] | None:
    """Liger's fused loss."""
    return {"loss": "liger"} if setup.training.loss != "liger" and not setup.model.is_bare else None


def chunked_loss(setup: Setup) -> Mapping[str, Any] | None:
    """The logits of some tokens at a time."""
    training = setup.training
    several = training.micro_batch_size * training.seq_len > LOSS_CHUNK_TOKENS
    return {"loss": "chunked"} if training.loss == "full" and several else None


def sixteen_bits(setup: Setup) -> Mapping[str, Any] | None:
    """Trained weights in bf16; never in fp16, which overflows where weights themselves are trained in it."""
    full = isinstance(setup.method, FullFineTuning)
    return {"precision": "bf16"} if full and _in_32_bits(setup) and _has_bf16(setup) else None


def sixteen_bits_frozen(setup: Setup) -> Mapping[str, Any] | None:
    """QLoRA's frozen weights are quantized under every recipe."""
    if isinstance(setup.method, FullFineTuning | QLoRA) or not _in_32_bits(setup):
        return None
    return {"precision": "bf16" if _has_bf16(setup) else "fp16"}


def _in_32_bits(setup: Setup) -> bool:
    return setup.training.precision in ("fp32", "bf16-mixed", "fp16-mixed")


def _has_bf16(setup: Setup) -> bool:
    capability = setup.gpu.capability if setup.gpu else None
    return capability is None or capability >= (8, 0)  # CUDA C++ programming guide: bf16 from sm_80 on


def autocast(setup: Setup) -> Mapping[str, Any] | None:
    """QLoRA as HF Trainer's bf16=True runs it: attention in 16 bits, and by the fused kernels."""
    precision = setup.training.precision
    plain = isinstance(setup.method, QLoRA) and not precision.endswith("-mixed")
    return {"precision": f"{precision}-mixed"} if plain else None


def four_bits(setup: Setup) -> Mapping[str, Any] | None:
    """QLoRA with the same adapters, under autocast."""
    method = setup.method
    if not isinstance(method, LoRA) or isinstance(method, QLoRA):
        return None
    own = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    asked = {name: value for name, value in own.items() if value != getattr(LoRA(), name)}
    return {"method": "qlora", **asked, "precision": _mixed(setup)}


def qlora(setup: Setup) -> Mapping[str, Any] | None:
    """QLoRA instead of all weights."""
    adapted = lora(setup)
    return {**adapted, "method": "qlora", "precision": _mixed(setup)} if adapted else None


def _mixed(setup: Setup) -> str:
    """The recipe under autocast that the card takes best."""
    return "bf16-mixed" if _has_bf16(setup) else "fp16-mixed"


def half_sequence(setup: Setup) -> Mapping[str, Any] | None:
    """Sequences of half the length."""
    half = setup.training.seq_len // 2
    return {"seq_len": half} if half >= 64 else None


def eight_bits(setup: Setup) -> Mapping[str, Any] | None:
    """AdamW's states in 8 bits."""
    return {"optimizer": "adamw-8bit"} if _steps_all_in(setup, _ADAMW) else None


def paged(setup: Setup) -> Mapping[str, Any] | None:
    """AdamW's states in 8 bits and paged."""
    return {"optimizer": "paged-adamw-8bit"} if _steps_all_in(setup, (*_ADAMW, "adamw-8bit")) else None


def paged_alone(setup: Setup) -> Mapping[str, Any] | None:
    """AdamW's states in fp32 and paged."""
    return {"optimizer": "paged-adamw-32bit"} if _steps_all_in(setup, _ADAMW) else None


def adafactor(setup: Setup) -> Mapping[str, Any] | None:
    """Adafactor instead of AdamW."""
    shaped = not setup.model.is_bare  # its states follow from shapes
    return {"optimizer": "adafactor"} if shaped and _steps_all_in(setup, _ADAMW) else None


def _steps_all_in(setup: Setup, optimizers: tuple[str, ...]) -> bool:
    """Whether all weights are trained with one of these; the states of a PEFT method are small."""
    return isinstance(setup.method, FullFineTuning) and setup.training.optimizer in optimizers


def sgd(setup: Setup) -> Mapping[str, Any] | None:
    """SGD instead of AdamW."""
    full = isinstance(setup.method, FullFineTuning)
    return {"optimizer": "sgd"} if full and setup.training.optimizer != "sgd" else None


def attention_only(setup: Setup) -> Mapping[str, Any] | None:
    """Adapters on attention alone."""
    method = setup.method
    narrow = isinstance(method, LoRA) and method.target_modules == ("all-linear",)
    return {"target_modules": "attention"} if narrow else None


def one_adapter(setup: Setup) -> Mapping[str, Any] | None:
    """One bottleneck adapter a layer."""
    method = setup.method
    two = isinstance(method, Adapter) and method.adapter_kind == "houlsby"
    return {"adapter_kind": "pfeiffer"} if two else None


def lora(setup: Setup) -> Mapping[str, Any] | None:
    """LoRA instead of all weights."""
    if not isinstance(setup.method, FullFineTuning) or setup.model.is_bare:
        return None
    return {"method": "lora", "lora_rank": LoRA().lora_rank, "target_modules": "attention"}
