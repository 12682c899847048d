"""Does a report's run fit a GPU? What must fit is the allocator's segments and the CUDA context."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from planner.catalog.gpus import Gpu, MemoryKind
from planner.estimate.sharded import nccl_bytes
from planner.report import MemoryReport, Source
from planner.sharding import Sharding
from planner.units import MIB, gib

__all__ = ["Verdict", "Word", "context_bytes", "verdict"]

Word = Literal["fits", "tight", "does not fit", "not known"]

# CUDA context of one process, (usual, largest) in bytes: outside torch, on the card.
# sm_75: 140.875 MiB in each of 39 LoRA runs on a Tesla T4 (fitcheck-llm 0.3.1, measurement archive).
# sm_80 and later, from PyTorch's own out-of-memory messages (memory of the process - allocated - reserved
# but unallocated): 416 MiB, RTX 4090, LoRA (eosphoros-ai/DB-GPT-Hub issue 248); 414 MiB, A100, processes
# that hold a context alone (awslabs/keys_values issue 92); 429 MiB, RTX 6000 Ada (DINGYANB/MTVCrafter
# issue 21); 503 MiB, A100 80 GB (lianqi1008/Control-GIC issue 6); 512 MiB, 80 GB card
# (Tianhao-Qi/Mask2DiT issue 4).
_CONTEXT_TURING_BYTES = int(140.875 * MIB)
_CONTEXT_BYTES = (416 * MIB, 512 * MIB)

# Peak reserved over peak allocated, (median, largest) of the unquantized LoRA runs on a Tesla T4 in the
# same archive: 7 runs with memory-efficient attention, 7 with eager attention.
_RESERVED_OVER_ALLOCATED = (1.074, 1.087)
_RESERVED_OVER_ALLOCATED_EAGER = (1.183, 1.408)
# Simulated, none measured: FSDP2 allocates on four streams, whose pools do not lend to each other. 11 setups
# (Qwen3-0.6B to Llama-3.1-405B, 4 to 256 GPUs) reserve 1.13 to 1.49 times what is allocated, and one of small
# shards 1.76. What no tensor holds is given back before a request fails, so the lower edge stays.
_RESERVED_OVER_ALLOCATED_SHARDS = (1.074, 1.49)

# Promise of each verb on the number used: the estimate's peak allocated, the simulation's peak reserved.
# The tests hold the recorded runs to it.
_ERROR: dict[Source, float] = {"estimate": 0.02, "simulation": 0.01, "measurement": 0.0}

# Share of the stated size that a training run can use: gpus.json says how far each kind of report is
# above torch's own ("driver": up to 3 %, "nominal": up to 6 % more).
_USABLE: dict[MemoryKind, float] = {"torch": 1.0, "asked": 1.0, "driver": 1 / 1.03, "nominal": 1 / 1.06}

_PEAK_WORD: dict[Source, str] = {
    "estimate": "predicted",
    "simulation": "simulated",
    "measurement": "measured",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Whether a run fits a GPU, in bytes.

    `peak_bytes` is the report's peak allocated. `device_bytes` is what the run takes on the card
    (reserved + context), unbiased; `upper_bytes` the upper edge of its error band, which decides.
    `capacity_bytes` is what the card can give; `headroom_bytes` what is left at the upper edge (negative:
    what is missing). `word` is "not known" where parts of the peak are, and the known ones fit.
    """

    word: Word
    gpu: str
    peak_bytes: int
    device_bytes: int
    upper_bytes: int
    capacity_bytes: int
    sentence: str

    @property
    def headroom_bytes(self) -> int:
        """Capacity less the upper edge of the band."""
        return self.capacity_bytes - self.upper_bytes

    @property
    def fits(self) -> bool:
        """Whether even the upper edge of the band fits."""
        return self.word == "fits"

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "word": self.word,
            "gpu": self.gpu,
            "peak_bytes": self.peak_bytes,
            "device_bytes": self.device_bytes,
            "upper_bytes": self.upper_bytes,
            "capacity_bytes": self.capacity_bytes,
            "headroom_bytes": self.headroom_bytes,
            "sentence": self.sentence,
        }


def context_bytes(gpu: Gpu) -> tuple[int, int]:
    """The CUDA context on this card: (usual, largest) bytes. Excludes a desktop's own use of the card."""
    if gpu.capability == (7, 5):
        return _CONTEXT_TURING_BYTES, _CONTEXT_TURING_BYTES
    return _CONTEXT_BYTES


def verdict(report: MemoryReport, gpu: Gpu) -> Verdict:
    """Whether the run of `report` fits `gpu`: fits, tight (inside the error band) or does not fit.

    Uses peak reserved where the report knows it, else peak allocated and the overhead seen in real runs; the
    upper edge holds what another order of loading can add.
    Excludes other processes on the card, and what a desktop draws there.
    """
    usual_context, largest_context = context_bytes(gpu)
    usual_ratio, largest_ratio = _reserved_over(report)
    basis = report.peak_allocated_bytes if report.peak_reserved_bytes is None else report.peak_reserved_bytes
    usual_nccl, largest_nccl = _nccl_bytes(report)
    device_bytes = round(basis * usual_ratio) + usual_context + usual_nccl
    upper_bytes = round(basis * largest_ratio * (1 + _ERROR[report.source])) + largest_context + largest_nccl
    upper_bytes += _loading_bytes(report)
    capacity_bytes = int(gpu.total_bytes * _USABLE[gpu.memory_kind])
    word = _word(report, device_bytes, upper_bytes, capacity_bytes)
    return Verdict(
        word=word,
        gpu=gpu.name,
        peak_bytes=report.peak_allocated_bytes,
        device_bytes=device_bytes,
        upper_bytes=upper_bytes,
        capacity_bytes=capacity_bytes,
        sentence=_sentence(word, report, gpu, device_bytes, upper_bytes, capacity_bytes),
    )


def _reserved_over(report: MemoryReport) -> tuple[float, float]:
    if report.peak_reserved_bytes is not None:
        return 1.0, 1.0
    if report.not_known:
        return 1.0, 1.0  # a lower bound: reserved is never below allocated
    if _sharding(report).shard_ranks > 1:
        return _RESERVED_OVER_ALLOCATED_SHARDS
    eager = report.setup.get("attention") == "eager"
    return _RESERVED_OVER_ALLOCATED_EAGER if eager else _RESERVED_OVER_ALLOCATED


def _loading_bytes(report: MemoryReport) -> int:
    """By how much the steps peak higher where a quantized model's weights came in another order."""
    band = report.loading_band
    return max(0, band.peak_allocated_bytes[1] - report.peak_allocated_bytes) if band else 0


def _sharding(report: MemoryReport) -> Sharding:
    names = (field.name for field in dataclasses.fields(Sharding))
    return Sharding(**{name: report.setup[name] for name in names if name in report.setup})


def _nccl_bytes(report: MemoryReport) -> tuple[int, int]:
    """(usual, largest) bytes of NCCL; a measurement's are among what it measured beside torch's."""
    sharding = _sharding(report)
    return nccl_bytes(sharding) if sharding.is_distributed else (0, 0)


def _word(report: MemoryReport, device_bytes: int, upper_bytes: int, capacity_bytes: int) -> Word:
    if report.out_of_memory is not None or device_bytes > capacity_bytes:
        return "does not fit"
    if report.not_known:
        return "not known"
    return "fits" if upper_bytes <= capacity_bytes else "tight"


def _sentence(
    word: Word, report: MemoryReport, gpu: Gpu, device_bytes: int, upper_bytes: int, capacity_bytes: int
) -> str:
    peak = f"the {_PEAK_WORD[report.source]} peak of {gib(report.peak_allocated_bytes)}"
    capacity = gib(capacity_bytes)
    name = f"a GPU of {gpu.driver_name}" if gpu.memory_kind == "asked" else gpu.driver_name
    if word == "not known":
        return (
            f"Whether it fits {name} is not known: what is known takes {gib(device_bytes)} of {capacity}, "
            f"and {', '.join(part.replace('_', ' ') for part in report.not_known)} are not counted."
        )
    if word == "does not fit" and device_bytes <= capacity_bytes:
        return f"Does not fit {name}: the {report.source} ran out of its {capacity}."
    beside = "the allocator's reserve and the CUDA context"
    if _sharding(report).is_distributed:
        beside = "the allocator's reserve, NCCL and the CUDA context"
    if word == "does not fit":
        return (
            f"Does not fit {name}: {peak} takes about {gib(device_bytes)} on the card with {beside}, "
            f"{gib(device_bytes - capacity_bytes)} more than its {capacity}."
        )
    if word == "tight":
        return (
            f"Tight on {name}: {peak} takes about {gib(device_bytes)} on the card with {beside}, and up to "
            f"{gib(upper_bytes)} of its {capacity} within the error band."
        )
    return (
        f"Fits {name}: {peak} takes at most {gib(upper_bytes)} on the card with {beside}, which leaves "
        f"{gib(capacity_bytes - upper_bytes)} of its {capacity}."
    )
