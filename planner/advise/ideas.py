"""The changes that lower a run's memory, each with what it costs the user. No sizes: see `changes`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from planner.batching import has_flash, takes_lengths
from planner.liger import replaced
from planner.losses import LOSS_CHUNK_TOKENS
from planner.spec import Adapter, FullFineTuning, LoRA, QLoRA, Setup

__all__ = ["IDEAS", "LORA", "PRICES", "Idea", "Price"]

# What a change costs the user, from nothing to another result; the order of the advice.
Price = Literal["nothing", "time", "numerics", "data", "method"]
PRICES: tuple[Price, ...] = ("nothing", "time", "numerics", "data", "method")
_ADAMW = ("adamw", "adamw-fused", "adamw-single")


@dataclass(frozen=True, kw_only=True, slots=True)
class Idea:
    """A change before its peak is known.

    `keys` gives the flat keys to set, None where the change does not apply; they may stand in `words`
    and in `short`, which names the change in a list.
    """

    price: Price
    words: str
    short: str
    cost: str
    keys: Callable[[Setup], Mapping[str, Any] | None]


def _fused(setup: Setup) -> Mapping[str, Any] | None:
    return {"optimizer": "adamw-fused"} if setup.training.optimizer in ("adamw", "adamw-single") else None


def _no_gradients(setup: Setup) -> Mapping[str, Any] | None:
    return {"zero_grad": "none"} if setup.training.zero_grad == "zero" else None


def _fused_attention(setup: Setup) -> Mapping[str, Any] | None:
    return {"attention": "sdpa"} if setup.training.attention == "eager" else None


def _by_lengths(setup: Setup) -> Mapping[str, Any] | None:
    training = setup.training
    masked = training.batching != "full" and not takes_lengths(training)
    return {"batching": "packed", "attention": "flash"} if masked and has_flash(setup.gpu) else None


def _single(setup: Setup) -> Mapping[str, Any] | None:
    batch = setup.training.micro_batch_size
    steps = setup.training.gradient_accumulation_steps
    return {"micro_batch_size": 1, "gradient_accumulation_steps": steps * batch} if batch > 1 else None


def _half_batch(setup: Setup) -> Mapping[str, Any] | None:
    batch = setup.training.micro_batch_size
    steps = setup.training.gradient_accumulation_steps
    if batch < 4 or batch % 2:
        return None
    return {"micro_batch_size": batch // 2, "gradient_accumulation_steps": 2 * steps}


def _checkpointing(setup: Setup) -> Mapping[str, Any] | None:
    return None if setup.training.activation_checkpointing else {"activation_checkpointing": True}


def _liger_kernels(setup: Setup) -> Mapping[str, Any] | None:
    what = replaced("liger", setup.model)  # of its experts nothing is known by formula
    known = what is not None and what.gate != "experts"
    return {"kernels": "liger"} if known and setup.training.kernels != "liger" else None


def _fused_loss(setup: Setup) -> Mapping[str, Any] | None:
    return {"loss": "liger"} if setup.training.loss != "liger" and not setup.model.is_bare else None


def _chunked_loss(setup: Setup) -> Mapping[str, Any] | None:
    training = setup.training
    several = training.micro_batch_size * training.seq_len > LOSS_CHUNK_TOKENS
    return {"loss": "chunked"} if training.loss == "full" and several else None


def _sixteen_bits(setup: Setup) -> Mapping[str, Any] | None:
    """Trained weights in bf16; never in fp16, which overflows where weights themselves are trained in it."""
    full = isinstance(setup.method, FullFineTuning)
    return {"precision": "bf16"} if full and _in_32_bits(setup) and _has_bf16(setup) else None


def _sixteen_bits_frozen(setup: Setup) -> Mapping[str, Any] | None:
    """QLoRA's frozen weights are quantized under every recipe."""
    if isinstance(setup.method, FullFineTuning | QLoRA) or not _in_32_bits(setup):
        return None
    return {"precision": "bf16" if _has_bf16(setup) else "fp16"}


def _in_32_bits(setup: Setup) -> bool:
    return setup.training.precision in ("fp32", "bf16-mixed", "fp16-mixed")


def _has_bf16(setup: Setup) -> bool:
    capability = setup.gpu.capability if setup.gpu else None
    return capability is None or capability >= (8, 0)  # CUDA C++ programming guide: bf16 from sm_80 on


def _autocast(setup: Setup) -> Mapping[str, Any] | None:
    """QLoRA as HF Trainer's bf16=True runs it: attention in 16 bits, and by the fused kernels."""
    precision = setup.training.precision
    plain = isinstance(setup.method, QLoRA) and not precision.endswith("-mixed")
    return {"precision": f"{precision}-mixed"} if plain else None


def _four_bits(setup: Setup) -> Mapping[str, Any] | None:
    """QLoRA with the same adapters, under autocast."""
    method = setup.method
    if not isinstance(method, LoRA) or isinstance(method, QLoRA):
        return None
    own = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    asked = {name: value for name, value in own.items() if value != getattr(LoRA(), name)}
    return {"method": "qlora", **asked, "precision": _mixed(setup)}


def _qlora(setup: Setup) -> Mapping[str, Any] | None:
    lora = _lora(setup)
    return {**lora, "method": "qlora", "precision": _mixed(setup)} if lora else None


def _mixed(setup: Setup) -> str:
    """The recipe under autocast that the card takes best."""
    return "bf16-mixed" if _has_bf16(setup) else "fp16-mixed"


def _half_sequence(setup: Setup) -> Mapping[str, Any] | None:
    half = setup.training.seq_len // 2
    return {"seq_len": half} if half >= 64 else None


def _eight_bits(setup: Setup) -> Mapping[str, Any] | None:
    return {"optimizer": "adamw-8bit"} if _steps_all_in(setup, _ADAMW) else None


def _paged(setup: Setup) -> Mapping[str, Any] | None:
    return {"optimizer": "paged-adamw-8bit"} if _steps_all_in(setup, (*_ADAMW, "adamw-8bit")) else None


def _adafactor(setup: Setup) -> Mapping[str, Any] | None:
    shaped = not setup.model.is_bare  # its states follow from shapes
    return {"optimizer": "adafactor"} if shaped and _steps_all_in(setup, _ADAMW) else None


def _steps_all_in(setup: Setup, optimizers: tuple[str, ...]) -> bool:
    """Whether all weights are trained with one of these; the states of a PEFT method are small."""
    return isinstance(setup.method, FullFineTuning) and setup.training.optimizer in optimizers


def _sgd(setup: Setup) -> Mapping[str, Any] | None:
    full = isinstance(setup.method, FullFineTuning)
    return {"optimizer": "sgd"} if full and setup.training.optimizer != "sgd" else None


def _attention_only(setup: Setup) -> Mapping[str, Any] | None:
    method = setup.method
    narrow = isinstance(method, LoRA) and method.target_modules == ("all-linear",)
    return {"target_modules": "attention"} if narrow else None


def _one_adapter(setup: Setup) -> Mapping[str, Any] | None:
    method = setup.method
    two = isinstance(method, Adapter) and method.adapter_kind == "houlsby"
    return {"adapter_kind": "pfeiffer"} if two else None


def _lora(setup: Setup) -> Mapping[str, Any] | None:
    if not isinstance(setup.method, FullFineTuning) or setup.model.is_bare:
        return None
    return {"method": "lora", "lora_rank": LoRA().lora_rank, "target_modules": "attention"}


LORA = Idea(
    price="method",
    words="Train with LoRA of rank {lora_rank} on attention instead of all weights",
    short="LoRA of rank {lora_rank}",
    cost="the method: a low-rank update instead of a full one",
    keys=_lora,
)

IDEAS = (
    Idea(
        price="nothing",
        words="Use the fused AdamW (adamw-fused)",
        short="adamw-fused",
        cost="nothing: the same update without temporaries",
        keys=_fused,
    ),
    Idea(
        price="nothing",
        words="Give gradients up after each step (zero_grad none)",
        short="no gradients between steps",
        cost="nothing: the backward pass makes them anew",
        keys=_no_gradients,
    ),
    Idea(
        price="nothing",
        words="Use torch's own attention (sdpa) instead of eager",
        short="sdpa attention",
        cost="nothing: the same attention without its matrix of scores",
        keys=_fused_attention,
    ),
    Idea(
        price="nothing",
        words="Pack the samples into one row under flash attention (batching packed, attention flash)",
        short="packed under flash attention",
        cost="nothing: each sample sees itself as before, and no padding is computed",
        keys=_by_lengths,
    ),
    Idea(
        price="nothing",
        words="Use Liger's fused loss (loss liger)",
        short="Liger's loss",
        cost="nothing: the same loss, its logits never all there; needs liger-kernel",
        keys=_fused_loss,
    ),
    Idea(
        price="nothing",
        words="Use Liger's norms, activations and rotary positions (kernels liger)",
        short="Liger's kernels",
        cost="nothing: the same functions, which keep less and work in place; needs liger-kernel",
        keys=_liger_kernels,
    ),
    Idea(
        price="time",
        words="Halve the micro batch to {micro_batch_size} and accumulate over {gradient_accumulation_steps}",
        short="micro batch {micro_batch_size}",
        cost="some time: smaller matrix products; the effective batch stays",
        keys=_half_batch,
    ),
    Idea(
        price="time",
        words="Use micro batches of 1 and accumulate over {gradient_accumulation_steps}",
        short="micro batch {micro_batch_size} x {gradient_accumulation_steps}",
        cost="some time: smaller matrix products; the effective batch stays",
        keys=_single,
    ),
    Idea(
        price="time",
        words="Turn on activation checkpointing",
        short="activation checkpointing",
        # Hugging Face transformers documentation, "Gradient checkpointing": about 20 % slower.
        cost="about 20 % more time: activations are computed again in the backward pass",
        keys=_checkpointing,
    ),
    Idea(
        price="time",
        words="Make the logits of 1,024 tokens at a time (loss chunked)",
        short="chunked loss",
        cost="some time: the output layer is computed again in the backward pass",
        keys=_chunked_loss,
    ),
    Idea(
        price="numerics",
        words="Keep the weights in 16 bits ({precision})",
        short="{precision} weights",
        cost="precision: small updates are rounded away in 16-bit weights",
        keys=_sixteen_bits,
    ),
    Idea(
        price="numerics",
        words="Keep the frozen weights in 16 bits ({precision})",
        short="{precision} weights",
        cost="precision: frozen weights are rounded to 16 bits",
        keys=_sixteen_bits_frozen,
    ),
    Idea(
        price="numerics",
        words="Run under autocast ({precision}), as HF Trainer does",
        short="{precision}",
        cost="precision: attention in 16 bits instead of fp32",
        keys=_autocast,
    ),
    Idea(
        price="numerics",
        words="Hold the frozen weights in 4 bits (qlora, {precision})",
        short="qlora",
        cost="precision: frozen weights are rounded to 4 bits; time, to widen them; needs bitsandbytes",
        keys=_four_bits,
    ),
    Idea(
        price="numerics",
        words="Keep AdamW's states in 8 bits (adamw-8bit)",
        short="adamw-8bit",
        cost="precision: states are rounded to 8 bits, those of embeddings stay in fp32; needs bitsandbytes",
        keys=_eight_bits,
    ),
    Idea(
        price="numerics",
        words="Keep AdamW's states in 8 bits and paged (paged-adamw-8bit)",
        short="paged-adamw-8bit",
        cost="precision; time where the GPU is full: states move to the host, which must have room",
        keys=_paged,
    ),
    Idea(
        price="data",
        words="Halve the sequences to {seq_len} tokens",
        short="sequences of {seq_len}",
        cost="data: longer samples are cut",
        keys=_half_sequence,
    ),
    Idea(
        price="method",
        words="Adapt attention only instead of every linear layer",
        short="attention only",
        cost="the method: fewer trained parameters",
        keys=_attention_only,
    ),
    Idea(
        price="method",
        words="Use one adapter a layer (pfeiffer) instead of two",
        short="one adapter a layer",
        cost="the method: fewer trained parameters",
        keys=_one_adapter,
    ),
    LORA,
    Idea(
        price="method",
        words="Train with QLoRA of rank {lora_rank} on attention over weights in 4 bits",
        short="QLoRA of rank {lora_rank}",
        cost="the method: a low-rank update over rounded weights; needs bitsandbytes",
        keys=_qlora,
    ),
    Idea(
        price="method",
        words="Train with Adafactor instead of AdamW",
        short="Adafactor",
        cost="the method: second moments of rows and columns only, no momentum",
        keys=_adafactor,
    ),
    Idea(
        price="method",
        words="Train with SGD instead of AdamW",
        short="SGD",
        cost="the method: no adaptive step sizes; another learning rate is needed",
        keys=_sgd,
    ),
)
