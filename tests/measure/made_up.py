"""Made-up events and records. Every number here is invented for the tests; none was measured."""

from __future__ import annotations

from typing import Any

from planner import LoRA, Setup, Training
from planner.measure.answer import measured_report, readings
from planner.record import Device, Prediction, Record
from planner.report import MemoryReport, Parameters, Parts

MIB = 1 << 20
SETUP = Setup(
    model="EleutherAI/pythia-70m", method=LoRA(lora_rank=4), training=Training(seq_len=16, precision="bf16")
)
VERSIONS = {
    "torch": "0.0.0+test",
    "cuda": "0.0",
    "transformers": "0.0.0",
    "peft": "0.0.0",
    "accelerate": "0.0.0",
    "planner": "0.0.0",
    "python": "3.11.0",
}
DEVICE = Device(name="Imaginary GPU", capability=(9, 9), total_bytes=1000 * MIB, driver="0.0")
Events = list[dict[str, Any]]


def phase(
    name: str, step: int | None, end: int, peak: int, known: dict[str, int], **more: Any
) -> dict[str, Any]:
    """The event of one phase; sizes in MiB."""
    return {
        "event": "phase",
        "name": name,
        "step": step,
        "allocated_bytes": end * MIB,
        "peak_allocated_bytes": peak * MIB,
        "reserved_bytes": 120 * MIB,
        "peak_reserved_bytes": (peak + 20) * MIB,
        "between_peak_bytes": 0,
        "retries": 0,
        "device_used_bytes": 720 * MIB,
        "seconds": 0.5,
        "failed": False,
        "known": {part: size * MIB for part, size in known.items()},
        **more,
    }


def stream() -> Events:
    """A whole run: 40 MiB of weights, 2 of adapters and gradients, 4 of states, 9 of workspace, peak 100."""
    still = {"base_weights": 40, "adapter_weights": 2}
    return [
        {"event": "started", "pid": 1, "seed": 0, "versions": VERSIONS, "environment": {"A": "b"}},
        {"event": "device", **DEVICE.to_dict(), "others_bytes": 100 * MIB, "context_bytes": 400 * MIB,
         "used_source": "nvml"},
        phase("load", None, 40, 41, {"base_weights": 40}),
        phase("attach", None, 42, 42, {"base_weights": 40}),
        {"event": "parameters", "total": 70, "trainable": 7, "added": 7},
        phase("forward", 1, 80, 85, still | {"gradients": 0, "optimizer_states": 0}),
        phase("backward", 1, 53, 96, still | {"gradients": 1, "optimizer_states": 0}),
        phase("optimizer_step", 1, 55, 60, still | {"gradients": 2}),
        phase("forward", 2, 84, 89, still | {"gradients": 0, "optimizer_states": 4}),
        phase("backward", 2, 57, 100, still | {"gradients": 1, "optimizer_states": 4}),
        phase("optimizer_step", 2, 55, 60, still | {"gradients": 2, "optimizer_states": 4}),
        {"event": "workspace", "workspace_bytes": 9 * MIB},
        {"event": "done"},
    ]


def predicted(source: Any, measured: MemoryReport, factor: float) -> MemoryReport:
    """A prediction whose peak is `factor` times the measured one."""
    peak = round(measured.peak_allocated_bytes * factor)
    return MemoryReport(
        source=source,
        setup=measured.setup,
        parameters=Parameters(total=70, trainable=7, added=7),
        parts=Parts(base_weights=40 * MIB, activations=peak - 40 * MIB),
        phases=(),
        peak_phase="backward",
        peak_reserved_bytes=None if source == "estimate" else round(120 * MIB * factor),
    )


def made_record(
    *, estimate: float = 1.0, simulation: float = 1.0, date: str = "2000-01-01", set_name: str = "",
    device: Device = DEVICE, base: Setup = SETUP, **changes: Any,
) -> Record:
    """A made-up record: `made_record(estimate=1.1, simulation=0.99, seq_len=32, date="2000-01-02")`."""
    setup = base.replace(**changes) if changes else base
    report = measured_report(setup, readings(stream()), date=date)
    return Record(
        setup=setup.to_dict(),
        report=report,
        device=device,
        versions=VERSIONS,
        date=date,
        seed=0,
        command="planner measure",
        estimate=Prediction(report=predicted("estimate", report, estimate)),
        simulation=Prediction(report=predicted("simulation", report, simulation)),
        set=set_name,
    )
