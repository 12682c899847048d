"""Real LoRA and QLoRA steps of a Tesla T4, measured and published by others, estimated phase by phase.

tests/data/published_t4_runs.json: figures of the measurement archive in the source distribution of
fitcheck-llm 0.3.1 (PyPI, MIT). No number in the formulas was fitted to them. What a quantized load leaves
unsplit is a race (tests/simulate/test_published_qlora.py); the formulas count the tensors alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from planner.estimate import estimate
from planner.units import MIB
from tests.published import lora_runs, qlora_runs, setup_of, title


@pytest.mark.parametrize("run", lora_runs(), ids=title)
def test_a_published_run_is_estimated_within_one_percent(
    run: dict[str, Any], record_property: Callable[[str, object], None]
) -> None:
    assert {name: value for name, value in _off(run, record_property).items() if abs(value) > 0.01} == {}


@pytest.mark.parametrize("run", qlora_runs(), ids=title)
def test_a_published_run_over_nf4_is_estimated_within_two_percent(
    run: dict[str, Any], record_property: Callable[[str, object], None]
) -> None:
    off = _off(run, record_property)
    assert abs(off["peak"]) < 0.01
    assert {name: value for name, value in off.items() if abs(value) > 0.02} == {}


def _off(run: dict[str, Any], record_property: Callable[[str, object], None]) -> dict[str, float]:
    """Share by which each phase's estimate is too much; parameters are exact."""
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
    return off
