"""More work never needs less memory; the parts sum to the peak."""

from __future__ import annotations

from hypothesis import given, settings, strategies as st

from planner.estimate import estimate
from planner.report import PARTS
from planner.spec import Adapter, BitFit, FullFineTuning, LoRA, Method, Setup, Training

from .shapes import shortened

MODELS = [
    shortened(name, layers=2)
    for name in (
        "Qwen/Qwen2.5-0.5B",
        "openai-community/gpt2",
        "google/gemma-3-270m",
        "EleutherAI/pythia-160m",
    )
]
METHODS: list[Method] = [
    FullFineTuning(),
    LoRA(lora_rank=4),
    LoRA(lora_rank=4, target_modules=("all-linear",), lora_dropout=0.1),
    Adapter(adapter_kind="houlsby"),
    BitFit(),
]
TRAININGS = st.builds(
    Training,
    micro_batch_size=st.integers(1, 8),
    seq_len=st.integers(1, 1024),
    precision=st.sampled_from(["fp32", "bf16", "fp16", "bf16-mixed"]),
    optimizer=st.sampled_from(["adamw", "adamw-fused", "sgd"]),
    activation_checkpointing=st.booleans(),
    attention=st.sampled_from(["sdpa", "eager", "efficient"]),
    gradient_accumulation_steps=st.integers(1, 2),
)
TRAININGS |= st.builds(
    Training,
    micro_batch_size=st.integers(1, 8),
    seq_len=st.integers(1, 1024),
    activation_checkpointing=st.just(True),
    checkpoint_every=st.integers(1, 40),
    checkpoint_offload=st.booleans(),
    optimizer=st.just("adamw-fused"),
    loss=st.sampled_from(["full", "chunked"]),
)


def _peak(setup: Setup) -> int:
    return estimate(setup).peak_allocated_bytes


def _possible(model_index: int, method: Method) -> bool:
    return not (isinstance(method, BitFit) and MODELS[model_index].id.startswith("google"))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 3), st.sampled_from(METHODS), TRAININGS)
def test_parts_sum_to_the_peak_and_none_is_negative(index: int, method: Method, training: Training) -> None:
    if not _possible(index, method):
        return
    report = estimate(Setup(model=MODELS[index], method=method, training=training))
    parts = [getattr(report.parts, name) for name in PARTS]
    assert min(parts) >= 0
    assert sum(parts) == report.peak_allocated_bytes
    assert report.peak_allocated_bytes == max(p.peak_allocated_bytes for p in report.phases)


# The rest of a segment that is not split off may come or go with a tensor's size: at most 1 MiB a tensor.
@settings(max_examples=100, deadline=None)
@given(st.integers(0, 3), st.sampled_from(METHODS), TRAININGS)
def test_a_larger_batch_or_sequence_never_needs_less(index: int, method: Method, training: Training) -> None:
    if not _possible(index, method):
        return
    setup = Setup(model=MODELS[index], method=method, training=training)
    twice = setup.replace(micro_batch_size=2 * training.micro_batch_size)
    longer = setup.replace(seq_len=training.seq_len + 1 if training.seq_len < 1024 else 1024)
    slack = 0.02 * _peak(setup)
    assert _peak(twice) >= _peak(setup) - slack
    assert _peak(longer) >= _peak(setup) - slack


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 3), st.integers(1, 32), TRAININGS)
def test_a_higher_rank_never_needs_less(index: int, rank: int, training: Training) -> None:
    low = Setup(model=MODELS[index], method=LoRA(lora_rank=rank), training=training)
    assert _peak(low.replace(lora_rank=2 * rank)) >= _peak(low) - 0.01 * _peak(low)
