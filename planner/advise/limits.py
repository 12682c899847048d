"""How much would fit: the largest micro batch and sequence, the smallest GPU, and the grid of both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from planner.advise.fits import Verdict, verdict
from planner.catalog.gpus import Gpu, gpus
from planner.errors import SetupError
from planner.estimate import estimate
from planner.report import MemoryReport
from planner.spec import Setup

__all__ = ["Cell", "asked_gpu", "grid", "largest_micro_batch", "largest_seq_len", "smallest_gpu", "verdicts"]

_LARGEST = 10**9  # planner.spec refuses more


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One micro batch and sequence length; `verdict` is None where the setup is refused so."""

    micro_batch_size: int
    seq_len: int
    verdict: Verdict | None

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "micro_batch_size": self.micro_batch_size,
            "seq_len": self.seq_len,
            "verdict": self.verdict.to_dict() if self.verdict else None,
        }


def asked_gpu(setup: Setup) -> Gpu:
    """The GPU of the setup. Raises SetupError where none is given."""
    if setup.gpu is None:
        raise SetupError("no GPU is given; give --gpu a name such as h100, or a size such as 24GiB.")
    return setup.gpu


def largest_micro_batch(setup: Setup) -> int | None:
    """The largest micro batch that fits the setup's GPU, 0 where 1 does not fit.

    None where activations are not known, so that any would seem to fit. Raises SetupError without a GPU.
    """
    return _largest_of(setup, "micro_batch_size", _LARGEST)


def largest_seq_len(setup: Setup) -> int | None:
    """The longest sequence that fits the setup's GPU, at most the model's positions; 0 and None as above."""
    return _largest_of(setup, "seq_len", setup.model.max_positions or _LARGEST)


def smallest_gpu(setup: Setup) -> Gpu | None:
    """The GPU of the catalogue with the least memory that fits the run, None where none does."""
    fitting = [card for card, found in verdicts(setup) if found.fits]
    return min(fitting, key=lambda card: (card.total_bytes, card.name), default=None)


def verdicts(setup: Setup) -> tuple[tuple[Gpu, Verdict], ...]:
    """Every GPU of the catalogue that runs it, in its order, with the verdict of this run on it.

    One estimate for each compute capability: the formulas know nothing else of a card.
    """
    reports: dict[tuple[int, int] | None, MemoryReport | None] = {}
    found = []
    for card in gpus():
        if card.capability not in reports:
            reports[card.capability] = _report(setup, gpu=card)
        report = reports[card.capability]
        if report is not None:
            found.append((card, verdict(report, card)))
    return tuple(found)


def grid(setup: Setup, batches: Sequence[int], seq_lens: Sequence[int]) -> tuple[tuple[Cell, ...], ...]:
    """Verdicts by micro batch (rows) and sequence length (columns). Raises SetupError without a GPU."""
    gpu = asked_gpu(setup)
    limit = setup.model.max_positions

    def cell(batch: int, seq_len: int) -> Cell:
        found = None
        if limit is None or seq_len <= limit:
            found = _verdict(setup, batch, seq_len, gpu)
        return Cell(micro_batch_size=batch, seq_len=seq_len, verdict=found)

    return tuple(tuple(cell(batch, seq_len) for seq_len in seq_lens) for batch in batches)


@lru_cache(maxsize=2048)  # 32 grids: another micro batch or sequence length asks for the same cells again
def _verdict(setup: Setup, batch: int, seq_len: int, gpu: Gpu) -> Verdict | None:
    report = _report(setup, micro_batch_size=batch, seq_len=seq_len)
    return None if report is None else verdict(report, gpu)


def _report(setup: Setup, **changes: Any) -> MemoryReport | None:
    """The estimate with some keys changed, None where the setup is refused so."""
    try:
        return estimate(setup.replace(**changes))
    except SetupError:
        return None


def _largest_of(setup: Setup, field: str, limit: int) -> int | None:
    gpu = asked_gpu(setup)
    if estimate(setup).not_known:
        return None

    def fits(size: int) -> bool:
        report = _report(setup, **{field: size})
        return report is not None and verdict(report, gpu).fits

    return _largest(fits, limit)


def _largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number from 1 to `limit` that fits, by doubling and bisection; 0 where 1 does not.

    What fits must be monotone: memory grows with the micro batch and with the sequence.
    """
    low, high = 0, 1
    while high <= limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
