"""Measured runs as the Accuracy page shows them: one form for records and for published runs."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from planner.accuracy import family, share_error
from planner.catalog.gpus import Gpu, gpu as gpu_named
from planner.errors import PlannerError
from planner.estimate import estimate
from planner.measure.published import PublishedRun
from planner.record import Record
from planner.spec import Setup

__all__ = [
    "PREDICTIONS",
    "SELECTORS",
    "Run",
    "Selector",
    "Spread",
    "published_run",
    "recorded_run",
    "reserved_spread",
    "runs_csv",
    "runs_json",
    "signed_percent",
    "spread",
    "worst",
]

PREDICTIONS = {
    "estimate_now": "Formula, this version",
    "estimate": "Formula, when it was measured",
    "simulation": "Simulation",
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One measured run and what was predicted of it; bytes of peak allocated memory.

    `predicted_bytes` holds those of `PREDICTIONS` that are known. `full_device`: the run ended out of
    memory, so that it has no peak to compare.
    """

    setup: Mapping[str, Any]
    origin: str
    device: str
    versions: str
    date: str
    measured_bytes: int
    measured_reserved_bytes: int | None
    predicted_bytes: Mapping[str, int] = field(default_factory=dict)
    reserved_simulated_bytes: int | None = None
    full_device: bool = False
    source: str = ""

    @property
    def title(self) -> str:
        """Model, method and size: `"TinyLlama-1.1B, lora, 2 x 512"`."""
        model = str(self.setup.get("model")).rpartition("/")[2]
        return (
            f"{model}, {self.setup.get('method')}, "
            f"{self.setup.get('micro_batch_size')} x {self.setup.get('seq_len')}"
        )

    @property
    def family(self) -> str:
        """The model's family."""
        return family(self.setup)

    def error(self, prediction: str) -> float | None:
        """(predicted - measured) / measured; None where one is missing."""
        size = self.predicted_bytes.get(prediction)
        if size is None or self.full_device:
            return None
        return share_error(size, self.measured_bytes)


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Errors over some runs: how many, median of absolute errors, the largest above and below 0 (or None)."""

    runs: int
    median: float | None = None
    over: float | None = None
    under: float | None = None


def spread(runs: Iterable[Run], prediction: str) -> Spread:
    """The errors of one prediction over runs that have it."""
    return _spread(run.error(prediction) for run in runs)


def reserved_spread(runs: Iterable[Run]) -> Spread:
    """The same for the peak of reserved memory, which only the simulation predicts."""
    return _spread(
        share_error(run.reserved_simulated_bytes, run.measured_reserved_bytes)
        for run in runs
        if run.reserved_simulated_bytes and run.measured_reserved_bytes and not run.full_device
    )


def _spread(shares: Iterable[float | None]) -> Spread:
    errors = [share for share in shares if share is not None]
    return Spread(
        runs=len(errors),
        median=statistics.median(abs(error) for error in errors) if errors else None,
        over=max((error for error in errors if error > 0), default=None),
        under=min((error for error in errors if error < 0), default=None),
    )


def worst(runs: Iterable[Run], most: int = 5) -> list[Run]:
    """The runs with the largest errors, worst first: the formula's, the simulation's where there is none."""
    found = []
    for run in runs:
        error = run.error("estimate_now")
        error = run.error("simulation") if error is None else error
        if error is not None:
            found.append((abs(error), run))
    return [run for _, run in sorted(found, key=lambda pair: pair[0], reverse=True)[:most]]


def recorded_run(record: Record) -> Run:
    """A record as a run, with this version's estimate of it."""
    then = {"estimate": record.estimate.report, "simulation": record.simulation.report}
    predicted = {
        name: report.peak_allocated_bytes
        for name, report in then.items()
        if report is not None and not report.not_known
    }
    simulated = record.simulation.report
    setup = {key: value for key, value in record.setup.items() if key != "gpu"}
    versions = record.versions
    return Run(
        setup=setup,
        origin=record.origin,
        device=record.device.name,
        versions=", ".join(
            f"{name} {versions[name]}" for name in ("torch", "transformers") if name in versions
        ),
        date=record.date,
        measured_bytes=record.report.peak_allocated_bytes,
        measured_reserved_bytes=record.report.peak_reserved_bytes,
        predicted_bytes=_with_now(setup, record.device.gpu, predicted),
        reserved_simulated_bytes=None if simulated is None else simulated.peak_reserved_bytes,
        full_device=record.report.out_of_memory is not None,
        source=f"driver {record.device.driver}",
    )


def published_run(run: PublishedRun) -> Run:
    """A run that others published, with this version's estimate of it."""
    setup = {key: value for key, value in run.setup.items() if key != "gpu"}
    simulated = {} if run.simulated_allocated_bytes is None else {"simulation": run.simulated_allocated_bytes}
    return Run(
        setup=setup,
        origin="published",
        device=run.device,
        versions=run.versions,
        date="",
        measured_bytes=run.peak_allocated_bytes,
        measured_reserved_bytes=run.peak_reserved_bytes,
        predicted_bytes=_with_now(setup, gpu_named(str(run.setup["gpu"])), simulated),
        reserved_simulated_bytes=run.simulated_reserved_bytes,
        source=f"{run.source}, {run.id}",
    )


def runs_csv(runs: Sequence[Run]) -> str:
    """A line a run: setup, device, measured and predicted bytes, errors as shares of what was measured."""
    keys = list(dict.fromkeys(key for run in runs for key in run.setup if key != "model_config"))
    names = ["origin", "device", "versions", "date", *keys, "measured_bytes", "measured_reserved_bytes"]
    names += [f"{name}{end}" for name in PREDICTIONS for end in ("_bytes", "_error")] + ["source"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    for run in runs:
        flat = {key: _cell(run.setup.get(key)) for key in keys}
        row = {**flat, **{name: getattr(run, name, None) for name in names if name not in keys}}
        for name in PREDICTIONS:
            row[f"{name}_bytes"], row[f"{name}_error"] = run.predicted_bytes.get(name), run.error(name)
        writer.writerow([row[name] for name in names])
    return text.getvalue()


def runs_json(runs: Sequence[Run]) -> str:
    """The same as a JSON list."""
    return json.dumps(
        [
            {
                "origin": run.origin,
                "device": run.device,
                "versions": run.versions,
                "date": run.date,
                "source": run.source,
                "setup": dict(run.setup),
                "measured_bytes": run.measured_bytes,
                "measured_reserved_bytes": run.measured_reserved_bytes,
                "out_of_memory": run.full_device,
                "predicted_bytes": dict(run.predicted_bytes),
                "errors": {name: run.error(name) for name in PREDICTIONS},
            }
            for run in runs
        ],
        indent=1,
    )


def _with_now(setup: Mapping[str, Any], gpu: Gpu, predicted: Mapping[str, int]) -> dict[str, int]:
    now = _estimate_now(json.dumps(setup, sort_keys=True), gpu)
    return {**predicted, "estimate_now": now} if now is not None else dict(predicted)


@lru_cache(maxsize=4096)
def _estimate_now(setup_json: str, gpu: Gpu) -> int | None:
    """This version's estimate of the peak; None where it makes none."""
    try:
        report = estimate(Setup.from_dict(json.loads(setup_json)).replace(gpu=gpu))
    except PlannerError:
        return None
    return None if report.not_known else report.peak_allocated_bytes


def _cell(value: Any) -> Any:
    """A value for a spreadsheet: lists with commas; a text that a formula could start with is quoted."""
    text = ",".join(map(str, value)) if isinstance(value, list) else value
    return f"'{text}" if isinstance(text, str) and text[:1] in ("=", "+", "-", "@") else text


def signed_percent(share: float) -> str:
    """An error with its sign and as many digits as it needs: `"+0.31 %"`, `"−0.0002 %"`."""
    value = 100 * share
    digits = 1 if abs(value) >= 10 else 2 if abs(value) >= 0.01 or not value else 4
    return f"{value:+.{digits}f} %".replace("-", "\N{MINUS SIGN}")


Selector = Callable[[Run], str]
SELECTORS: Mapping[str, Selector] = {
    "Method": lambda run: str(run.setup.get("method")),
    "Family": lambda run: run.family,
    "Recipe": lambda run: str(run.setup.get("precision")),
    "Device": lambda run: run.device,
}
