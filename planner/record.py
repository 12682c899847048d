"""One recorded run: what was measured, on what, and what was predicted at the same moment.

A record is one JSON object on one line; `planner.measure.records` keeps the files. Nothing here reads one.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from planner.catalog.gpus import Gpu, multiprocessors_of
from planner.errors import PlannerError
from planner.report import MemoryReport
from planner.spec import Setup, Training

__all__ = [
    "SCHEMA",
    "Device",
    "Nearest",
    "Origin",
    "Prediction",
    "Record",
    "nearest_record",
    "setup_key",
]

SCHEMA = 1
Origin = Literal["packaged", "own", "uploaded", "other"]
_SIZES = ("micro_batch_size", "seq_len", "gradient_accumulation_steps", "lora_rank", "adapter_size")
_VERSIONS = ("torch", "cuda", "transformers", "peft", "accelerate", "planner")


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """The measuring device as CUDA and its driver name it; `total_bytes` is CUDA's totalGlobalMem."""

    name: str
    capability: tuple[int, int]
    total_bytes: int
    driver: str

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Device:
        """From JSON values; others are ignored. Raises KeyError, IndexError, TypeError or ValueError."""
        capability = values["capability"]
        return cls(
            name=values["name"],
            capability=(int(capability[0]), int(capability[1])),
            total_bytes=int(values["total_bytes"]),
            driver=values["driver"],
        )

    @property
    def gpu(self) -> Gpu:
        """The same as a GPU to plan for."""
        return Gpu(
            name=self.name,
            driver_name=self.name,
            total_bytes=self.total_bytes,
            memory_kind="torch",
            capability=self.capability,
            source=f"read on the device, driver {self.driver}",
            multiprocessors=multiprocessors_of(self.name),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**dataclasses.asdict(self), "capability": list(self.capability)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """A predicted report, or in one line why there is none."""

    report: MemoryReport | None = None
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The report's JSON object without its timeline, or {"error": reason}."""
        if self.report is None:
            return {"error": self.reason}
        return dataclasses.replace(self.report, timeline=()).to_dict()

    @classmethod
    def from_dict(cls, answer: Mapping[str, Any]) -> Prediction:
        """The other way round. Raises PlannerError."""
        if "error" in answer:
            return cls(reason=str(answer["error"]))
        return cls(report=MemoryReport.from_dict(answer))


@dataclass(frozen=True, kw_only=True)
class Record:
    """One run on a CUDA device with both predictions of the same moment and the same libraries.

    `date` is ISO 8601 in UTC. `set` names the list of setups it belongs to ("matrix", "unseen", ...; ""
    for a single run). `environment` holds the allocator's settings. `origin` and `place` (file:line) say
    where it was read; they are not stored.
    """

    setup: Mapping[str, Any]
    report: MemoryReport
    device: Device
    versions: Mapping[str, str]
    date: str
    seed: int
    command: str
    estimate: Prediction
    simulation: Prediction
    set: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    origin: Origin = field(default="other", compare=False)
    place: str = field(default="", compare=False)

    @property
    def key(self) -> str:
        """The setup in one canonical line; equal keys are runs of one setup."""
        return setup_key(self.setup)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of one line."""
        return {
            "schema": SCHEMA,
            "date": self.date,
            "set": self.set,
            "command": self.command,
            "seed": self.seed,
            "device": self.device.to_dict(),
            "versions": dict(self.versions),
            "environment": dict(self.environment),
            "setup": dict(self.setup),
            "report": self.report.to_dict(),
            "estimate": self.estimate.to_dict(),
            "simulation": self.simulation.to_dict(),
        }

    @classmethod
    def from_dict(cls, line: Any, *, origin: Origin = "other", place: str = "") -> Record:
        """A record from one line's JSON object. Raises PlannerError that says what is wrong with it."""
        if not isinstance(line, Mapping):
            raise PlannerError("not a JSON object")
        if line.get("schema") != SCHEMA:
            raise PlannerError(f"schema {line.get('schema')!r}, and this version reads schema {SCHEMA}")
        try:
            record = cls(
                setup=dict(line["setup"]),
                report=MemoryReport.from_dict(line["report"]),
                device=Device.from_dict(line["device"]),
                versions=dict(line["versions"]),
                date=str(line["date"]),
                seed=int(line["seed"]),
                command=str(line["command"]),
                estimate=Prediction.from_dict(line["estimate"]),
                simulation=Prediction.from_dict(line["simulation"]),
                set=str(line.get("set", "")),
                environment=dict(line.get("environment", {})),
                origin=origin,
                place=place,
            )
        except (KeyError, IndexError) as error:
            raise PlannerError(f"{error} is missing") from None
        except (TypeError, ValueError) as error:
            raise PlannerError(f"a value has the wrong type ({error})") from None
        _check(record, line["report"])
        return record


_USUAL: dict[str, Any] = {item.name: item.default for item in dataclasses.fields(Training)}


def setup_key(setup: Mapping[str, Any]) -> str:
    """The setup's JSON values without the GPU they were planned for, in one order.

    What the training has at its default is left out: a setting that a later version adds changes no key.
    """
    kept = {k: v for k, v in setup.items() if k != "gpu" and (k not in _USUAL or v != _USUAL[k])}
    return json.dumps(kept, sort_keys=True, separators=(",", ":"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Nearest:
    """A record for a setup: of exactly this one, or the nearest, with what is different in it."""

    record: Record
    differences: tuple[str, ...]

    @property
    def exact(self) -> bool:
        """Whether it is a run of this very setup."""
        return not self.differences

    @property
    def label(self) -> str:
        """"measured", or "nearest measured run (seq_len 1024 instead of 512)"."""
        if self.exact:
            return "measured"
        return f"nearest measured run ({', '.join(self.differences)})"


def nearest_record(setup: Setup, records: Iterable[Record]) -> Nearest | None:
    """The record of this setup, or of the setup that differs least; None where none has its model and method.

    The latest of equal ones. Least: fewest different settings, then the smallest ratio between sizes.
    """
    wanted = setup.to_dict()
    key = setup_key(wanted)
    best: tuple[tuple[float, ...], Nearest] | None = None
    for record in sorted(records, key=lambda record: record.date, reverse=True):
        if record.key == key:
            return Nearest(record=record, differences=())
        recorded = {**_USUAL, **record.setup}  # a setting that came later was at its default
        if any(recorded.get(name) != wanted[name] for name in ("model", "method")):
            continue
        names = [
            name
            for name in wanted
            if name not in ("gpu", "model_config") and recorded.get(name) != wanted[name]
        ]
        ratio = 1.0
        for name in names:
            ours, theirs = wanted[name], recorded.get(name)
            if name in _SIZES and ours and theirs:
                ratio *= max(ours, theirs) / min(ours, theirs)
        distance = (float(len(names)), ratio)
        if best is None or distance < best[0]:
            words = tuple(f"{name} {recorded.get(name)} instead of {wanted[name]}" for name in names)
            best = distance, Nearest(record=record, differences=words or ("another model_config",))
    return best[1] if best else None


def _check(record: Record, stored: Mapping[str, Any]) -> None:
    """Refuse what is no measurement, or contradicts itself."""
    report = record.report
    sources = [("report", report.source, "measurement")]
    if record.estimate.report:
        sources.append(("estimate", record.estimate.report.source, "estimate"))
    if record.simulation.report:
        sources.append(("simulation", record.simulation.report.source, "simulation"))
    for name, source, wanted in sources:
        if source != wanted:
            raise PlannerError(f"{name} is a {source}, not a {wanted}")
    if stored.get("peak_allocated_bytes") != report.peak_allocated_bytes:
        raise PlannerError(
            f"the parts sum to {report.peak_allocated_bytes} bytes, the peak says "
            f"{stored.get('peak_allocated_bytes')}"
        )
    if report.out_of_memory is None and report.peak_allocated_bytes <= 0:
        raise PlannerError("no memory was measured")
    if setup_key(report.setup) != record.key:
        raise PlannerError("the report belongs to another setup")
    for name in _VERSIONS:
        if not isinstance(record.versions.get(name), str):
            raise PlannerError(f"the version of {name} is missing")
    if not isinstance(record.device.name, str) or not record.device.name or record.device.total_bytes <= 0:
        raise PlannerError("the device has no name or no memory")
