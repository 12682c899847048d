"""Simulate peft's own measured runs: python scripts/simulate_peft_runs.py [ID...]

Writes tests/data/simulated_peft_runs.json, of which README's table is made: for each run peak reserved
bytes, trained and all parameters. About six minutes of one core; with ids only those are simulated anew.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def main(wanted: list[str]) -> None:
    """Simulate the runs and write the file after each."""
    from tests.peft_runs import SIMULATED, error, peft_runs
    from tests.simulate.peft_loop import simulated

    known = json.loads(SIMULATED.read_text()) if SIMULATED.exists() else {"versions": {}, "runs": {}}
    for run in peft_runs():
        if wanted and run["id"] not in wanted:
            continue
        found = simulated(run)
        known["versions"] = found.versions
        known["runs"][run["id"]] = [found.peak_reserved_bytes, found.trained, found.total]
        print(f"{run['id']:<40} {error(run, found.peak_reserved_bytes):+.2%}", flush=True)
        rows = ",\n".join(
            f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(known["runs"].items())
        )
        text = f'{{\n "versions": {json.dumps(known["versions"])},\n "runs": {{\n{rows}\n }}\n}}\n'
        SIMULATED.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
