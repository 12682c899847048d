"""Where a card that is too small stops a simulated step."""

from __future__ import annotations

from planner.advise.fits import verdict
from planner.simulate.on_gpu import simulated_on_gpu
from planner.simulate.run import simulate
from planner.spec import FullFineTuning, LoRA, Setup, Training
from tests.estimate.shapes import shortened

MODEL = shortened("meta-llama/Llama-3.2-1B", layers=2)
TRAINING = Training(micro_batch_size=8, seq_len=512)


def test_a_step_that_fits_is_left_alone() -> None:
    setup = Setup(model=MODEL, method=LoRA(), training=TRAINING, gpu="h200")
    assert simulated_on_gpu(setup) == simulate(setup)


def test_the_request_that_fails_is_named_and_the_peaks_stay_those_of_the_whole_step() -> None:
    setup = Setup(model=MODEL, method=FullFineTuning(), training=TRAINING, gpu="6GiB")
    whole, found = simulate(setup), simulated_on_gpu(setup)
    assert found.peak_allocated_bytes == whole.peak_allocated_bytes
    failure = found.out_of_memory
    assert failure is not None
    assert failure.requested_bytes > 0
    assert failure.op.startswith("aten.")
    assert failure.op in found.notes[-1]
    assert failure.phase.replace("_", " ") in found.notes[-1]
    assert setup.gpu is not None
    assert verdict(found, setup.gpu).word == "does not fit"
