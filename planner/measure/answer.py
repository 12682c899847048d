"""From the events of a measuring process to a report: a pure function, so that a stream can be replayed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from planner.errors import DeviceError, ModelError, PlannerError, SetupError, TraceError
from planner.optimizers import paged_note
from planner.record import Device
from planner.report import PARTS, MemoryReport, OutOfMemory, Parameters, Parts, Phase
from planner.spec import Setup

__all__ = ["Readings", "Rehearsal", "RehearsedPhase", "measured_report", "readings", "rehearsal", "reraise"]

_ERRORS: dict[str, type[PlannerError]] = {
    cls.__name__: cls for cls in (DeviceError, ModelError, PlannerError, SetupError, TraceError)
}
# Which part takes the bytes of a phase's peak that no tensor accounts for.
_REMAINDER = {"load": "base_weights", "attach": "adapter_weights", "optimizer_step": "temporaries"}
_REMAINDER_OF_STEP = "activations"


@dataclass(frozen=True, kw_only=True, slots=True)
class RehearsedPhase:
    """One phase of a rehearsal and how long it took on the CPU."""

    name: str
    step: int | None
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """The same process and the same step on the CPU. Not a measurement: no memory is claimed."""

    setup: Mapping[str, Any]
    parameters: Parameters
    phases: tuple[RehearsedPhase, ...]
    versions: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `source` is "rehearsal", and there is no byte in it."""
        return {
            "source": "rehearsal",
            "setup": dict(self.setup),
            "parameters": self.parameters.to_dict(),
            "phases": [{"name": p.name, "step": p.step, "seconds": p.seconds} for p in self.phases],
            "versions": dict(self.versions),
        }


@dataclass(frozen=True, kw_only=True)
class Readings:
    """The events of one run, sorted by what they say."""

    started: Mapping[str, Any]
    phases: tuple[Mapping[str, Any], ...]
    parameters: Mapping[str, int] | None = None
    device: Mapping[str, Any] | None = None
    workspace_bytes: int | None = None
    paged_bytes: int = 0
    out_of_memory: Mapping[str, Any] | None = None
    done: bool = False
    notes: tuple[str, ...] = ()

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the libraries in the measuring process."""
        return {str(k): str(v) for k, v in self.started["versions"].items()}

    @property
    def found_device(self) -> Device:
        """The device that was measured on. Raises PlannerError where no CUDA device was."""
        if self.device is None:
            raise PlannerError("these events come from no CUDA device; only one gives a measurement.")
        return Device.from_dict(self.device)


def reraise(event: Mapping[str, Any]) -> None:
    """Raise the error that an event of the kind "refused" carries."""
    raise _ERRORS.get(str(event.get("error")), PlannerError)(str(event.get("message")))


def readings(events: Iterable[Mapping[str, Any]]) -> Readings:
    """Sort a run's events. Raises the error the run ended with, PlannerError where they are cut short."""
    started: Mapping[str, Any] = {}
    values: dict[str, Any] = {}
    phases: list[Mapping[str, Any]] = []
    notes: list[str] = []
    for event in events:
        kind = event.get("event")
        if kind == "refused":
            reraise(event)
        elif kind == "started":
            started = event
        elif kind == "phase":
            phases.append(event)
        elif kind in ("parameters", "device", "out_of_memory"):
            values[kind] = event
        elif kind == "note":
            notes.append(str(event["text"]))
        elif kind == "workspace":
            values["workspace_bytes"] = event["workspace_bytes"]
        elif kind == "paged":
            values["paged_bytes"] = event["paged_bytes"]
        elif kind == "done":
            values["done"] = True
    if not started or not phases or "parameters" not in values:
        raise PlannerError("the measuring process ended before its first phase; measure again.")
    if not values.get("done"):
        last = phases[-1]["name"].replace("_", " ")
        raise PlannerError(f"the measuring process ended after {last}, before its run did; measure again.")
    return Readings(started=started, phases=tuple(phases), notes=tuple(notes), **values)


def rehearsal(setup: Setup, found: Readings) -> Rehearsal:
    """The rehearsal that these events describe."""
    assert found.parameters is not None
    return Rehearsal(
        setup=setup.to_dict(),
        parameters=_parameters(found.parameters),
        phases=tuple(
            RehearsedPhase(name=p["name"], step=p["step"], seconds=p["seconds"]) for p in found.phases
        ),
        versions=found.versions,
    )


def measured_report(setup: Setup, found: Readings, *, date: str, command: str = "") -> MemoryReport:
    """The report of a run on a CUDA device. Raises PlannerError where the events are no such run's."""
    device = found.found_device
    assert found.device is not None
    assert found.parameters is not None
    phases = [_whole_phase(p) for p in found.phases]
    peak = max(reversed(phases), key=lambda p: p["peak_allocated_bytes"])
    parts, known = _parts(peak, found.workspace_bytes)
    remainder = _REMAINDER.get(peak["name"], _REMAINDER_OF_STEP)
    contexts = [
        p["device_used_bytes"] - (found.device["others_bytes"] or 0) - p["reserved_bytes"] for p in phases
    ]
    failure = found.out_of_memory
    return MemoryReport(
        source="measurement",
        setup=setup.to_dict(),
        parameters=_parameters(found.parameters),
        parts=Parts(**parts),
        phases=tuple(
            Phase(
                name=p["name"],
                step=p["step"],
                allocated_bytes=p["allocated_bytes"],
                peak_allocated_bytes=p["peak_allocated_bytes"],
                reserved_bytes=p["reserved_bytes"],
                peak_reserved_bytes=p["peak_reserved_bytes"],
            )
            for p in phases
        ),
        peak_phase=peak["name"],
        peak_reserved_bytes=max(p["peak_reserved_bytes"] for p in phases),
        not_known=tuple(name for name in PARTS if name not in known and name != remainder),
        by_subtraction=(remainder,),
        notes=_notes(remainder, known, found),
        out_of_memory=None if failure is None else _out_of_memory(failure),
        provenance={
            **found.versions,
            "date": date,
            "command": command,
            "seed": found.started["seed"],
            "environment": dict(found.started["environment"]),
            "device": device.name,
            "capability": list(device.capability),
            "total_bytes": device.total_bytes,
            "driver": device.driver,
            "device_used_bytes": max(p["device_used_bytes"] for p in phases),
            "device_used_source": found.device["used_source"],
            "others_bytes": found.device["others_bytes"],
            "context_bytes": max(contexts),
            "alloc_retries": max(p["retries"] for p in phases),
            **({"paged_bytes": found.paged_bytes} if found.paged_bytes else {}),
        },
    )


def _parameters(event: Mapping[str, int]) -> Parameters:
    return Parameters(total=event["total"], trainable=event["trainable"], added=event["added"])


def _whole_phase(phase: Mapping[str, Any]) -> dict[str, Any]:
    """A phase whose peak is also that of what happened between the phase before and it."""
    peak = max(phase["peak_allocated_bytes"], phase["between_peak_bytes"])
    return {**phase, "peak_allocated_bytes": peak}


def _parts(peak: Mapping[str, Any], workspace: int | None) -> tuple[dict[str, int], set[str]]:
    """Bytes of each part at the peak, and the names of those that are known; they sum to the peak.

    Where the known ones exceed the peak, the readings do not fit together, and only weights are kept.
    """
    total = int(peak["peak_allocated_bytes"])
    known = {name: int(size) for name, size in peak["known"].items()}
    settled = peak["name"] == "optimizer_step" or (peak["step"] or 0) >= 2
    if workspace is not None and settled:  # every thread has taken its workspace by then
        known["workspace"] = workspace
    if sum(known.values()) > total:
        known = {name: size for name, size in known.items() if name in ("base_weights", "adapter_weights")}
    if sum(known.values()) > total:
        known = {}
    remainder = _REMAINDER.get(str(peak["name"]), _REMAINDER_OF_STEP)
    parts = dict(known)
    parts[remainder] = parts.get(remainder, 0) + total - sum(known.values())
    return parts, set(known)


def _notes(remainder: str, known: set[str], found: Readings) -> tuple[str, ...]:
    inside = [n for n in PARTS if n not in known and n != remainder]
    words = ", ".join(name.replace("_", " ") for name in inside)
    notes = []
    if words:
        notes.append(
            f"{remainder.replace('_', ' ').capitalize()} is what remains of the peak after the known parts; "
            f"it contains {words}."
        )
    failure = found.out_of_memory
    if failure is not None:
        if failure["requested_bytes"]:
            notes.append(
                f"The device had {failure['device_free_bytes']} bytes free, and torch held "
                f"{failure['reserved_bytes'] - failure['allocated_bytes']} reserved bytes without a tensor."
            )
        else:
            notes.append("A library beside torch's allocator ran out of memory; its request is not known.")
    if found.paged_bytes:
        notes.append(paged_note(found.paged_bytes))
    return (*notes, *found.notes)


def _out_of_memory(event: Mapping[str, Any]) -> OutOfMemory:
    """`free_bytes`: all that no tensor held, the driver's and torch's, as the simulation counts it."""
    return OutOfMemory(
        phase=event["phase"],
        requested_bytes=event["requested_bytes"],
        free_bytes=event["device_free_bytes"] + event["reserved_bytes"] - event["allocated_bytes"],
    )
