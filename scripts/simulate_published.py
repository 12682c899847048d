"""Simulate the packaged runs that others published: python scripts/simulate_published.py

Writes planner/measure/published/simulations.json, which the page Accuracy shows beside the published figures.
"phases" are bytes before the step, then the peaks of forward, backward and optimizer step. The runs
over a quantized base need bitsandbytes, and are simulated as their libraries ran them (tests/published.py).
The loop is that of the archive's own step: it keeps the model's output, and its labels are the input ids.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def main() -> None:
    """Simulate every run and write the file."""
    from planner.measure.published import published_runs

    peaks: dict[str, list[int]] = {}
    phases: dict[str, list[int]] = {}
    versions: dict[str, object] = {}
    done: dict[str, tuple[dict[str, object], list[int], list[int]]] = {}
    for run in published_runs():
        setup = json.dumps(run.setup)
        if setup not in done:  # repeated runs
            done[setup] = _simulated(run.setup)
        of_setup, peaks[run.id], phases[run.id] = done[setup]
        versions |= of_setup
        error = peaks[run.id][0] / run.peak_allocated_bytes - 1
        print(f"{run.id:<26} {run.setup['model']:<36} {run.setup['method']:<6} {error:+.4%}", flush=True)
    rows = f' "peaks": {_lines(peaks)},\n "phases": {_lines(phases)}'
    text = f'{{\n "versions": {json.dumps(versions)},\n{rows}\n}}\n'
    json.loads(text)
    (ROOT / "planner/measure/published/simulations.json").write_text(text, encoding="utf-8")


def _simulated(flat: Mapping[str, Any]) -> tuple[dict[str, object], list[int], list[int]]:
    """Versions, [peak allocated, peak reserved] of the steps, and the phases' bytes."""
    from planner.simulate.arrivals import Loading
    from planner.simulate.run import simulate
    from planner.spec import QLoRA, Setup
    from tests.published import as_run

    setup = Setup.from_dict(flat)
    if isinstance(setup.method, QLoRA):
        report, arrivals = as_run(setup)
        phases = arrivals.phases(Loading())
    else:
        report = simulate(setup, separate_labels=False)
        phases = report.phases
    of_step = {phase.name: phase for phase in phases}  # the second step's
    steps = [of_step[name] for name in ("forward", "backward", "optimizer_step")]
    allocated = [phase.peak_allocated_bytes for phase in steps]
    reserved = max(phase.peak_reserved_bytes or 0 for phase in steps)
    return (
        dict(report.provenance),
        [max(allocated), reserved],
        [of_step["attach"].allocated_bytes, *allocated],
    )


def _lines(rows: Mapping[str, Sequence[int]]) -> str:
    """A JSON object with a line for each run."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    return f"{{\n{lines}\n }}"


if __name__ == "__main__":
    main()
