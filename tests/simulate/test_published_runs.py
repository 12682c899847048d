"""Real LoRA steps of a Tesla T4, measured and published by others, simulated phase by phase.

tests/data/published_t4_runs.json: figures of the measurement archive in the source distribution of
fitcheck-llm 0.3.1 (PyPI, MIT). Torch 2.10 to 2.14 and transformers 5.0 to 5.17 made them; no coefficient is
fitted here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from planner.simulate.run import simulate
from planner.units import MIB
from tests.published import lora_runs, setup_of, title

RUNS = lora_runs()
# Their step says `outputs = model(**batch)` with labels = input ids, and looks at steps after the first.


@pytest.mark.parametrize("run", RUNS, ids=title)
def test_a_published_run_comes_out_equal(
    run: dict[str, Any], record_property: Callable[[str, object], None]
) -> None:
    report = simulate(setup_of(run), separate_labels=False)
    phases = {phase.name: phase for phase in report.phases}  # of the second step
    measured = run["measured_mib"]
    peaks = {name: phases[name].peak_allocated_bytes / MIB for name in ("forward", "backward")}
    optimizer = phases["optimizer_step"].peak_allocated_bytes / MIB
    off = {
        "resident": phases["attach"].allocated_bytes / MIB - measured["resident_before_step"],
        "forward": peaks["forward"] - measured["peak_forward"],
        "backward": peaks["backward"] - measured["peak_backward"],
        "optimizer": optimizer - measured["peak_optimizer"],
    }
    reserved = (report.peak_reserved_bytes or 0) / MIB / measured["peak_reserved"] - 1
    cells = " ".join(f"{value:>+9.2f}" for value in off.values())
    record_property("published_t4_runs", f"{title(run):<62} {cells} {reserved:>+9.2%}")

    assert (report.parameters.total, report.parameters.trainable) == (
        run["total_params"],
        run["trainable_params"],
    )
    assert abs(off["resident"]) < 0.01
    assert abs(off["forward"]) < 0.01
    assert abs(off["backward"]) < 0.01
    assert abs(off["optimizer"]) < 0.5
    assert abs(max(*peaks.values(), optimizer) - measured["peak_allocated"]) < 0.01
    assert abs(reserved) < 0.01
