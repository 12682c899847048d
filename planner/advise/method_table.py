"""All methods for one model, sorted by peak, and why that is not the order of their trainable parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from planner.advise.default_methods import REFERENCE, default_methods
from planner.errors import PlannerError, SetupError
from planner.estimate import estimate
from planner.report import PARTS, MemoryReport
from planner.spec import Setup
from planner.units import count, gib, percent

__all__ = ["MethodRow", "MethodTable", "method_table"]

Answers = Callable[[Setup], MemoryReport]
_WHY = {
    "base_weights": "the model's own weights, quantized in one of the two",
    "adapter_weights": "tensors that the method adds, trained or not",
    "gradients": "one number for each trained parameter",
    "optimizer_states": "the optimizer's numbers for each trained parameter",
    "activations": "what layers keep for the backward pass: inputs, often cast to fp32, and rebuilt weights",
    "logits_and_loss": "logits and the loss, which are alive at that peak",
    "temporaries": "copies within one operation, such as weights that are rebuilt or dequantized",
    "workspace": "the matrix library's workspace",
}


@dataclass(frozen=True, kw_only=True)
class MethodRow:
    """One method: its report, or the `reason` why there is none. Bytes are those of the report's peak."""

    title: str
    setup: Setup | None
    report: MemoryReport | None
    reason: str = ""

    @property
    def trainable(self) -> int | None:
        """Trained parameters, None where the report does not know them."""
        if self.report is None:
            return None
        known = "adapter_weights" not in self.report.not_known or self.report.parameters.trainable
        return self.report.parameters.trainable if known else None

    @property
    def peak_bytes(self) -> int | None:
        """Peak of allocated memory, None where a part of it is not known."""
        if self.report is None or self.report.not_known:
            return None
        return self.report.peak_allocated_bytes

    def difference(self, other: MethodRow) -> tuple[str, int] | None:
        """The part in which the two peaks differ most, and the bytes above `other` (below: negative)."""
        if self.peak_bytes is None or other.peak_bytes is None or self is other:
            return None
        assert self.report is not None
        assert other.report is not None
        mine, theirs = self.report.parts, other.report.parts
        part = max(PARTS, key=lambda name: abs(getattr(mine, name) - getattr(theirs, name)))
        more_bytes = getattr(mine, part) - getattr(theirs, part)
        return (part, more_bytes) if more_bytes else None


@dataclass(frozen=True, kw_only=True)
class MethodTable:
    """Rows from the smallest peak up, then those whose peak is not known; `left_out` do not apply."""

    rows: tuple[MethodRow, ...]
    left_out: tuple[MethodRow, ...]

    @property
    def reference(self) -> MethodRow | None:
        """The row that others are compared with: LoRA of rank 8, or the smallest peak."""
        known = [row for row in self.rows if row.peak_bytes is not None]
        return next((row for row in known if row.title == REFERENCE), known[0] if known else None)

    @property
    def sentence(self) -> str:
        """Why the order by peak is not the order by trainable parameters, from this table's numbers."""
        return f"{_sentence(self.rows)}{self._mostly()}"

    def _mostly(self) -> str:
        """In how many rows which part differs most from the reference's."""
        if self.reference is None:
            return ""
        found = Counter(d[0] for row in self.rows if (d := row.difference(self.reference)))
        parts = [f"{part.replace('_', ' ')} in {times}" for part, times in found.most_common()]
        return f" What differs most from {self.reference.title}: {', '.join(parts)}." if parts else ""

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "rows": [_flat(row, self.reference) for row in self.rows],
            "left_out": [{"title": row.title, "reason": row.reason} for row in self.left_out],
            "compared_with": self.reference.title if self.reference else None,
            "sentence": self.sentence,
        }


def method_table(setup: Setup, answers: Answers = estimate) -> MethodTable:
    """Every usual method for the setup's model and training, sorted by peak allocated memory.

    `answers` gives a report for a setup: `planner.estimate` (where a formula is known), or
    `planner.simulate` for all. The method of `setup` itself only decides LoRA's target modules. Excludes
    methods that need trained adapters; see planner.advise.default_methods for the settings of each.
    Raises SetupError for a bare number of parameters, which has no layers to adapt.
    """
    if setup.model.is_bare:
        raise SetupError(
            f"{setup.model.id} is only a number of parameters, and methods differ by the model's layers; "
            "give a model's id or config.json."
        )
    rows = []
    for named in default_methods(setup):
        if named.setup is None:
            rows.append(MethodRow(title=named.title, setup=None, report=None, reason=named.reason))
            continue
        try:
            report, reason = answers(named.setup), ""
        except PlannerError as error:
            report, reason = None, str(error)
        rows.append(MethodRow(title=named.title, setup=named.setup, report=report, reason=reason))
    there = [row for row in rows if row.report is not None]
    return MethodTable(
        rows=tuple(sorted(there, key=lambda row: (row.peak_bytes is None, row.peak_bytes or 0))),
        left_out=tuple(row for row in rows if row.report is None),
    )


def _sentence(rows: Sequence[MethodRow]) -> str:
    """The pair that stands most against the order, by peak and trainable parameters; equal weights first."""
    known = [row for row in rows if row.peak_bytes is not None and row.trainable]
    pairs = [
        (low, high)
        for low, high in combinations(known, 2)
        if low.peak_bytes != high.peak_bytes and low.trainable != high.trainable
    ]
    against = [(low, high) for low, high in pairs if _trained(high) < _trained(low)]
    if len(known) < 2:
        return "Too few peaks are known here to compare their order."
    if not against:
        return "The order by peak is here the order of the trainable parameters."
    same = [pair for pair in against if _base(pair[0]) == _base(pair[1])] or against
    low, high = max(same, key=_gap)
    part, more_bytes = high.difference(low) or ("activations", 0)
    return (
        f"The order is not that of the trainable parameters: {percent(len(against) / len(pairs))} of all "
        f"pairs stand the other way round. {high.title} trains {count(_trained(high))} parameters and peaks "
        f"at {gib(_peak(high))}, {low.title} trains {count(_trained(low))} and peaks at {gib(_peak(low))}; "
        f"{gib(more_bytes)} of that are {part.replace('_', ' ')}: {_WHY[part]}."
    )


def _gap(pair: tuple[MethodRow, MethodRow]) -> float:
    """How far a pair stands against the order: times fewer parameters, times bytes more."""
    low, high = pair
    times_fewer: float = (_trained(low) / _trained(high)) ** 0.25
    return times_fewer * (_peak(high) - _peak(low))


def _trained(row: MethodRow) -> int:
    return row.trainable or 0


def _peak(row: MethodRow) -> int:
    return row.peak_bytes or 0


def _base(row: MethodRow) -> int:
    return row.report.parts.base_weights if row.report else 0


def _flat(row: MethodRow, reference: MethodRow | None) -> dict[str, Any]:
    assert row.report is not None
    assert row.setup is not None
    flat = row.setup.to_dict()
    own = {"method", "peft_config", "lora_rank", "target_modules", "adapter_kind", "quantization"}
    found: dict[str, Any] = {
        "title": row.title,
        **{key: flat[key] for key in flat if key in own},
        "source": row.report.source,
        "trainable": row.trainable,
        "peak_allocated_bytes": row.peak_bytes,
        "peak_phase": row.report.peak_phase if row.peak_bytes is not None else None,
        "parts": row.report.parts.to_dict(),
        "not_known": list(row.report.not_known),
    }
    difference = row.difference(reference) if reference else None
    if difference:
        found["difference"] = {"part": difference[0], "bytes": difference[1]}
    return found
