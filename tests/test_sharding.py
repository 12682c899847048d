"""What is asked of several GPUs: validated, flat, and absent from everything that says nothing of it."""

from __future__ import annotations

import pytest

from planner import LoRA, QLoRA, Setup, Sharding, Training
from planner.errors import SetupError

MODEL = "meta-llama/Llama-3.2-1B"


def test_one_gpu_leaves_a_setup_as_it_was():
    plain = Setup(model=MODEL)
    assert plain == Setup(model=MODEL, sharding=Sharding(num_gpus=1))
    assert not {"num_gpus", "sharding", "cpu_offload"} & set(plain.to_dict())
    assert Setup.from_dict({"model": MODEL, "num_gpus": 1, "sharding": "none"}) == plain


@pytest.mark.parametrize(
    "sharding",
    [
        Sharding(num_gpus=2, sharding="ddp"),
        Sharding(num_gpus=16, sharding="hsdp", gpus_per_node=4),
        Sharding(num_gpus=4, sharding="fsdp", reduce_dtype="fp32", prefetch=2, shard_unit="LlamaMLP"),
        Sharding(num_gpus=8, sharding="zero3", cpu_offload="parameters"),
    ],
)
def test_flat_keys_bring_it_back(sharding: Sharding):
    setup = Setup(model=MODEL, sharding=sharding, training=Training(precision="bf16-mixed"))
    flat = setup.to_dict()
    assert flat["sharding"] == sharding.sharding
    assert flat["num_gpus"] == sharding.num_gpus
    assert Setup.from_dict(flat) == setup
    assert setup.replace(seq_len=64).sharding == sharding


def test_nodes_and_the_ranks_of_one_copy():
    def of(number: int, kind: str, node: int | None = None) -> tuple[int, int, int]:
        found = Sharding(num_gpus=number, sharding=kind, gpus_per_node=node)  # type: ignore[arg-type]
        return found.per_node, found.nodes, found.shard_ranks

    assert of(4, "fsdp") == (4, 1, 4)
    assert of(64, "fsdp") == (8, 8, 64)
    assert of(64, "hsdp") == (8, 8, 8)
    assert of(64, "hsdp", 4) == (4, 16, 4)
    assert of(4, "fsdp", 8) == (4, 1, 4)
    assert of(64, "ddp") == (8, 8, 1)
    assert of(64, "zero1") == (8, 8, 64)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"num_gpus": 4}, "num_gpus 4 needs a sharding"),
        ({"num_gpus": 0}, "num_gpus must be a whole number of at least 1, got 0"),
        ({"sharding": "fsdp"}, "sharding fsdp needs at least 2 GPUs, got num_gpus 1"),
        ({"sharding": "tensor", "num_gpus": 2}, "sharding must be one of none, ddp, fsdp"),
        ({"sharding": "fsdp", "num_gpus": 12}, "does not fill nodes of 8 GPUs; give 8 or 16"),
        ({"sharding": "hsdp", "num_gpus": 8}, "are one node; choose fsdp"),
        ({"sharding": "hsdp", "num_gpus": 4, "gpus_per_node": 1}, "has nothing to split"),
        ({"sharding": "ddp", "num_gpus": 2, "cpu_offload": "parameters"}, "ddp has none; choose fsdp"),
        ({"sharding": "fsdp", "num_gpus": 2, "cpu_offload": "optimizer"}, "choose cpu_offload parameters"),
        ({"sharding": "zero2", "num_gpus": 2, "cpu_offload": "parameters"}, "in stage 3 only"),
        ({"sharding": "zero2", "num_gpus": 2, "prefetch": 2}, "prefetch belongs to FSDP"),
        ({"sharding": "fsdp", "num_gpus": 2, "shard_unit": "a b"}, "must be the name of a module class"),
    ],
)
def test_what_no_launcher_could_start_is_refused(keys, words):
    with pytest.raises(SetupError, match=words) as caught:
        Sharding(**keys)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "training", "method", "words"),
    [
        ("fsdp", {"precision": "textbook"}, None, "textbook is a sum for one GPU"),
        ("zero3", {"precision": "bf16"}, None, "choose bf16-mixed, or sharding fsdp"),
        ("fsdp", {}, QLoRA(), "is not covered with method qlora"),
        ("fsdp", {"optimizer": "adamw-8bit"}, None, "is not covered on the shards"),
        ("fsdp", {"precision": "bf16"}, LoRA(lora_bias="all"), "one type for all that a unit trains"),
        ("zero2", {"zero_grad": "zero", "precision": "bf16-mixed"}, None, "zero_grad zero is not covered"),
    ],
)
def test_what_the_libraries_cannot_run_together_is_refused(kind, training, method, words):
    with pytest.raises(SetupError, match=words):
        Setup(
            model=MODEL,
            method=method,
            training=Training(**training),
            sharding=Sharding(num_gpus=2, sharding=kind),
        )


def test_weights_that_stay_in_fp32_are_refused_where_fsdp_would_train_them_beside_16_bit_ones():
    """T5's `wo` (_keep_in_fp32_modules); torch, _fsdp_param_group.py asks for one type of what is trained."""
    fsdp, fp16 = Sharding(num_gpus=2, sharding="fsdp"), Training(precision="fp16")
    with pytest.raises(SetupError, match=r"t5-small keeps some of its weights in fp32; choose fp16-mixed"):
        Setup(model="google-t5/t5-small", training=fp16, sharding=fsdp)
    for other in ({"method": LoRA()}, {"training": Training(precision="bf16")}, {"model": MODEL}):
        Setup(**{"model": "google-t5/t5-small", "training": fp16, "sharding": fsdp, **other})


def test_ddp_takes_what_one_gpu_takes():
    ddp = Sharding(num_gpus=2, sharding="ddp")
    assert Setup(model=MODEL, method=QLoRA(), sharding=ddp).sharding == ddp
    assert Setup(model=MODEL, method=LoRA(), sharding=ddp).sharding.shard_ranks == 1
