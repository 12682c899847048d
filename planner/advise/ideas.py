"""The changes that lower a run's memory, each with what it costs the user. No sizes: see `changes`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from planner.advise import moves
from planner.spec import Setup

__all__ = ["IDEAS", "LORA", "PRICES", "Idea", "Price"]

# What a change costs the user, from nothing to another result; the order of the advice.
Price = Literal["nothing", "time", "numerics", "data", "method"]
PRICES: tuple[Price, ...] = ("nothing", "time", "numerics", "data", "method")


@dataclass(frozen=True, kw_only=True, slots=True)
class Idea:
    """A change before its peak is known.

    `keys` gives the flat keys to set, None where the change does not apply; they may stand in `words`
    and in `short`, which names the change in a list. `at_once`: it may be one of several made together, as it
    asks nothing of the machine.
    """

    price: Price
    words: str
    short: str
    cost: str
    keys: Callable[[Setup], Mapping[str, Any] | None]
    at_once: bool = True


LORA = Idea(
    price="method",
    words="Train with LoRA of rank {lora_rank} on attention instead of all weights",
    short="LoRA of rank {lora_rank}",
    cost="the method: a low-rank update instead of a full one",
    keys=moves.lora,
)

IDEAS = (
    Idea(
        price="nothing",
        words="Use the fused AdamW (adamw-fused)",
        short="adamw-fused",
        cost="nothing: the same update without temporaries",
        keys=moves.fused,
    ),
    Idea(
        price="nothing",
        words="Give gradients up after each step (zero_grad none)",
        short="no gradients between steps",
        cost="nothing: the backward pass makes them anew",
        keys=moves.no_gradients,
    ),
    Idea(
        price="nothing",
        words="Use torch's own attention (sdpa) instead of eager",
        short="sdpa attention",
        cost="nothing: the same attention without its matrix of scores",
        keys=moves.fused_attention,
    ),
    Idea(
        price="nothing",
        words="Pack the samples into one row under flash attention (batching packed, attention flash)",
        short="packed under flash attention",
        cost="nothing: each sample sees itself as before, and no padding is computed",
        keys=moves.by_lengths,
    ),
    Idea(
        price="nothing",
        words="Use Liger's fused loss (loss liger)",
        short="Liger's loss",
        cost="nothing: the same loss, its logits never all there; needs liger-kernel",
        keys=moves.fused_loss,
    ),
    Idea(
        price="nothing",
        words="Use Liger's norms, activations and rotary positions (kernels liger)",
        short="Liger's kernels",
        cost="nothing: the same functions, which keep less and work in place; needs liger-kernel",
        keys=moves.liger_kernels,
    ),
    Idea(
        price="time",
        words="Halve the micro batch to {micro_batch_size} and accumulate over {gradient_accumulation_steps}",
        short="micro batch {micro_batch_size}",
        cost="some time: smaller matrix products; the effective batch stays",
        keys=moves.half_batch,
    ),
    Idea(
        price="time",
        words="Use micro batches of 1 and accumulate over {gradient_accumulation_steps}",
        short="micro batch {micro_batch_size} x {gradient_accumulation_steps}",
        cost="some time: smaller matrix products; the effective batch stays",
        keys=moves.single,
    ),
    Idea(
        price="time",
        words="Turn on activation checkpointing",
        short="activation checkpointing",
        # Hugging Face transformers documentation, "Gradient checkpointing": about 20 % slower.
        cost="about 20 % more time: activations are computed again in the backward pass",
        keys=moves.checkpointing,
    ),
    Idea(
        price="time",
        words="Checkpoint every layer (checkpoint_every 1)",
        short="checkpoints of every layer",
        cost="some time: the other layers are computed again too",
        keys=moves.every_layer,
    ),
    Idea(
        price="time",
        words="Keep the checkpoints' inputs on the host (checkpoint_offload)",
        short="checkpoints on the host",
        cost="some time: a copy to the host and one back for each layer, which must have room for them",
        keys=moves.offloaded,
        at_once=False,
    ),
    Idea(
        price="time",
        words="Make the logits of 1,024 tokens at a time (loss chunked)",
        short="chunked loss",
        cost="some time: the output layer is computed again in the backward pass",
        keys=moves.chunked_loss,
    ),
    Idea(
        price="time",
        words="Page AdamW's states, in fp32 (paged-adamw-32bit)",
        short="paged-adamw-32bit",
        cost="time where the GPU is full: states move to the host, which must have room; needs bitsandbytes",
        keys=moves.paged_alone,
        at_once=False,
    ),
    Idea(
        price="numerics",
        words="Keep the weights in 16 bits ({precision})",
        short="{precision} weights",
        cost="precision: small updates are rounded away in 16-bit weights",
        keys=moves.sixteen_bits,
    ),
    Idea(
        price="numerics",
        words="Keep the frozen weights in 16 bits ({precision})",
        short="{precision} weights",
        cost="precision: frozen weights are rounded to 16 bits",
        keys=moves.sixteen_bits_frozen,
    ),
    Idea(
        price="numerics",
        words="Run under autocast ({precision}), as HF Trainer does",
        short="{precision}",
        cost="precision: attention in 16 bits instead of fp32",
        keys=moves.autocast,
    ),
    Idea(
        price="numerics",
        words="Hold the frozen weights in 4 bits (qlora, {precision})",
        short="qlora",
        cost="precision: frozen weights are rounded to 4 bits; time, to widen them; needs bitsandbytes",
        keys=moves.four_bits,
    ),
    Idea(
        price="numerics",
        words="Keep AdamW's states in 8 bits (adamw-8bit)",
        short="adamw-8bit",
        cost="precision: states are rounded to 8 bits, those of embeddings stay in fp32; needs bitsandbytes",
        keys=moves.eight_bits,
    ),
    Idea(
        price="numerics",
        words="Keep AdamW's states in 8 bits and paged (paged-adamw-8bit)",
        short="paged-adamw-8bit",
        cost="precision; time where the GPU is full: states move to the host, which must have room",
        keys=moves.paged,
    ),
    Idea(
        price="data",
        words="Halve the sequences to {seq_len} tokens",
        short="sequences of {seq_len}",
        cost="data: longer samples are cut",
        keys=moves.half_sequence,
    ),
    Idea(
        price="method",
        words="Adapt attention only instead of every linear layer",
        short="attention only",
        cost="the method: fewer trained parameters",
        keys=moves.attention_only,
    ),
    Idea(
        price="method",
        words="Use one adapter a layer (pfeiffer) instead of two",
        short="one adapter a layer",
        cost="the method: fewer trained parameters",
        keys=moves.one_adapter,
    ),
    LORA,
    Idea(
        price="method",
        words="Train with QLoRA of rank {lora_rank} on attention over weights in 4 bits",
        short="QLoRA of rank {lora_rank}",
        cost="the method: a low-rank update over rounded weights; needs bitsandbytes",
        keys=moves.qlora,
    ),
    Idea(
        price="method",
        words="Train with Adafactor instead of AdamW",
        short="Adafactor",
        cost="the method: second moments of rows and columns only, no momentum",
        keys=moves.adafactor,
    ),
    Idea(
        price="method",
        words="Train with SGD instead of AdamW",
        short="SGD",
        cost="the method: no adaptive step sizes; another learning rate is needed",
        keys=moves.sgd,
    ),
)
