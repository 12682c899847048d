"""Predictions of a matrix, written down before anything of it is measured.

    python -m benchmarks.predictions benchmarks/unseen.toml --gpu h200 \\
        --out benchmarks/unseen-predictions.jsonl

One line a setup: the estimate and the simulation for that device, with the versions that made them. A setup
that has its line already is left alone, so that nothing is predicted twice. `planner records --accuracy
--predictions FILE` holds the lines against what was measured later.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from planner import Setup
from planner.catalog.gpus import Gpu, gpu as gpu_named
from planner.errors import PlannerError
from planner.measure.foretold import Foretold, foretold, line_of
from planner.measure.matrix import matrix_from
from planner.measure.probe import estimated, now
from planner.record import Prediction, setup_key


def main() -> int:
    """Append what is missing and say what each simulation came to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("matrix", type=Path)
    parser.add_argument("--gpu", required=True, help="the device that will measure")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    gpu, matrix = gpu_named(args.gpu), matrix_from(args.matrix)
    done = foretold(args.out) if args.out.exists() else {}
    for number, setup in enumerate(matrix.setups, 1):
        if setup_key(setup.to_dict()) in done:
            continue
        simulation = simulated(setup, gpu)
        found = Foretold(
            setup=setup.to_dict(),
            gpu=gpu.driver_name or gpu.name,
            date=now(),
            set=matrix.name,
            estimate=estimated(setup.replace(gpu=gpu)),
            simulation=simulation,
        )
        with args.out.open("a", encoding="utf-8") as file:
            file.write(line_of(found) + "\n")
        report = simulation.report
        said = simulation.reason if report is None else f"{report.peak_allocated_bytes:,} bytes"
        print(f"{number}/{len(matrix.setups)} {setup.model.id} {setup.method.name}: {said}", flush=True)
    return 0


def simulated(setup: Setup, gpu: Gpu) -> Prediction:
    """The simulation, or in one line why there is none."""
    from planner.simulate import simulate

    try:
        return Prediction(report=simulate(setup, gpu=gpu))
    except PlannerError as error:
        return Prediction(reason=str(error))


if __name__ == "__main__":
    sys.exit(main())
