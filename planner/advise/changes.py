"""What to change so that a run needs less memory: each change with its price, its saving and its peak."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from planner.advise.fits import verdict
from planner.advise.ideas import IDEAS, LORA, PRICES, Idea, Price
from planner.catalog.gpus import Gpu
from planner.errors import SetupError, nearest
from planner.estimate import estimate
from planner.report import MemoryReport
from planner.spec import METHODS, Setup

__all__ = ["Change", "applied", "changes", "nearest_fitting"]

_Open = tuple[Idea, Mapping[str, Any]]  # a change that applies, and its keys
_COST_AT_ONCE: dict[Price, str] = {
    "nothing": "nothing",
    "time": "some time",
    "method": "the method, and some time",
}


@dataclass(frozen=True, kw_only=True)
class Change:
    """One change of a setup: in words, what it costs, the flat keys to set, and what comes of it.

    Bytes of peak allocated memory; `fits` is None without a GPU, or where activations are not known.
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


def applied(setup: Setup, keys: Mapping[str, Any]) -> Setup:
    """The setup with flat keys changed; with `method` among them, the method's own keys start afresh.

    Raises SetupError as Setup does.
    """
    rest = dict(keys)
    name = rest.pop("method", None)
    if name is None:
        return setup.replace(**rest)
    if name not in METHODS:
        raise SetupError(f"unknown method {name!r}; {nearest(str(name), METHODS)}")
    cls = METHODS[name]
    own = {key: rest.pop(key) for key in list(rest) if key in cls.__dataclass_fields__}
    return setup.replace(method=cls(**own), **rest)


def changes(setup: Setup) -> tuple[Change, ...]:
    """The changes that lower the peak, cheapest for the user first, then by what they save.

    One of them takes at once all that cost nothing or only time, and under full fine-tuning another one
    LoRA as well. With a GPU each says whether it fits.
    """
    before = estimate(setup)
    open_to = [(idea, keys) for idea in IDEAS if (keys := _possible(setup, idea)) is not None]
    harmless = [item for item in open_to if item[0].price in ("nothing", "time") and item[0].at_once]
    lora = [item for item in open_to if item[0] is LORA]
    found = [_change(setup, before, [item]) for item in open_to]
    for together in (harmless, [*harmless, *lora] if lora else []):
        several = _needed(setup, together) if _goes_together(setup, together) else []
        if len(several) > 1:
            found.append(_change(setup, before, several))
    saving = {tuple(change.keys.items()): change for change in found if change.saving_bytes > 0}
    return tuple(
        sorted(saving.values(), key=lambda change: (PRICES.index(change.price), -change.saving_bytes))
    )


def nearest_fitting(found: Sequence[Change]) -> Change | None:
    """The change that fits and costs the user least; of equals the one that changes, then saves least."""
    fitting = [change for change in found if change.fits]
    return min(
        fitting,
        key=lambda change: (PRICES.index(change.price), len(change.keys), change.saving_bytes),
        default=None,
    )


def _possible(setup: Setup, idea: Idea) -> Mapping[str, Any] | None:
    """The keys of a change, None where it does not apply or the model cannot take it."""
    keys = idea.keys(setup)
    return keys if keys is not None and _goes_together(setup, [(idea, keys)]) else None


def _goes_together(setup: Setup, several: list[_Open]) -> bool:
    """Whether the setup with all these changes is one that is taken."""
    try:
        applied(setup, _merged(several))
    except SetupError:
        return False
    return True


def _needed(setup: Setup, several: list[_Open]) -> list[_Open]:
    """Of these changes, those without which the peak of all would be higher; the dearest go first."""
    lowest_bytes = _peak_bytes(setup, several)
    needed = several
    for item in reversed(several):
        fewer = [other for other in needed if other is not item]
        if _goes_together(setup, fewer) and _peak_bytes(setup, fewer) <= lowest_bytes:
            needed = fewer
    return needed


def _merged(several: list[_Open]) -> dict[str, Any]:
    return {key: value for _, keys in several for key, value in keys.items()}


def _peak_bytes(setup: Setup, several: list[_Open]) -> int:
    return estimate(applied(setup, _merged(several))).peak_allocated_bytes


def _change(setup: Setup, before: MemoryReport, several: list[_Open]) -> Change:
    keys = _merged(several)
    after = estimate(applied(setup, keys))
    dearest = max((idea for idea, _ in several), key=lambda idea: PRICES.index(idea.price))
    shorts = ", ".join(idea.short.format(**own) for idea, own in several)
    return Change(
        words=dearest.words.format(**keys) if len(several) == 1 else f"All at once: {shorts}",
        price=dearest.price,
        cost=dearest.cost if len(several) == 1 else _COST_AT_ONCE[dearest.price],
        keys=keys,
        peak_allocated_bytes=after.peak_allocated_bytes,
        saving_bytes=before.peak_allocated_bytes - after.peak_allocated_bytes,
        fits=_fits(after, setup.gpu),
    )


def _fits(report: MemoryReport, gpu: Gpu | None) -> bool | None:
    if gpu is None:
        return None
    found = verdict(report, gpu)
    return None if found.word == "not known" else found.fits
