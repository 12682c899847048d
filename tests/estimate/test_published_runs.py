"""Real LoRA steps of a Tesla T4, measured and published by others, estimated phase by phase.

tests/data/published_t4_runs.json: figures of the measurement archive in the source distribution of
fitcheck-llm 0.3.1 (PyPI, MIT). No number in the formulas was fitted to them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from planner.estimate import estimate
from planner.units import MIB
from tests.published import lora_runs, setup_of, title

RUNS = lora_runs()


@pytest.mark.parametrize("run", RUNS, ids=title)
def test_a_published_run_is_estimated_within_one_percent(
    run: dict[str, Any], record_property: Callable[[str, object], None]
) -> None:
    report = estimate(setup_of(run))
    phases = {phase.name: phase for phase in report.phases}  # of the second step
    measured = run["measured_mib"]
    off = {
        "resident": phases["attach"].allocated_bytes / MIB / measured["resident_before_step"] - 1,
        "forward": phases["forward"].peak_allocated_bytes / MIB / measured["peak_forward"] - 1,
        "backward": phases["backward"].peak_allocated_bytes / MIB / measured["peak_backward"] - 1,
        "optimizer": phases["optimizer_step"].peak_allocated_bytes / MIB / measured["peak_optimizer"] - 1,
        "peak": report.peak_allocated_bytes / MIB / measured["peak_allocated"] - 1,
    }
    cells = " ".join(f"{value:>+9.2%}" for value in off.values())
    record_property("published_t4_runs_estimated", f"{title(run):<62} {cells}")
    assert report.parameters.total == run["total_params"]
    assert report.parameters.trainable == run["trainable_params"]
    assert {name: value for name, value in off.items() if abs(value) > 0.01} == {}
