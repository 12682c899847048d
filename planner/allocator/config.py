"""Settings of PyTorch's CUDA caching allocator, as PYTORCH_CUDA_ALLOC_CONF spells them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from planner.errors import SetupError, nearest
from planner.units import MIB

__all__ = ["LARGE_SEGMENT_BYTES", "MIN_LARGE_BYTES", "POWER2_INTERVALS", "AllocatorConfig"]

LARGE_SEGMENT_BYTES = 20 * MIB  # c10/core/AllocatorConfig.h: large_segment_size_ (kLargeBuffer before 2.10)
MIN_LARGE_BYTES = 10 * MIB  # c10/core/AllocatorConfig.h: kMinLargeAlloc: from here on a segment of its own
POWER2_INTERVALS = 16  # c10/core/AllocatorConfig.cpp: kRoundUpPowerOfTwoIntervals, 1 MiB to 64 GiB

# Valid in torch 2.13 (CUDAAllocatorConfig::getKeys and AllocatorConfig.cpp), but they move pinned host
# memory, locks, CUDA graphs or the moment of an error, never the device memory of an eager training step.
_NO_DEVICE_MEMORY = frozenset(
    {
        "graph_capture_record_stream_reuse",
        "pinned_free_catch_all",
        "pinned_max_cached_size_mb",
        "pinned_max_round_threshold_mb",
        "pinned_num_register_threads",
        "pinned_reserve_segment_size_mb",
        "pinned_use_background_threads",
        "pinned_use_cuda_host_register",
        "release_lock_on_cudamalloc",
        "throw_on_cudamalloc_oom",
    }
)


@dataclass(frozen=True, kw_only=True)
class AllocatorConfig:
    """What torch reads from PYTORCH_CUDA_ALLOC_CONF or PYTORCH_ALLOC_CONF; the defaults are torch's.

    `roundup_power2_divisions` holds one number for each power of two from 1 MiB to 32 GiB (and above), 0 or 1
    for none. `garbage_collection_threshold` acts, as in torch, only together with
    `per_process_memory_fraction` below 1. `max_non_split_rounding_bytes` None means `large_segment_bytes`.
    `newer_segments_lower` is no setting of torch but an observation on Linux: the driver hands out descending
    addresses, so of two free blocks of one size the one in the newer segment wins. Raises SetupError.
    Source: c10/core/AllocatorConfig.{h,cpp} and c10/cuda/CUDAAllocatorConfig.h of torch 2.13.
    """

    expandable_segments: bool = False
    max_split_size_bytes: int | None = None
    roundup_power2_divisions: tuple[int, ...] | None = None
    garbage_collection_threshold: float | None = None
    newer_segments_lower: bool = True
    large_segment_bytes: int = LARGE_SEGMENT_BYTES
    max_non_split_rounding_bytes: int | None = None
    per_process_memory_fraction: float = 1.0

    def __post_init__(self) -> None:
        large = self.large_segment_bytes
        if large <= MIN_LARGE_BYTES or large % MIB:
            raise SetupError(f"large_segment_size_mb must be a whole number above 10, got {large / MIB:g}.")
        for name in ("max_split_size", "max_non_split_rounding"):
            value = getattr(self, f"{name}_bytes")
            if value is not None and value < large:
                raise SetupError(
                    f"{name}_mb must be at least {large // MIB}, the size of a large segment, "
                    f"got {value / MIB:g}."
                )
        divisions = self.roundup_power2_divisions
        if divisions is not None and (
            len(divisions) != POWER2_INTERVALS or any(each and not _is_power_of_2(each) for each in divisions)
        ):
            raise SetupError(
                f"roundup_power2_divisions must be {POWER2_INTERVALS} powers of two (or 0), got {divisions}."
            )
        threshold = self.garbage_collection_threshold
        if threshold is not None and not 0 < threshold < 1:
            raise SetupError(f"garbage_collection_threshold must lie between 0 and 1, got {threshold}.")
        if not 0 <= self.per_process_memory_fraction <= 1:
            raise SetupError(
                f"per_process_memory_fraction must be from 0 to 1, got {self.per_process_memory_fraction}."
            )

    @classmethod
    def parse(cls, text: str) -> AllocatorConfig:
        """`"expandable_segments:True,max_split_size_mb:128"` as torch reads it; "" gives the defaults.

        Whitespace is ignored and the last of two equal keys counts. Settings that cannot move device memory
        are accepted and dropped. Raises SetupError for an unknown key, a value torch refuses, and
        `backend:cudaMallocAsync`, which is another allocator.
        """
        fields: dict[str, Any] = {}
        for key, value in _settings(text):
            if key in _READERS:
                field, read = _READERS[key]
                fields[field] = read(key, value)
            elif key == "backend":
                if value != "native":
                    raise SetupError(f"backend:{value} is not modelled; the only one is backend:native.")
            elif key not in _NO_DEVICE_MEMORY:
                known = [*_READERS, *_NO_DEVICE_MEMORY, "backend"]
                raise SetupError(f"{key!r} is no setting of PYTORCH_CUDA_ALLOC_CONF; {nearest(key, known)}")
        return cls(**fields)


def _settings(text: str) -> Iterator[tuple[str, str]]:
    for setting in re.split(r",(?![^\[]*\])", "".join(text.split())):
        key, colon, value = setting.partition(":")
        if setting and not (key and colon and value):
            raise SetupError(
                f"{setting!r} is not a setting; write name:value pairs with commas, "
                "such as expandable_segments:True."
            )
        if setting:
            yield key, value


def _truth(key: str, value: str) -> bool:
    if value not in ("True", "False"):
        raise SetupError(f"{key} must be True or False, got {value!r}.")
    return value == "True"


def _mib(key: str, value: str) -> int:
    return _whole(key, value) * MIB


def _whole(key: str, value: str) -> int:
    if not re.fullmatch(r"[0-9]{1,12}", value):
        raise SetupError(f"{key} must be a whole number, got {value!r}.")
    return int(value)


def _share(key: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise SetupError(f"{key} must be a number from 0 to 1, got {value!r}.") from None


def _is_power_of_2(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


def _divisions(key: str, value: str) -> tuple[int, ...]:
    """`"4"` for all sizes, or `"[256:1,512:2,>:8]"`: up to and with 256 MiB, for 512 MiB, above."""
    if not value.startswith("["):
        count = _whole(key, value)
        if not _is_power_of_2(count):
            raise SetupError(f"{key} must be a power of two, got {value!r}.")
        return (count,) * POWER2_INTERVALS
    if not value.endswith("]"):
        raise SetupError(f"{key} has no closing bracket: {value!r}.")
    divisions = [0] * POWER2_INTERVALS
    last: int | None = None
    for entry in filter(None, value[1:-1].split(",")):
        bound, _, number = entry.partition(":")
        count = _whole(key, number)
        if count and not _is_power_of_2(count):
            raise SetupError(f"{key} must map to powers of two or 0, got {entry!r}.")
        if bound == ">":  # everything above the last bound; before torch 2.9 the last bound with it
            first = 0 if last is None else last
            divisions[first + 1 :] = [count] * (POWER2_INTERVALS - first - 1)
            continue
        if not _is_power_of_2(_whole(key, bound)):
            raise SetupError(f"{key} needs bounds that are powers of two in MB, got {entry!r}.")
        index = min(int(bound).bit_length() - 1, POWER2_INTERVALS - 1)
        if last is None:
            divisions[:index] = [count] * index
        divisions[index] = count
        last = index
    return tuple(divisions)


_READERS: dict[str, tuple[str, Callable[[str, str], Any]]] = {
    "expandable_segments": ("expandable_segments", _truth),
    "max_split_size_mb": ("max_split_size_bytes", _mib),
    "large_segment_size_mb": ("large_segment_bytes", _mib),
    "max_non_split_rounding_mb": ("max_non_split_rounding_bytes", _mib),
    "roundup_power2_divisions": ("roundup_power2_divisions", _divisions),
    "garbage_collection_threshold": ("garbage_collection_threshold", _share),
    "per_process_memory_fraction": ("per_process_memory_fraction", _share),
}
