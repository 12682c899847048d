"""Every family of the catalogue traces with every kind of method, cut to two layers, with exact counts."""

from __future__ import annotations

import pytest

from planner import catalog
from planner.estimate.parameters import parameters
from planner.simulate.run import simulate
from planner.spec import Adapter, FullFineTuning, LoRA, Method, Setup, Training
from tests.estimate.shapes import shortened

METHODS: dict[str, Method] = {
    "full": FullFineTuning(),
    "lora": LoRA(target_modules=("all-linear",)),
    "adapter": Adapter(adapter_size=16),
}


def smallest() -> dict[str, str]:
    """The id of the smallest model of every family."""
    found: dict[str, tuple[int, str]] = {}
    for model_id in catalog.models():
        entry = catalog.catalogue_entry(model_id)
        size = entry["parameters"], model_id
        found[entry["config"]["model_type"]] = min(found.get(entry["config"]["model_type"], size), size)
    return {family: model_id for family, (_, model_id) in found.items()}


SMALLEST = smallest()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", SMALLEST)
def test_a_family_traces_with_exact_counts(family: str, method: str) -> None:
    setup = Setup(
        model=shortened(SMALLEST[family], layers=2),
        method=METHODS[method],
        training=Training(micro_batch_size=2, seq_len=64, precision="bf16"),
    )
    report = simulate(setup)
    assert report.parameters == parameters(setup)
    assert report.out_of_memory is None
    assert report.peak_allocated_bytes == max(phase.peak_allocated_bytes for phase in report.phases)
    assert (report.peak_reserved_bytes or 0) >= report.peak_allocated_bytes
    assert min(report.parts.to_dict().values()) >= 0
    # every number is in a block, and blocks are rounded up: 2 bytes each, adapters 4
    weights = 2 * (report.parameters.total - report.parameters.added) + 4 * report.parameters.added
    held = report.parts.base_weights + report.parts.adapter_weights
    assert weights <= held < 1.02 * weights + 2**21
