"""What to change so that a run needs less memory: each change with its price, its saving and its peak."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from planner.advise.fits import verdict
from planner.catalog.gpus import Gpu
from planner.errors import SetupError
from planner.estimate import estimate
from planner.report import MemoryReport
from planner.spec import METHODS, Adapter, FullFineTuning, LoRA, Setup

__all__ = ["Change", "Price", "applied", "changes"]

# What a change costs the user, from nothing to another result; the order of the advice.
Price = Literal["nothing", "time", "numerics", "data", "method"]
_ORDER: tuple[Price, ...] = ("nothing", "time", "numerics", "data", "method")


@dataclass(frozen=True, kw_only=True)
class Change:
    """One change of a setup: in words, what it costs, the flat keys to set, and what comes of it.

    Bytes of peak allocated memory; `fits` is None without a GPU.
    """

    words: str
    price: Price
    cost: str
    keys: Mapping[str, Any]
    peak_allocated_bytes: int
    saving_bytes: int
    fits: bool | None

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "words": self.words,
            "price": self.price,
            "cost": self.cost,
            "keys": dict(self.keys),
            "peak_allocated_bytes": self.peak_allocated_bytes,
            "saving_bytes": self.saving_bytes,
            "fits": self.fits,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class _Idea:
    """A change before its peak is known; `keys` is None where it does not apply."""

    price: Price
    words: str
    cost: str
    keys: Callable[[Setup], Mapping[str, Any] | None]


def applied(setup: Setup, keys: Mapping[str, Any]) -> Setup:
    """The setup with flat keys changed; with `method` among them, the method's own keys start afresh.

    Raises SetupError as Setup does.
    """
    rest = dict(keys)
    name = rest.pop("method", None)
    if name is None:
        return setup.replace(**rest)
    cls = METHODS[name]
    own = {key: rest.pop(key) for key in list(rest) if key in cls.__dataclass_fields__}
    return setup.replace(method=cls(**own), **rest)


def changes(setup: Setup) -> tuple[Change, ...]:
    """The changes that lower the peak, cheapest for the user first, then by what they save.

    One of them takes together all that cost nothing or only time. With a GPU each says whether it fits.
    """
    before = estimate(setup)
    found = [change for idea in _IDEAS if (change := _change(setup, before, idea)) is not None]
    together = _together(setup, before, found)
    if together is not None:
        found.append(together)
    return tuple(sorted(found, key=lambda change: (_ORDER.index(change.price), -change.saving_bytes)))


def _change(setup: Setup, before: MemoryReport, idea: _Idea) -> Change | None:
    keys = idea.keys(setup)
    if keys is None:
        return None
    try:
        after_setup = applied(setup, keys)
    except SetupError:
        return None  # a change that this model or method cannot take is no advice
    after = estimate(after_setup)
    saving_bytes = before.peak_allocated_bytes - after.peak_allocated_bytes
    if saving_bytes <= 0:
        return None
    return Change(
        words=idea.words.format(**keys),
        price=idea.price,
        cost=idea.cost,
        keys=keys,
        peak_allocated_bytes=after.peak_allocated_bytes,
        saving_bytes=saving_bytes,
        fits=_fits(after, setup.gpu),
    )


def _together(setup: Setup, before: MemoryReport, found: list[Change]) -> Change | None:
    harmless = [change for change in found if change.price in ("nothing", "time")]
    if len(harmless) < 2:
        return None
    keys = {key: value for change in harmless for key, value in change.keys.items()}
    words = "All changes that cost nothing or only time, together"
    idea = _Idea(price="time", words=words, cost="some time, and the same result", keys=lambda _: keys)
    return _change(setup, before, idea)


def _fits(report: MemoryReport, gpu: Gpu | None) -> bool | None:
    return None if gpu is None else verdict(report, gpu).fits


def _fused(setup: Setup) -> Mapping[str, Any] | None:
    return {"optimizer": "adamw-fused"} if setup.training.optimizer == "adamw" else None


def _fused_attention(setup: Setup) -> Mapping[str, Any] | None:
    return {"attention": "sdpa"} if setup.training.attention == "eager" else None


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


def _sixteen_bits(setup: Setup) -> Mapping[str, Any] | None:
    if setup.training.precision not in ("fp32", "bf16-mixed", "fp16-mixed"):
        return None
    capability = setup.gpu.capability if setup.gpu else None
    if capability is None or capability >= (8, 0):  # CUDA programming guide: bf16 arithmetic from sm_80 on
        return {"precision": "bf16"}
    # Weights in fp16 are trained in fp16 too under full fine-tuning, which overflows; PEFT trains in fp32.
    return None if isinstance(setup.method, FullFineTuning) else {"precision": "fp16"}


def _half_sequence(setup: Setup) -> Mapping[str, Any] | None:
    half = setup.training.seq_len // 2
    return {"seq_len": half} if half >= 64 else None


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


_IDEAS = (
    _Idea(
        price="nothing",
        words="Use the fused AdamW (adamw-fused)",
        cost="nothing: the same update without foreach's temporaries",
        keys=_fused,
    ),
    _Idea(
        price="nothing",
        words="Use torch's own attention (sdpa) instead of eager",
        cost="nothing: the same attention without its matrix of scores",
        keys=_fused_attention,
    ),
    _Idea(
        price="time",
        words="Halve the micro batch to {micro_batch_size} and accumulate over {gradient_accumulation_steps}",
        cost="some time: smaller matrix products; the effective batch stays",
        keys=_half_batch,
    ),
    _Idea(
        price="time",
        words="Use micro batches of 1 and accumulate over {gradient_accumulation_steps}",
        cost="some time: smaller matrix products; the effective batch stays",
        keys=_single,
    ),
    _Idea(
        price="time",
        words="Turn on activation checkpointing",
        # Hugging Face transformers documentation, "Gradient checkpointing": about 20 % slower.
        cost="about 20 % more time: activations are computed again in the backward pass",
        keys=_checkpointing,
    ),
    _Idea(
        price="numerics",
        words="Keep the weights in 16 bits ({precision})",
        cost="precision: small updates are rounded away in 16-bit weights",
        keys=_sixteen_bits,
    ),
    _Idea(
        price="data",
        words="Halve the sequences to {seq_len} tokens",
        cost="data: longer samples are cut",
        keys=_half_sequence,
    ),
    _Idea(
        price="method",
        words="Adapt attention only instead of every linear layer",
        cost="the method: fewer trained parameters",
        keys=_attention_only,
    ),
    _Idea(
        price="method",
        words="Use one adapter a layer (pfeiffer) instead of two",
        cost="the method: fewer trained parameters",
        keys=_one_adapter,
    ),
    _Idea(
        price="method",
        words="Train with LoRA of rank {lora_rank} on attention instead of all weights",
        cost="the method: a low-rank update instead of a full one",
        keys=_lora,
    ),
    _Idea(
        price="method",
        words="Train with SGD instead of AdamW",
        cost="the method: no adaptive step sizes; another learning rate is needed",
        keys=_sgd,
    ),
)
