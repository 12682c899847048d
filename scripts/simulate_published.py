"""Simulate the packaged runs that others published: python scripts/simulate_published.py

Writes planner/measure/published/simulations.json, which the page Accuracy shows beside the published figures.
"phases" are bytes before the step, then the peaks of forward, backward and optimizer step. The runs
over a quantized base need bitsandbytes. The loop is that of the archive's own step: it keeps the
model's output, and its labels are the input ids.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def main() -> None:
    """Simulate every run and write the file."""
    from planner.measure.published import published_runs
    from planner.simulate.run import simulate
    from planner.spec import Setup
    from planner.training.run import Loop

    peaks: dict[str, list[int | None]] = {}
    phases: dict[str, list[int]] = {}
    versions: dict[str, object] = {}
    for run in published_runs():
        report = simulate(Setup.from_dict(run.setup), loop=Loop(keep_outputs=True, separate_labels=False))
        versions |= report.provenance
        peaks[run.id] = [report.peak_allocated_bytes, report.peak_reserved_bytes]
        of_step = {phase.name: phase.peak_allocated_bytes for phase in report.phases}  # the second step's
        loaded = next(phase.allocated_bytes for phase in report.phases if phase.name == "attach")
        phases[run.id] = [loaded, of_step["forward"], of_step["backward"], of_step["optimizer_step"]]
        error = report.peak_allocated_bytes / run.peak_allocated_bytes - 1
        print(f"{run.id:<26} {run.setup['model']:<36} {run.setup['method']:<6} {error:+.4%}", flush=True)
    rows = f' "peaks": {_lines(peaks)},\n "phases": {_lines(phases)}'
    text = f'{{\n "versions": {json.dumps(versions)},\n{rows}\n}}\n'
    json.loads(text)
    (ROOT / "planner/measure/published/simulations.json").write_text(text, encoding="utf-8")


def _lines(rows: Mapping[str, Sequence[int | None]]) -> str:
    """A JSON object with a line for each run."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    return f"{{\n{lines}\n }}"


if __name__ == "__main__":
    main()
