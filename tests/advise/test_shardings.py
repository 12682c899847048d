"""How many GPUs and how shared: volumes by the ZeRO paper, what fits, what is cheapest."""

from __future__ import annotations

import json

import pytest

from planner import LoRA, Setup, Sharding, Training
from planner.advise.shardings import NUMBERS, cheapest, needs, options, shardings, shared
from planner.estimate import estimate
from planner.estimate.communication import communication_bytes

LLAMA = "meta-llama/Llama-3.1-8B"
PSI = 7_500_000_000


def setup_of(model: str = LLAMA, gpu: str | None = "h100", **training: object) -> Setup:
    values = {"precision": "bf16-mixed", "activation_checkpointing": True, **training}
    return Setup(model=model, gpu=gpu, training=Training(**values))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "elements", "element_bytes"),
    [("ddp", 2, 4), ("zero1", 2, 2), ("zero2", 2, 2), ("zero3", 3, 2), ("fsdp", 3, 2),
     ("fsdp-grad-op", 2, 2)],
)  # fmt: skip
def test_volumes_are_the_zero_papers(kind, elements, element_bytes):
    """Rajbhandari et al. 2020, section 7: 2 psi, 3 psi for stage 3; a ring of N moves (N - 1) / N of it."""
    own = shared(setup_of("params:7.5e9"), 64, kind)
    assert communication_bytes(own) == elements * PSI * element_bytes * 63 // 64


def test_weights_are_gathered_for_every_micro_batch_and_gradients_reduced_once():
    one, two = (
        communication_bytes(shared(setup_of(gradient_accumulation_steps=steps), 8, "fsdp"))
        for steps in (1, 2)
    )
    parameters = setup_of().model.parameters
    assert one == 3 * 2 * parameters * 7 // 8
    assert two == 5 * 2 * parameters * 7 // 8


def test_hsdp_sends_its_shards_over_the_nodes_too():
    within = communication_bytes(shared(setup_of(), 8, "fsdp"))
    parameters = setup_of().model.parameters
    assert communication_bytes(shared(setup_of(), 32, "hsdp")) == within + 2 * 2 * parameters // 8 * 3 // 4


def test_lora_reduces_only_what_is_trained():
    lora = setup_of().replace(method=LoRA(target_modules=("attention",)))
    trained = estimate(lora).parameters.trainable
    assert communication_bytes(shared(lora, 8, "ddp")) == 2 * 4 * trained * 7 // 8


def test_one_gpu_sends_nothing():
    assert communication_bytes(setup_of()) == 0


def test_every_option_is_the_estimate_of_its_setup():
    setup = setup_of()
    for option in options(setup, (1, 8, 16)):
        own = shared(setup, option.num_gpus, option.sharding)
        assert option.peak_allocated_bytes == estimate(own).peak_allocated_bytes
        assert option.sent_bytes == communication_bytes(own)
    kinds = {option.sharding for option in options(setup, (16,))}
    assert kinds == {"ddp", "zero1", "zero2", "fsdp-grad-op", "fsdp", "hsdp", "zero3"}
    assert "hsdp" not in {option.sharding for option in options(setup, (8,))}  # one node


def test_what_a_library_cannot_run_is_no_option():
    kinds = {option.sharding for option in options(setup_of(precision="bf16"), (8,))}
    assert kinds == {"ddp", "fsdp-grad-op", "fsdp"}  # DeepSpeed keeps fp32 weights


def test_the_cheapest_fits_and_none_that_fits_sends_less():
    found = options(setup_of(), NUMBERS)
    best = cheapest(found)
    assert best is not None
    fitting = [option for option in found if option.fits]
    assert best.num_gpus == min(option.num_gpus for option in fitting)
    assert all(best.sent_bytes <= o.sent_bytes for o in fitting if o.num_gpus == best.num_gpus)


def test_larger_cards_are_needed_in_no_greater_number():
    numbers = {need.gpu.name: need.option.num_gpus for need in needs(setup_of())}
    assert numbers["a100-40gb"] >= numbers["a100-80gb"] >= numbers["h200"] >= numbers["b200"]
    assert all(need.option.fits for need in needs(setup_of()))


def test_wishes_are_kept_where_the_kind_has_them():
    wishes = {"reduce_dtype": "fp32", "prefetch": 2, "cpu_offload": "parameters", "gpus_per_node": 4}
    wishing = setup_of().replace(num_gpus=8, sharding="fsdp", **wishes)
    assert shared(wishing, 16, "hsdp").sharding == Sharding(num_gpus=16, sharding="hsdp", **wishes)
    assert shared(wishing, 8, "zero2").sharding.cpu_offload == "optimizer"
    assert shared(wishing, 8, "ddp").sharding == Sharding(num_gpus=8, sharding="ddp", gpus_per_node=4)
    assert shared(wishing, 1, "none").sharding == Sharding(gpus_per_node=1)


def test_the_answer_is_json():
    found = shardings(setup_of().replace(num_gpus=8, sharding="fsdp"))
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()
    assert found.cheapest is not None
    assert found.cheapest.num_gpus == 8
