"""What to change: each change is real, saves what it says, and is the cheapest first."""

from __future__ import annotations

from typing import Any

import pytest

from planner.advise import applied, changes, nearest_fitting, verdict
from planner.errors import SetupError
from planner.estimate import estimate
from planner.spec import Adapter, BitFit, FullFineTuning, LoRA, PeftOfSize, QLoRA, Setup, Training

PRICES = ["nothing", "time", "numerics", "data", "method"]
WASTEFUL = Training(micro_batch_size=8, seq_len=1024, precision="bf16-mixed", attention="eager")
CHECKPOINTED = {"activation_checkpointing": True}
LLAMA = "meta-llama/Llama-3.2-1B"


def wasteful(method=None, gpu="24GiB", model=LLAMA):
    return Setup(model=model, method=method, training=WASTEFUL, gpu=gpu)


@pytest.mark.parametrize(
    "method", [FullFineTuning(), LoRA(target_modules=("all-linear",)), Adapter(adapter_kind="houlsby")]
)
def test_each_change_saves_what_it_says(method):
    planned = wasteful(method)
    before = estimate(planned).peak_allocated_bytes
    found = changes(planned)
    assert len(found) >= 5
    for change in found:
        after = estimate(applied(planned, change.keys))
        assert change.peak_allocated_bytes == after.peak_allocated_bytes
        assert change.saving_bytes == before - after.peak_allocated_bytes > 0
        assert change.fits == verdict(after, planned.gpu).fits
        assert "{" not in change.words


def test_the_cheapest_change_comes_first():
    found = changes(wasteful())
    order = [PRICES.index(change.price) for change in found]
    assert order == sorted(order)
    for price in PRICES:
        savings = [change.saving_bytes for change in found if change.price == price]
        assert savings == sorted(savings, reverse=True)


def test_the_changes_of_a_wasteful_full_fine_tuning():
    keys = [dict(change.keys) for change in changes(wasteful())]
    for expected in (
        {"attention": "sdpa"},
        {"activation_checkpointing": True},
        {"micro_batch_size": 1, "gradient_accumulation_steps": 8},
        {"precision": "bf16"},
        {"seq_len": 512},
        {"method": "lora", "lora_rank": 8, "target_modules": "attention"},
    ):
        assert expected in keys, expected


PACKED = {"batching": "packed", "attention": "flash"}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batching", ["padded", "packed"])
def test_samples_with_a_mask_may_be_packed_without_one(batching: str, attention: str) -> None:
    training = Training(micro_batch_size=4, batching=batching, attention=attention)
    planned = Setup(model=LLAMA, method=LoRA(), training=training, gpu="rtx-4090")
    (packed,) = [change for change in changes(planned) if change.words.startswith("Pack ")]
    assert (dict(packed.keys), packed.price) == (PACKED, "nothing")
    assert applied(planned, packed.keys).training.batching == "packed"


def test_packing_is_not_proposed_where_it_is_refused_or_nothing_is_masked() -> None:
    bert, t4 = {"model": "google-bert/bert-base-uncased"}, {"gpu": "t4", "precision": "fp16"}
    for more in ({"batching": "full"}, bert, t4, PACKED):
        flat = {"model": LLAMA, "batching": "padded", "gpu": "24GiB", **more}
        assert not [change for change in changes(Setup.from_dict(flat)) if change.keys.get("batching")]


def test_harmless_changes_at_once_save_more_than_each():
    found = changes(wasteful())
    (together,) = (change for change in found if change.price == "time" and "at once" in change.words)
    # Fused AdamW saves nothing while the backward pass is the peak, and counts once that is lowered.
    assert {"optimizer", "micro_batch_size", "activation_checkpointing"} <= set(together.keys)
    assert together.saving_bytes > max(
        change.saving_bytes
        for change in found
        if change.price in ("nothing", "time") and change is not together
    )


def test_what_needs_room_on_the_host_is_advised_alone():
    found = [change for change in changes(wasteful()) if change.keys.get("optimizer") == "paged-adamw-32bit"]
    assert [dict(change.keys) for change in found] == [{"optimizer": "paged-adamw-32bit"}]
    assert "the host, which must have room" in found[0].cost


def test_every_change_at_once_is_needed():
    planned = wasteful()
    for change in changes(planned):
        for dropped in (*CHECKPOINTED, "optimizer", "attention"):
            if "at once" in change.words and dropped in change.keys:
                fewer = {key: value for key, value in change.keys.items() if key != dropped}
                assert estimate(applied(planned, fewer)).peak_allocated_bytes > change.peak_allocated_bytes


def test_lora_is_advised_with_what_costs_only_time():
    found = [change for change in changes(wasteful()) if change.price == "method"]
    both = next(change for change in found if "at once" in change.words)
    alone = next(change for change in found if change.keys.get("method") == "lora" and change is not both)
    assert both.keys["method"] == "lora"
    assert "micro_batch_size" not in both.keys  # with Liger's a smaller one saves nothing more
    assert both.keys["loss"] == both.keys["kernels"] == "liger"
    assert both.saving_bytes > alone.saving_bytes


def test_what_is_already_done_is_not_advised():
    frugal = Setup(
        model=LLAMA,
        method=QLoRA(),
        training=Training(
            optimizer="adamw-fused",
            activation_checkpointing=True,
            checkpoint_offload=True,
            seq_len=64,
            precision="bf16-mixed",
            loss="liger",
            kernels="liger",
        ),
    )
    assert changes(frugal) == ()


def test_smaller_states_are_advised_where_all_weights_are_trained():
    def optimizers(method=None, **training):
        planned = Setup(model=LLAMA, method=method, training=Training(seq_len=64, **training))
        advised = {change.keys.get("optimizer") for change in changes(planned)}
        return advised - {None, "adamw-fused"}

    smaller = {"adamw-8bit", "paged-adamw-8bit", "paged-adamw-32bit", "adafactor", "sgd"}
    assert optimizers(precision="fp32") == smaller
    assert optimizers(precision="fp32", optimizer="adamw-8bit") == {"paged-adamw-8bit", "sgd"}
    assert optimizers(LoRA(), precision="fp32") == set()
    in_fp32 = {"paged-adamw-32bit", "adafactor", "sgd"}
    assert optimizers(precision="textbook") == in_fp32


def test_gradients_that_stay_are_given_up_first():
    planned = Setup(model=LLAMA, training=Training(zero_grad="zero", optimizer="adamw-8bit", loss="liger"))
    first = changes(planned)[0]
    assert first.keys == {"zero_grad": "none"}
    assert first.price == "nothing"


def test_a_card_without_bf16_is_not_advised_bf16():
    def precisions(method, gpu):
        small = Setup(model=LLAMA, method=method, training=Training(precision="fp32", seq_len=128), gpu=gpu)
        return [change.keys["precision"] for change in changes(small) if set(change.keys) == {"precision"}]

    assert precisions(LoRA(), "t4") == ["fp16"]
    assert precisions(FullFineTuning(), "t4") == []  # weights trained in fp16 overflow
    assert precisions(FullFineTuning(), "a100-80gb") == ["bf16"]


def test_without_a_gpu_nothing_is_said_about_fitting():
    assert {change.fits for change in changes(wasteful(gpu=None))} == {None}


def test_bare_parameter_counts_get_the_changes_that_are_known():
    full = Setup(model="params:7e9", training=Training(precision="fp32"))
    assert {"precision": "bf16"} in [dict(change.keys) for change in changes(full)]
    peft = Setup(model="params:7e9", method=PeftOfSize(trainable_params=10))
    assert all(change.price != "method" for change in changes(peft))


def test_applied_starts_a_method_afresh():
    planned = Setup(model="gpt2", method=Adapter(adapter_size=8))
    changed = applied(
        planned, {"method": "lora", "lora_rank": 4, "target_modules": "attention", "seq_len": 64}
    )
    assert changed.method == LoRA(lora_rank=4)
    assert changed.training.seq_len == 64
    assert applied(planned, {"adapter_size": 4}).method == Adapter(adapter_size=4)
    assert applied(planned, {"method": "bitfit"}).method == BitFit()
    with pytest.raises(SetupError):
        applied(planned, {"no_such_key": 1})
    with pytest.raises(SetupError, match="unknown method 'loar'; did you mean lora"):
        applied(planned, {"method": "loar"})


def test_as_json():
    change = changes(wasteful())[0]
    assert list(change.to_dict()) == [
        "words", "price", "cost", "keys", "peak_allocated_bytes", "saving_bytes", "fits",
    ]  # fmt: skip


def test_a_chunked_loss_is_advised_where_logits_weigh_and_nothing_stands_behind_the_head() -> None:
    found = changes(Setup(model=LLAMA, training=Training(micro_batch_size=4, seq_len=1024)))
    chunked = next(change for change in found if change.keys == {"loss": "chunked"})
    assert chunked.price == "time"
    assert chunked.saving_bytes > 2**30
    short = changes(Setup(model=LLAMA, training=Training(micro_batch_size=1, seq_len=1024)))  # one chunk
    assert all(change.keys.get("loss") != "chunked" for change in short)
    capped = changes(Setup(model="google/gemma-2-2b", training=Training(micro_batch_size=4, seq_len=1024)))
    assert all(change.keys.get("loss") != "chunked" for change in capped)


def test_ligers_loss_is_advised_where_the_library_has_it() -> None:
    def advised(model: str, **training: Any) -> list[Any]:
        planned = Setup(model=model, training=Training(micro_batch_size=4, seq_len=1024, **training))
        return [change for change in changes(planned) if change.keys == {"loss": "liger"}]

    (fused,) = advised(LLAMA)
    assert fused.price == "nothing"
    assert "liger-kernel" in fused.cost
    assert fused.saving_bytes > 2**30
    assert advised("google/gemma-2-2b")  # it knows the soft cap
    assert advised("gpt2") == []
    assert advised(LLAMA, loss="liger") == []


def test_ligers_kernels_are_advised_where_their_memory_is_known() -> None:
    def advised(model: str, **training: Any) -> list[Any]:
        planned = Setup(model=model, training=Training(micro_batch_size=4, seq_len=1024, **training))
        return [change for change in changes(planned) if change.keys == {"kernels": "liger"}]

    (kernels,) = advised("Qwen/Qwen3-0.6B", loss="liger")
    assert kernels.price == "nothing"
    assert "liger-kernel" in kernels.cost
    assert kernels.saving_bytes > 2**30
    assert advised("gpt2") == []
    assert advised("mistralai/Mixtral-8x7B-v0.1", loss="liger") == []
    assert advised(LLAMA, kernels="liger") == []


def test_weights_in_four_bits_are_advised_to_lora_with_the_same_adapters() -> None:
    method = LoRA(lora_rank=32, lora_dropout=0.1, target_modules=("q_proj", "v_proj"))
    planned = Setup(
        model="meta-llama/Llama-3.1-8B",
        method=method,
        training=Training(activation_checkpointing=True),
        gpu="rtx-4080",
    )
    quantized = next(change for change in changes(planned) if change.keys.get("method") == "qlora")
    assert (quantized.price, quantized.fits) == ("numerics", True)
    after = applied(planned, quantized.keys)
    assert after.method == QLoRA(lora_rank=32, lora_dropout=0.1, target_modules=("q_proj", "v_proj"))
    assert after.training.precision == "bf16-mixed"
    assert estimate(after).peak_allocated_bytes == quantized.peak_allocated_bytes
    on_t4 = changes(planned.replace(gpu="t4", precision="fp16"))
    assert next(c for c in on_t4 if c.keys.get("method") == "qlora").keys["precision"] == "fp16-mixed"
    full = changes(Setup(model="meta-llama/Llama-3.1-8B", gpu="rtx-4090"))
    assert next(c for c in full if c.keys.get("method") == "qlora").price == "method"
    # transformers leaves Falcon's linear layers as they are
    falcon = changes(Setup(model="tiiuae/falcon-7b", method=LoRA()))
    assert all(change.keys.get("method") != "qlora" for change in falcon)


def test_qlora_is_advised_autocast_and_not_away_from_it() -> None:
    planned = Setup(model="meta-llama/Llama-3.1-8B", method=QLoRA(), training=Training(seq_len=2048))
    change = next(change for change in changes(planned) if change.keys == {"precision": "bf16-mixed"})
    assert change.price == "numerics"
    assert change.saving_bytes > 10 * 2**30  # the scores of attention in fp32 are gone
    under = planned.replace(precision="bf16-mixed")
    for mixed in (under, under.replace(activation_checkpointing=True)):  # checkpointed, bf16 needs less
        assert all("precision" not in change.keys for change in changes(mixed))


def test_the_nearest_change_costs_least_and_then_changes_least():
    """Half the micro batch costs time alone; half the sequence is one key, but cuts the data."""
    setup = Setup(
        model="meta-llama/Llama-3.1-8B",
        method=LoRA(),
        training=Training(
            micro_batch_size=4,
            seq_len=8192,
            activation_checkpointing=True,
            checkpoint_offload=True,
            loss="liger",
        ),
        gpu="rtx-4090",
    )
    found = changes(setup)
    assert {"seq_len": 4096} in [dict(change.keys) for change in found if change.fits]
    nearest = nearest_fitting(found)
    assert nearest is not None
    assert dict(nearest.keys) == {"micro_batch_size": 2, "gradient_accumulation_steps": 2}
    assert nearest_fitting([change for change in found if not change.fits]) is None
