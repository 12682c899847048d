"""The simulated run once more, with the weights of a quantized model arriving on the card in other orders.

transformers 5.0 to 5.3 bring weights with min(4, processors) threads, in the order of the checkpoint, while
one more quantizes them (core_model_loading.py: GLOBAL_WORKERS, spawn_materialize, materialize_tensors); since
5.4 one thread does both (pull request 44576), as the simulation's own run does. `tensor.to(device, dtype)`
takes its block first and casts and copies after. Threads begin weights in the checkpoint's order, but which
of them gets its block first, and how many weights wait beside the one being quantized, is a race. What blocks
keep unsplit, and what the cache holds for the first step, follow from it. Left out: that copies share a
stream and threads share processors.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from planner.allocator import AllocatorConfig, CachingAllocator
from planner.report import LoadingBand, Phase
from planner.units import MIB

__all__ = ["LOADINGS", "Arrivals", "Loading", "band_note", "loading_band"]

_Entry = tuple[Any, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Loading:
    """One way for the weights to have come: an order of arrival, and whether cached memory was given back.

    Each of `threads` brings one weight at a time, in a time proportional to its bytes. The one that
    quantizes takes for every weight `quantizing` times what a thread takes for the mean one. `uneven` seeds
    how far each is off, from half as long to one and a half times; None: not at all. `overtaking`: a weight
    takes its block within this share of its time, where `uneven` says, so that later ones may come before it.
    `cache_kept`: peft before 0.20 has no `empty_cache` in `prepare_model_for_kbit_training`.
    """

    threads: int = 4
    quantizing: float = 0.0
    uneven: int | None = None
    overtaking: float = 0.0
    cache_kept: bool = True

    def order(self, sizes_bytes: Sequence[int]) -> Iterator[tuple[int, bool]]:
        """(number of the weight, whether it arrives or is quantized), as time goes."""
        random = None if self.uneven is None else Random(self.uneven)
        free = [0.0] * self.threads
        events: list[tuple[float, bool, int]] = []
        each = self.quantizing * sum(sizes_bytes) / len(sizes_bytes)
        done = 0.0
        for number, size in enumerate(sizes_bytes):
            begun = free[0]
            there = begun + size * _pace(random)
            heapq.heapreplace(free, there)
            done = max(done, there) + each * _pace(random)
            taken = begun
            if random is not None and self.overtaking:
                taken += random.uniform(0, self.overtaking) * (there - begun)
            events += (taken, False, number), (done, True, number)
        for _time, is_quantized, number in sorted(events):
            yield number, not is_quantized


def _pace(random: Random | None) -> float:
    return 1.0 if random is None else random.uniform(0.5, 1.5)


def _races(number: int, overtaking: int) -> Iterator[Loading]:
    random = Random(0)
    for seed in range(number + overtaking):
        yield Loading(
            threads=2 + seed % 3,
            quantizing=random.random(),
            uneven=seed,
            overtaking=float(seed >= number),
            cache_kept=seed % 2 == 0,
        )


# A sample of what machines do, no bound: threads that never wait, and races between 2 to 4 threads and a
# quantizing one that is at most as slow for a weight as they are; 12 in the checkpoint's order, 6 out of it.
LOADINGS: tuple[Loading, ...] = (Loading(), Loading(cache_kept=False), *_races(12, 6))


class Arrivals:
    """A simulated run's requests by the weight that they belong to, to be taken again in another order.

    `trail` is the ledger's, with a mark behind each weight's arrival; what follows up to the next one is the
    work on that weight.
    """

    def __init__(self, trail: Sequence[_Entry], config: AllocatorConfig) -> None:
        """Raises ValueError where no weight is marked."""
        marks = [at for at, entry in enumerate(trail) if entry[1:] == ("arrived",)]
        if not marks:
            raise ValueError("no weight of this run is marked")
        self._config = config
        self._before = trail[: marks[0] - 1]
        self._weights = [trail[mark - 1] for mark in marks]
        ends = [mark - 1 for mark in marks[1:]]
        self._work = [trail[mark + 1 : end] for mark, end in zip(marks, ends, strict=False)]
        self._work.append(trail[marks[-1] + 1 :])

    def phases(self, loading: Loading) -> tuple[Phase, ...]:
        """The run's phases as they would have been, without a limit of the device."""
        replay = _Replay(self._config, loading.cache_kept)
        replay.take(self._before)
        sizes = [size_bytes for _block, size_bytes, *_rest in self._weights]
        for number, arrives in loading.order(sizes):
            replay.take((self._weights[number],) if arrives else self._work[number])
        return tuple(replay.phases)


class _Replay:
    """Requests through an allocator of their own."""

    def __init__(self, config: AllocatorConfig, cache_kept: bool) -> None:
        self.phases: list[Phase] = []
        self._allocator = CachingAllocator(config)
        self._cache_kept = cache_kept
        self._blocks: dict[int, int] = {}
        self._phase: tuple[str, int | None] = ("", None)

    def take(self, entries: Iterable[_Entry]) -> None:
        malloc, free, blocks = self._allocator.malloc, self._allocator.free, self._blocks
        for entry in entries:
            handle = entry[0]
            if handle > 0:
                blocks[handle] = malloc(entry[1])
            elif handle < 0:
                free(blocks.pop(-handle))
            elif len(entry) > 1:  # else an empty tensor's end
                self._told(entry[1:])

    def _told(self, words: _Entry) -> None:
        allocator = self._allocator
        if words[0] == "empty_cache":
            if not (self._cache_kept and self._phase[0] == "load"):
                allocator.empty_cache()
        elif words[0] == "phase":
            self._phase = words[1], words[2]
            allocator.reset_peak()
        elif words[0] == "end":
            name, step = self._phase
            self.phases.append(
                Phase(
                    name=name,
                    step=step,
                    allocated_bytes=allocator.allocated_bytes,
                    peak_allocated_bytes=allocator.peak_allocated_bytes,
                    reserved_bytes=allocator.reserved_bytes,
                    peak_reserved_bytes=allocator.peak_reserved_bytes,
                )
            )


def loading_band(trail: Sequence[_Entry], phases: Sequence[Phase], config: AllocatorConfig) -> LoadingBand:
    """What `LOADINGS` make of a run, beside what its own order made (`phases`)."""
    arrivals = Arrivals(trail, config)
    runs = [tuple(phases), *(arrivals.phases(loading) for loading in LOADINGS)]
    resident = [phase.allocated_bytes for run in runs for phase in run if phase.name == "attach"]
    steps = [[phase.peak_allocated_bytes for phase in run if phase.step is not None] for run in runs]
    peaks = [max(step, default=0) for step in steps]
    above = [max(0, peak - before) for peak, before in zip(peaks, resident, strict=True)]
    return LoadingBand(
        resident_bytes=(min(resident), max(resident)),
        step_bytes=(min(above), max(above)),
        peak_allocated_bytes=(min(peaks), max(peaks)),
        orders=len(runs),
    )


def band_note(band: LoadingBand) -> str:
    """The band in words."""
    resident, peak = (
        " to ".join(f"{size / MIB:,.0f}" for size in sizes)
        for sizes in (band.resident_bytes, band.peak_allocated_bytes)
    )
    return (
        "Where threads bring the weights of a quantized model (transformers before 5.4), the order in which "
        "they arrive is a race and decides what blocks keep unsplit: in "
        f"{band.orders} simulated orders {resident} MiB lie on the card before the first step, and the steps "
        f"peak at {peak} MiB."
    )
