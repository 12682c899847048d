"""What is answered: the same report for the estimate, the simulation and the measurement."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from planner.errors import PlannerError
from planner.units import gib

__all__ = [
    "PARTS",
    "LoadingBand",
    "MemoryReport",
    "OutOfMemory",
    "Parameters",
    "Parts",
    "PeakSite",
    "Phase",
    "Source",
    "early_peak_note",
]

SCHEMA = 1
Source = Literal["estimate", "simulation", "measurement"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """Bytes alive at the moment of the peak, by what they are for; they sum to the peak.

    `temporaries` live within one operation or one layer's backward; `workspace` is what the matrix
    library keeps. For a measurement, parts known only by subtraction are named in the report.
    """

    base_weights: int = 0
    adapter_weights: int = 0
    gradients: int = 0
    optimizer_states: int = 0
    activations: int = 0
    logits_and_loss: int = 0
    temporaries: int = 0
    workspace: int = 0

    @property
    def total_bytes(self) -> int:
        """Sum of all parts: the peak. The only place where a total is made."""
        return sum(getattr(self, name) for name in PARTS)

    def to_dict(self) -> dict[str, int]:
        """The parts by name, in their fixed order."""
        return {name: getattr(self, name) for name in PARTS}


PARTS: tuple[str, ...] = tuple(f.name for f in dataclasses.fields(Parts))


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameters:
    """Numbers of parameters: base and adapter together as `total`, as peft counts."""

    total: int
    trainable: int
    added: int = 0

    @property
    def frozen(self) -> int:
        """Parameters that are not trained."""
        return self.total - self.trainable

    @property
    def trainable_share(self) -> float:
        """Trained parameters divided by all, 0 to 1."""
        return self.trainable / self.total

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "total": self.total,
            "trainable": self.trainable,
            "frozen": self.frozen,
            "added": self.added,
            "trainable_share": self.trainable_share,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """A stretch of the run: `load`, `attach`, then `forward`, `backward`, `optimizer_step` of each step.

    `allocated_bytes` at its end, `peak_allocated_bytes` within it; `step` counts from 1, None before.
    """

    name: str
    allocated_bytes: int
    peak_allocated_bytes: int
    step: int | None = None
    reserved_bytes: int | None = None
    peak_reserved_bytes: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PeakSite:
    """Where the peak is: the operation and the module that runs it."""

    op: str
    module: str


@dataclass(frozen=True, kw_only=True, slots=True)
class OutOfMemory:
    """A run that did not fit: in which phase, what was asked for, what was free."""

    phase: str
    requested_bytes: int
    free_bytes: int
    op: str = ""
    module: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadingBand:
    """What the order in which a quantized model's weights arrive can change: (lowest, highest) bytes.

    `resident_bytes` are allocated before the first step, `step_bytes` is what the steps peak above that, and
    `peak_allocated_bytes` their peak; `orders` is how many were simulated.
    """

    resident_bytes: tuple[int, int]
    step_bytes: tuple[int, int]
    peak_allocated_bytes: tuple[int, int]
    orders: int

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoadingBand:
        """From its JSON object. Raises KeyError, TypeError or ValueError."""
        sizes = ("resident_bytes", "step_bytes", "peak_allocated_bytes")
        resident, step, peak = ((int(values[name][0]), int(values[name][1])) for name in sizes)
        return cls(
            resident_bytes=resident,
            step_bytes=step,
            peak_allocated_bytes=peak,
            orders=int(values["orders"]),
        )


@dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """The answer to one setup.

    `parts` are alive at the peak of allocated memory and sum to it; `phases` in order; reserved is the
    allocator's segments (None where not known). `not_known` lists parts that could not be determined
    and count as 0; `by_subtraction` those of a measurement that are a remainder. `timeline` is
    (event number, allocated bytes) pairs. `provenance` says versions, source and time. `loading_band` is of
    the simulation of a quantized model. Of one rank among several: `host_bytes` are its shards in the host's
    memory, `nccl_bytes` NCCL's own on the card outside torch, (usual, largest).
    """

    source: Source
    setup: Mapping[str, Any]
    parameters: Parameters
    parts: Parts
    phases: tuple[Phase, ...]
    peak_phase: str
    peak_reserved_bytes: int | None = None
    not_known: tuple[str, ...] = ()
    by_subtraction: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    peak_site: PeakSite | None = None
    out_of_memory: OutOfMemory | None = None
    timeline: tuple[tuple[int, int], ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    host_bytes: int | None = None
    nccl_bytes: tuple[int, int] | None = None
    loading_band: LoadingBand | None = None

    @property
    def peak_allocated_bytes(self) -> int:
        """Peak of allocated memory: the sum of the parts."""
        return self.parts.total_bytes

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of the command line's contract; `from_dict` gives an equal report."""
        answer: dict[str, Any] = {
            "schema": SCHEMA,
            "source": self.source,
            "setup": dict(self.setup),
            "parameters": self.parameters.to_dict(),
            "parts": self.parts.to_dict(),
            "phases": [_without_none(dataclasses.asdict(phase)) for phase in self.phases],
            "peak_allocated_bytes": self.peak_allocated_bytes,
            "peak_reserved_bytes": self.peak_reserved_bytes,
            "peak_phase": self.peak_phase,
            "not_known": list(self.not_known),
            "by_subtraction": list(self.by_subtraction),
            "notes": list(self.notes),
            "provenance": dict(self.provenance),
        }
        if self.peak_site:
            answer["peak_site"] = dataclasses.asdict(self.peak_site)
        if self.out_of_memory:
            answer["out_of_memory"] = dataclasses.asdict(self.out_of_memory)
        if self.host_bytes is not None:
            answer["host_bytes"] = self.host_bytes
        if self.nccl_bytes is not None:
            answer["nccl_bytes"] = list(self.nccl_bytes)
        if self.loading_band:
            answer["loading_band"] = {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in dataclasses.asdict(self.loading_band).items()
            }
        if self.timeline:
            answer["timeline"] = [list(point) for point in self.timeline]
        return answer

    @classmethod
    def from_dict(cls, answer: Mapping[str, Any]) -> MemoryReport:
        """A report from its JSON object. Raises PlannerError for another schema or missing keys."""
        if answer.get("schema") != SCHEMA:
            raise PlannerError(
                f"a report of schema {answer.get('schema')!r} was given; this version reads schema {SCHEMA}."
            )
        try:
            parameters = answer["parameters"]
            site, failure = answer.get("peak_site"), answer.get("out_of_memory")
            nccl, band = answer.get("nccl_bytes"), answer.get("loading_band")
            return cls(
                source=answer["source"],
                setup=answer["setup"],
                parameters=Parameters(
                    total=parameters["total"],
                    trainable=parameters["trainable"],
                    added=parameters.get("added", 0),
                ),
                parts=Parts(**answer["parts"]),
                phases=tuple(Phase(**phase) for phase in answer["phases"]),
                peak_phase=answer["peak_phase"],
                peak_reserved_bytes=answer["peak_reserved_bytes"],
                not_known=tuple(answer.get("not_known", ())),
                by_subtraction=tuple(answer.get("by_subtraction", ())),
                notes=tuple(answer.get("notes", ())),
                peak_site=PeakSite(**site) if site else None,
                out_of_memory=OutOfMemory(**failure) if failure else None,
                timeline=tuple((int(at), int(size)) for at, size in answer.get("timeline", ())),
                provenance=answer.get("provenance", {}),
                host_bytes=answer.get("host_bytes"),
                nccl_bytes=None if nccl is None else (int(nccl[0]), int(nccl[1])),
                loading_band=LoadingBand.from_dict(band) if band else None,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise PlannerError(f"not a memory report: {error}.") from None


def early_peak_note(report: MemoryReport) -> str | None:
    """What the steps need where the peak is none of theirs: the parts say nothing of them then."""
    steps = [phase.peak_allocated_bytes for phase in report.phases if phase.step is not None]
    if report.peak_phase not in ("load", "attach") or not steps:
        return None
    when = "while the model is loaded" if report.peak_phase == "load" else "while the method is attached"
    return f"The peak is before the first step, {when}; the steps need at most {gib(max(steps))}."


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
