"""A real trace beside the simulated events: where they first differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from planner.simulate.events import Event

__all__ = ["Alignment", "Difference", "alignment"]

_CONTEXT = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """The first block that differs. `number` counts the blocks taken, from 0 (None: that side has ended).

    The ends are numbers too: how many blocks were taken before it was given back (None: it never was).
    """

    number: int
    real: Event | None
    simulated: Event | None
    real_end: int | None = None
    simulated_end: int | None = None
    before: tuple[str, ...] = ()

    @property
    def sentence(self) -> str:
        """What differs, on one line."""
        ends = f"; given back before block {_number(self.real_end)} and {_number(self.simulated_end)}"
        same = self.real is not None and self.simulated is not None
        lived = ends if same and self.real_end != self.simulated_end else ""
        return f"block {self.number}: real {_words(self.real)}; simulated {_words(self.simulated)}{lived}"

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "number": self.number,
            "real": _json(self.real),
            "simulated": _json(self.simulated),
            "real_end": self.real_end,
            "simulated_end": self.simulated_end,
            "before": list(self.before),
        }


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """How far a real trace and the simulation agree.

    `size` is the first block of another size, in the order in which blocks are taken; `lifetime` the first
    block (before that) that is given back in another gap between two others. None: no such difference.
    """

    real_blocks: int
    simulated_blocks: int
    equal_blocks: int
    size: Difference | None
    lifetime: Difference | None

    @property
    def first(self) -> Difference | None:
        """The earlier of the two."""
        return self.lifetime or self.size

    @property
    def sentence(self) -> str:
        """The verdict, on one line."""
        if self.first is None:
            return f"All {self.real_blocks:,} blocks agree in size, order and lifetime."
        kind = "lifetime" if self.lifetime is not None else "size"
        return (
            f"The first {self.equal_blocks:,} blocks have equal sizes (of {self.real_blocks:,} real and "
            f"{self.simulated_blocks:,} simulated). First other {kind}: {self.first.sentence}."
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "real_blocks": self.real_blocks,
            "simulated_blocks": self.simulated_blocks,
            "equal_blocks": self.equal_blocks,
            "first_other_size": self.size.to_dict() if self.size else None,
            "first_other_lifetime": self.lifetime.to_dict() if self.lifetime else None,
            "sentence": self.sentence,
        }


def alignment(real: Sequence[Event], simulated: Sequence[Event]) -> Alignment:
    """Compare both block by block, in the order in which blocks are taken.

    Blocks given back between the same two others may be given back in any order: that changes no peak.
    """
    ours, theirs = _blocks(real), _blocks(simulated)
    equal = 0
    while equal < min(len(ours), len(theirs)) and ours[equal][0].size_bytes == theirs[equal][0].size_bytes:
        equal += 1
    size = None
    if equal < max(len(ours), len(theirs)):
        size = _difference(equal, ours, theirs)
    lifetime = None
    for number in range(equal):
        ends = ours[number][1], theirs[number][1]
        if ends[0] != ends[1] and min(ends) < equal:
            lifetime = _difference(number, ours, theirs)
            break
    return Alignment(
        real_blocks=len(ours), simulated_blocks=len(theirs), equal_blocks=equal, size=size, lifetime=lifetime
    )


_NEVER = 1 << 62


def _blocks(events: Sequence[Event]) -> list[tuple[Event, int]]:
    """Every block taken, with the number of blocks taken before it was given back (or never)."""
    taken: list[Event] = []
    index: dict[int, int] = {}
    ends: list[int] = []
    for event in events:
        if event.freed:
            ends[index[event.block]] = len(taken)
        else:
            index[event.block] = len(taken)
            taken.append(event)
            ends.append(_NEVER)
    return list(zip(taken, ends, strict=True))


def _difference(
    number: int, ours: Sequence[tuple[Event, int]], theirs: Sequence[tuple[Event, int]]
) -> Difference:
    before = [
        f"{n}: {event.size_bytes:,} bytes, {theirs[n][0].site or event.site or 'no site'}"
        for n, (event, _) in enumerate(ours[:number])
        if n >= number - _CONTEXT and n < len(theirs)
    ]
    return Difference(
        number=number,
        real=ours[number][0] if number < len(ours) else None,
        simulated=theirs[number][0] if number < len(theirs) else None,
        real_end=_end(ours, number),
        simulated_end=_end(theirs, number),
        before=tuple(before),
    )


def _end(blocks: Sequence[tuple[Event, int]], number: int) -> int | None:
    return blocks[number][1] if number < len(blocks) and blocks[number][1] < _NEVER else None


def _number(end: int | None) -> str:
    return "none" if end is None else str(end)


def _words(event: Event | None) -> str:
    if event is None:
        return "has ended"
    step = f" of step {event.step}" if event.step else ""
    where = f" in {event.phase.replace('_', ' ')}{step}" if event.phase else ""
    return f"{event.size_bytes:,} bytes{where}{f' ({event.site})' if event.site else ''}"


def _json(event: Event | None) -> dict[str, Any] | None:
    if event is None:
        return None
    return {"size_bytes": event.size_bytes, "phase": event.phase, "step": event.step, "site": event.site}
