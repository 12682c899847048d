"""The estimate of one rank: the ZeRO paper's numbers, and what must hold whatever the setup."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from planner import LoRA, Setup, Sharding, Training
from planner.estimate import estimate
from planner.report import MemoryReport
from planner.units import GB

from .shapes import shortened

LLAMA = shortened("meta-llama/Llama-3.2-1B", 2)
LLAMA8 = shortened("meta-llama/Llama-3.1-8B", 2)
MODEL_BYTES = 7.5e9  # parameters of the ZeRO paper's example


def report(number: int, kind: str, model: Any = LLAMA, **training: Any) -> MemoryReport:
    method = training.pop("method", None)
    options = {key: training.pop(key) for key in ("cpu_offload", "prefetch") if key in training}
    asked: dict[str, Any] = {"num_gpus": number, "sharding": kind, **options}
    sharding = Sharding(**asked) if number > 1 else Sharding()
    return estimate(
        Setup(
            model=model,
            method=method,
            training=Training(**{"precision": "bf16-mixed", "seq_len": 256, **training}),
            sharding=sharding,
        )
    )


@pytest.mark.parametrize(
    ("kind", "gigabytes"), [("zero1", 31.4), ("zero2", 16.6), ("zero3", 1.9)]
)
def test_the_zero_papers_example(kind: str, gigabytes: float) -> None:
    """Rajbhandari et al. 2020, figure 1: 7.5 billion parameters, 64 GPUs, K = 12."""
    found = report(64, kind, "params:7.5e9")
    assert round(found.peak_allocated_bytes / GB, 1) == gigabytes


def test_a_bare_count_is_divided_evenly_under_fsdp() -> None:
    found = report(8, "fsdp", "params:8e9")
    assert found.parts.base_weights == 4 * 10**9
    assert found.parts.gradients == 4 * 10**9
    assert found.parts.optimizer_states == 8 * 10**9


@pytest.mark.parametrize("kind", ["fsdp", "fsdp-grad-op", "zero3"])
@pytest.mark.parametrize("method", [None, LoRA(target_modules=("all-linear",))])
def test_more_gpus_never_need_more_each(kind: str, method: Any) -> None:
    found = [report(number, kind, LLAMA8, method=method) for number in (2, 4, 8, 64, 512)]
    for part in ("base_weights", "optimizer_states"):
        sizes = [getattr(one.parts, part) for one in found]
        assert sizes == sorted(sizes, reverse=True)
    if method is None:
        peaks = [one.peak_allocated_bytes for one in found]
        assert peaks == sorted(peaks, reverse=True)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(["ddp", "fsdp", "fsdp-grad-op", "zero1", "zero2", "zero3"]),
    st.sampled_from([2, 8, 64]),
    st.integers(1, 8),
    st.sampled_from([64, 256, 1024]),
    st.booleans(),
    st.integers(1, 2),
)
def test_parts_are_the_peak_and_batches_cost(
    kind: str, number: int, batch: int, seq_len: int, checkpointed: bool, micro_batches: int
) -> None:
    options = {
        "activation_checkpointing": checkpointed,
        "gradient_accumulation_steps": micro_batches,
        "seq_len": seq_len,
    }
    found = report(number, kind, micro_batch_size=batch, **options)
    assert found.peak_allocated_bytes == max(phase.peak_allocated_bytes for phase in found.phases[2:])
    assert all(size >= 0 for size in found.parts.to_dict().values())
    more = report(number, kind, micro_batch_size=batch + 1, **options)
    assert more.peak_allocated_bytes >= found.peak_allocated_bytes
    assert MemoryReport.from_dict(found.to_dict()) == found


def test_stages_hold_less_and_less() -> None:
    peaks = [report(16, kind, LLAMA8).parts for kind in ("zero1", "zero2", "zero3")]
    assert peaks[0].optimizer_states == peaks[1].optimizer_states == peaks[2].optimizer_states
    assert peaks[0].base_weights == peaks[1].base_weights > 15 * peaks[2].base_weights


def test_ddp_is_one_gpu_and_its_buckets() -> None:
    alone, shared = report(1, "none"), report(4, "ddp")
    buckets = shared.peak_allocated_bytes - alone.peak_allocated_bytes
    assert buckets == pytest.approx(4 * LLAMA.parameters, abs=2**22)
    assert shared.nccl_bytes is not None
    assert alone.nccl_bytes is None


def test_hsdp_holds_the_shards_of_one_node() -> None:
    within, across = report(8, "fsdp"), report(32, "hsdp")
    assert within.parts.base_weights == across.parts.base_weights
    assert across.nccl_bytes == tuple(2 * size for size in within.nccl_bytes or ())


def test_offload_leaves_nothing_on_the_card_but_what_is_gathered() -> None:
    on_card, off = report(8, "fsdp", LLAMA8), report(8, "fsdp", LLAMA8, cpu_offload="parameters")
    assert off.parts.base_weights == off.parts.gradients == off.parts.optimizer_states == 0
    shards = 4 * 4 * LLAMA8.parameters / 8  # fp32 weight, gradient and two states
    assert off.host_bytes == pytest.approx(shards, rel=0.01)
    assert on_card.host_bytes is None
    assert "host_bytes" not in on_card.to_dict()
    assert off.peak_allocated_bytes < on_card.peak_allocated_bytes


def test_more_is_gathered_ahead() -> None:
    peaks = [report(8, "fsdp", LLAMA8, prefetch=ahead).peak_allocated_bytes for ahead in (1, 2)]
    assert peaks[0] < peaks[1]
    assert report(8, "fsdp", LLAMA8).peak_allocated_bytes <= peaks[0]


def test_padding_can_cost_more_than_division_saves() -> None:
    """LoRA's A of rank 8 has 8 rows: 1,024 ranks hold one row each, 128 times what they need."""
    lora = LoRA(lora_rank=8, target_modules=("all-linear",))
    few, many = (report(number, "fsdp", method=lora).parts.adapter_weights for number in (8, 1024))
    assert many > few / 4


def test_unknown_units_are_not_guessed() -> None:
    setup = Setup(
        model=LLAMA, sharding=Sharding(num_gpus=2, sharding="fsdp", shard_unit="LlamaMLP")
    )
    found = estimate(setup)
    assert found.not_known == ("activations", "logits_and_loss", "temporaries")
    assert "units" in found.notes[0]
    assert estimate(setup.replace(shard_unit="LlamaDecoderLayer")).not_known == ()
