"""The second matrix: other setups than the first, every one predicted before anything of it was measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from planner.measure.foretold import Foretold, foretold
from planner.measure.matrix import matrix_from
from planner.record import setup_key
from tests.published import lora_runs, qlora_runs, setup_of

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PREDICTIONS = BENCHMARKS / "unseen-predictions.jsonl"


def keys(name: str) -> set[str]:
    """The setups of a matrix by their keys."""
    return {setup_key(setup.to_dict()) for setup in matrix_from(BENCHMARKS / name).setups}


@pytest.fixture(scope="module")
def predicted() -> dict[str, Foretold]:
    return foretold(PREDICTIONS)


def test_no_setup_is_in_the_first_matrix_or_was_published() -> None:
    unseen = keys("unseen.toml")
    assert len(unseen) >= 80
    assert not unseen & keys("matrix.toml")
    assert not unseen & {setup_key(setup_of(run).to_dict()) for run in (*lora_runs(), *qlora_runs())}


def test_every_setup_was_predicted_for_one_device_and_one_set_of_versions(
    predicted: dict[str, Foretold],
) -> None:
    assert set(predicted) >= keys("unseen.toml")
    assert {line.gpu for line in predicted.values()} == {"NVIDIA H200"}
    versions = {
        tuple(line.simulation.report.provenance[name].split("+")[0] for name in ("torch", "transformers"))
        for line in predicted.values()
        if line.simulation.report
    }
    assert versions == {("2.11.0", "5.17.0")}


def test_every_setup_has_a_simulated_peak(predicted: dict[str, Foretold]) -> None:
    found = [predicted[key].simulation for key in keys("unseen.toml")]
    assert [simulation.reason for simulation in found if simulation.report is None] == []
