"""How many GPUs, and how they should share the run: memory per GPU by their number, the cheapest that fits.

Cheapest is what sends the fewest bytes per step; of equals the one that comes first here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from planner.advise.fits import Verdict, verdict
from planner.catalog.gpus import Gpu, gpu
from planner.errors import SetupError
from planner.estimate import estimate
from planner.estimate.communication import communication_bytes
from planner.report import MemoryReport
from planner.sharding import CpuOffload, Sharding, ShardingKind
from planner.spec import Setup

__all__ = [
    "NUMBERS",
    "USUAL",
    "Need",
    "Option",
    "Shardings",
    "cheapest",
    "needs",
    "options",
    "shardings",
    "shared",
]

NUMBERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)  # powers of two, as clusters are sold
USUAL = ("rtx-4090", "l40s", "a100-40gb", "a100-80gb", "h100", "h200", "b200")  # what clusters rent out
_OF_FSDP = ("reduce_dtype", "prefetch", "shard_unit")
_KINDS: tuple[ShardingKind, ...] = ("ddp", "zero1", "zero2", "fsdp-grad-op", "fsdp", "hsdp", "zero3")


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One way to share a run, as rank 0 sees it.

    `sent_bytes` is what one rank sends in a step; `verdict` is None without a GPU; `host_bytes` are the
    shards in the host's memory, 0 without offload.
    """

    num_gpus: int
    sharding: ShardingKind
    peak_allocated_bytes: int
    sent_bytes: int
    host_bytes: int
    not_known: tuple[str, ...]
    verdict: Verdict | None

    @property
    def fits(self) -> bool:
        """Whether it surely fits the GPU."""
        return self.verdict is not None and self.verdict.fits

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "num_gpus": self.num_gpus,
            "sharding": self.sharding,
            "peak_allocated_bytes": self.peak_allocated_bytes,
            "sent_bytes": self.sent_bytes,
            "host_bytes": self.host_bytes,
            "word": self.verdict.word if self.verdict else None,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """The fewest GPUs of one kind that take the run, and the cheapest way to share it among them."""

    gpu: Gpu
    option: Option

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"gpu": self.gpu.name, **self.option.to_dict()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Shardings:
    """Every option of a setup, those that fit its GPU and send least, and how many of each GPU it takes.

    `cheapest` is among the setup's own number of GPUs, `fewest` among the least number that fits.
    """

    options: tuple[Option, ...]
    cheapest: Option | None
    fewest: Option | None
    needs: tuple[Need, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "cheapest": self.cheapest.to_dict() if self.cheapest else None,
            "fewest": self.fewest.to_dict() if self.fewest else None,
            "needs": [need.to_dict() for need in self.needs],
            "options": [option.to_dict() for option in self.options],
        }


def shardings(setup: Setup) -> Shardings:
    """How the run can be shared: among the setup's number of GPUs, fewer and more, and on other kinds."""
    number = setup.sharding.num_gpus
    found = options(setup, tuple(sorted({*NUMBERS, number})))
    return Shardings(
        options=found,
        cheapest=cheapest(option for option in found if option.num_gpus == number),
        fewest=cheapest(found),
        needs=needs(setup),
    )


def shared(setup: Setup, num_gpus: int, kind: ShardingKind) -> Setup:
    """The setup on so many GPUs, its other wishes kept where the kind has them. Raises SetupError."""
    asked = setup.sharding
    node = asked.gpus_per_node
    node = None if node is None else min(node, num_gpus)
    own = Sharding(num_gpus=num_gpus, sharding=kind, gpus_per_node=node)
    if own.is_fsdp:
        own = replace(own, **{name: getattr(asked, name) for name in _OF_FSDP})
    return Setup(
        model=setup.model,
        method=setup.method,
        training=setup.training,
        gpu=setup.gpu,
        sharding=replace(own, cpu_offload=_offload(asked, own)),
    )


def _offload(asked: Sharding, own: Sharding) -> CpuOffload:
    """The wished offload as near as the kind has it."""
    if asked.cpu_offload == "none" or own.sharding in ("none", "ddp"):
        return "none"
    if own.is_fsdp:
        return "parameters"
    return asked.cpu_offload if own.zero_stage == 3 else "optimizer"


def options(setup: Setup, numbers: tuple[int, ...] = NUMBERS) -> tuple[Option, ...]:
    """Every way to share the run among these numbers of GPUs, in the order of number and kind."""
    found = []
    for number in numbers:
        for kind in _kinds(number):
            option = _option(setup, number, kind, setup.gpu)
            if option is not None:
                found.append(option)
    return tuple(found)


def cheapest(found: Iterable[Option]) -> Option | None:
    """Of those that fit on the fewest GPUs the one that sends least; None where none fits."""
    fitting = [option for option in found if option.fits]
    least = min((option.num_gpus for option in fitting), default=0)
    among = [option for option in fitting if option.num_gpus == least]
    return min(among, key=lambda option: option.sent_bytes, default=None)


@lru_cache(maxsize=64)
def needs(setup: Setup) -> tuple[Need, ...]:
    """How many of each usual GPU, and of the setup's, take the run; what no number takes is left out.

    One estimate for each compute capability, as the formulas know nothing else of a card.
    """
    first: dict[tuple[int, int] | None, Gpu] = {}
    cards = [gpu(name) for name in USUAL]
    if setup.gpu is not None and setup.gpu not in cards:
        cards.append(setup.gpu)
    found = []
    for card in cards:
        like = first.setdefault(card.capability, card)
        try:
            option = _fewest(setup.replace(gpu=like), card)
        except SetupError:  # no kernel of the asked name there
            continue
        if option is not None:
            found.append(Need(gpu=card, option=option))
    return tuple(found)


def _fewest(setup: Setup, card: Gpu) -> Option | None:
    """The first number of GPUs on which what needs least fits, and there the cheapest of all kinds."""
    for number in NUMBERS:
        least = [_option(setup, number, kind, card) for kind in _smallest_kinds(number)]
        if any(option is not None and option.fits for option in least):
            every = (_option(setup, number, kind, card) for kind in _kinds(number))
            return cheapest(option for option in every if option is not None)
    return None


def _kinds(number: int) -> tuple[ShardingKind, ...]:
    return _KINDS if number > 1 else ("none",)


def _smallest_kinds(number: int) -> tuple[ShardingKind, ...]:
    """Those that hold least on each GPU."""
    return ("fsdp", "zero3") if number > 1 else ("none",)


def _option(setup: Setup, number: int, kind: ShardingKind, card: Gpu | None) -> Option | None:
    """None where the libraries cannot run it so."""
    found = _shared_report(setup, number, kind)
    if found is None:
        return None
    report, sent_bytes = found
    return Option(
        num_gpus=number,
        sharding=kind,
        peak_allocated_bytes=report.peak_allocated_bytes,
        sent_bytes=sent_bytes,
        host_bytes=report.host_bytes or 0,
        not_known=report.not_known,
        verdict=None if card is None else verdict(report, card),
    )


@lru_cache(maxsize=4096)
def _shared_report(setup: Setup, number: int, kind: ShardingKind) -> tuple[MemoryReport, int] | None:
    try:
        own = shared(setup, number, kind)
    except SetupError:
        return None
    return estimate(own), communication_bytes(own)
