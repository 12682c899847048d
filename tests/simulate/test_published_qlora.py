"""Real QLoRA steps of a Tesla T4, measured and published by others, simulated phase by phase.

tests/data/published_t4_runs.json: figures of the measurement archive in the source distribution of
fitcheck-llm 0.3.1 (PyPI, MIT). No coefficient is fitted. Loading a quantized model is a race between threads:
what its blocks leave unsplit differs by up to 8 MiB between real runs of one model, before the step
and in what the step finds free.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from planner.estimate.quantized import is_quantized, tensor_sizes
from planner.simulate.run import simulate
from planner.spec import QLoRA
from planner.units import MIB
from tests.published import qlora_runs, setup_of, title

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed; tests/requirements.txt brings it",
)
RUNS = qlora_runs()
_PUBLISHED = Path(__file__).parents[2] / "planner" / "measure" / "published"
PACKAGED = json.loads((_PUBLISHED / "simulations.json").read_text())  # what README's table shows
# Their step says `outputs = model(**batch)` with labels = input ids, and looks at steps after the first.


@needs_bitsandbytes
@pytest.mark.parametrize("run", RUNS, ids=title)
def test_a_published_run_comes_out(
    run: dict[str, Any], record_property: Callable[[str, object], None]
) -> None:
    report = simulate(setup_of(run), separate_labels=False)
    phases = {phase.name: phase for phase in report.phases}  # of the second step
    measured = run["measured_mib"]
    resident = phases["attach"].allocated_bytes / MIB
    off = {
        "resident": resident - measured["resident_before_step"],
        "forward": phases["forward"].peak_allocated_bytes / MIB - measured["peak_forward"],
        "backward": phases["backward"].peak_allocated_bytes / MIB - measured["peak_backward"],
        "optimizer": phases["optimizer_step"].peak_allocated_bytes / MIB - measured["peak_optimizer"],
    }
    peak = report.peak_allocated_bytes / MIB
    step = peak - resident
    measured_step = measured["peak_allocated"] - measured["resident_before_step"]
    reserved = (report.peak_reserved_bytes or 0) / MIB / measured["peak_reserved"] - 1
    cells = " ".join(f"{value:>+9.2f}" for value in off.values())
    shares = f"{step / measured_step - 1:>+8.3%} {peak / measured['peak_allocated'] - 1:>+8.3%}"
    record_property("published_t4_qlora_runs", f"{title(run):<62} {cells} {shares} {reserved:>+9.2%}")

    assert (report.parameters.total, report.parameters.trainable) == (
        run["total_params"],
        run["trainable_params"],
    )
    assert abs(peak / measured["peak_allocated"] - 1) < 0.005
    if all(report.provenance[name] == version for name, version in PACKAGED["versions"].items()):
        loaded = phases["attach"].allocated_bytes
        peaks = [phases[name].peak_allocated_bytes for name in ("forward", "backward", "optimizer_step")]
        assert PACKAGED["phases"][run["id"]] == [loaded, *peaks]
    assert abs(step - measured_step) < max(0.001 * measured_step, 2.1)  # MiB; the race moves small steps
    assert all(abs(value) < 5 for value in off.values())
    if "SmolLM2-1.7B" in run["model"]:  # every block of its weights fills its segment: nothing to race for
        assert all(abs(value) < 0.01 for value in off.values())


@pytest.mark.parametrize("run", RUNS[::5], ids=title)
def test_the_weights_bytes_are_exact(run: dict[str, Any]) -> None:
    setup = setup_of(run)
    assert isinstance(setup.method, QLoRA)
    weights = [t for t in setup.model.tensors if not t.tied_to]
    packed = scales = rest = 0
    for tensor, (sizes, layers) in zip(weights, tensor_sizes(setup.model, setup.method), strict=True):
        count = len(layers) or 1
        if is_quantized(setup.model, tensor):
            packed += sizes[0] * count
            scales += sum(sizes[1:]) * count
        else:
            rest += sum(sizes) * count
    measured = run["measured_mib"]
    assert packed / MIB == measured["nf4_packed"]
    assert scales / MIB == measured["quant_scales"]
    assert (rest + 4 * run["trainable_params"]) / MIB == measured["unquantized_fp32"]
