"""Reports side by side, and the disk space for several tasks."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from planner.compare import comparison, full_of, storage
from planner.errors import SetupError
from planner.estimate import estimate
from planner.estimate.parameters import parameters
from planner.report import PARTS, MemoryReport, Parameters, Parts
from planner.spec import Adapter, BitFit, FullFineTuning, LoRA, PeftOfSize, Setup, Training

sizes = st.fixed_dictionaries({name: st.integers(0, 10**12) for name in PARTS})


def report(parts, source="estimate", trainable=1):
    return MemoryReport(
        source=source,
        setup={},
        parameters=Parameters(total=100, trainable=trainable),
        parts=Parts(**parts),
        phases=(),
        peak_phase="backward",
    )


@given(full=sizes, chosen=sizes)
def test_differences_sum_to_the_difference_of_the_peaks(full, chosen):
    both = comparison(report(full), report(chosen))
    assert [part.name for part in both.parts] == list(PARTS)
    assert sum(part.saved_bytes for part in both.parts) == both.peak.saved_bytes
    assert both.peak.saved_bytes == sum(full.values()) - sum(chosen.values())


def test_reductions_are_shares_of_full_fine_tuning():
    both = comparison(
        report({"gradients": 200, "workspace": 0}, trainable=100),
        report({"gradients": 50, "workspace": 10}, trainable=25),
    )
    reductions = {part.name: part.reduction for part in both.parts}
    assert reductions["gradients"] == 0.75
    assert reductions["workspace"] is None  # nothing to reduce, and no division by zero
    assert both.peak.reduction == 1 - 60 / 200
    assert both.trainable_reduction == 0.75


def test_a_prediction_is_not_compared_with_a_measurement():
    with pytest.raises(SetupError, match="got estimate and measurement"):
        comparison(report({}), report({}, source="measurement"))


def test_full_of_changes_the_method_alone():
    setup = Setup(model="gpt2", method=LoRA(), training=Training(seq_len=128), gpu="t4")
    full = full_of(setup)
    assert isinstance(full.method, FullFineTuning)
    assert (full.model, full.training, full.gpu) == (setup.model, setup.training, setup.gpu)


def test_storage_of_lora_counts_fp32_adapters_over_a_16_bit_base():
    # peft keeps and saves the adapter in fp32 over a bf16 base.
    setup = Setup(model="gpt2", method=LoRA(target_modules=("c_attn",)))
    space = storage(setup, tasks=3)
    assert space.base_bytes == space.full_copy_bytes == 124_439_808 * 2  # transformers: gpt2 has 124,439,808
    assert space.adapter_bytes == 12 * 8 * (768 + 2304) * 4
    assert space.full_copies_bytes == 3 * space.full_copy_bytes
    assert space.base_and_adapters_bytes == space.base_bytes + 3 * space.adapter_bytes
    assert space.reduction == 1 - space.base_and_adapters_bytes / space.full_copies_bytes


def test_storage_of_bitfit_counts_biases_in_the_dtype_of_the_base():
    setup = Setup(model="gpt2", method=BitFit())
    assert storage(setup).adapter_bytes == parameters(setup).trainable * 2


@pytest.mark.parametrize("method", [LoRA(), Adapter(), BitFit(), PeftOfSize(trainable_params=10)])
@pytest.mark.parametrize("precision", ["fp32", "textbook"])
def test_storage_counts_each_trained_parameter_once(method, precision):
    setup = Setup(model="gpt2", method=method, training=Training(precision=precision))
    bytes_each = {"fp32": 4, "textbook": 2}[precision]
    assert storage(setup).adapter_bytes == parameters(setup).trainable * bytes_each


def test_a_run_is_resumed_with_its_optimizer_states():
    """torch/optim/adam.py: two states in the weight's type, and a step counter in fp32 for each tensor."""
    planned = Setup(model="meta-llama/Llama-3.2-1B", method=LoRA(lora_rank=8, target_modules=("q_proj",)))
    space = storage(planned)
    assert space.optimizer_bytes == 2 * 4 * 16 * 8 * (2048 + 2048) + 4 * 2 * 16
    assert space.full_optimizer_bytes == 2 * 2 * 1_235_814_400 + 4 * 146
    assert storage(planned.replace(optimizer="sgd")).optimizer_bytes == 0
    assert storage(full_of(planned)).optimizer_bytes == space.full_optimizer_bytes
    factored = storage(planned.replace(optimizer="adafactor"))  # rows, columns and an RMS of A and of B
    assert factored.optimizer_bytes == 4 * 16 * 2 * (8 + 2048 + 1)
    bare = Setup(model="params:7e9", training=Training(optimizer="adafactor"))
    assert storage(bare).optimizer_bytes is None
    textbook = Setup(model="params:7e9", method=PeftOfSize(trainable_params=4_000_000))
    textbook = textbook.replace(precision="textbook")
    assert storage(textbook).optimizer_bytes == 8 * 4_000_000 + 4
    assert storage(textbook).full_optimizer_bytes == 56 * 10**9


def test_full_fine_tuning_has_no_base_to_share():
    space = storage(Setup(model="gpt2"), tasks=4)
    assert space.base_and_adapters_bytes == space.full_copies_bytes
    assert space.reduction == 0


@pytest.mark.parametrize("tasks", [0, -1, 1.5, "5", True])
def test_storage_refuses_no_tasks(tasks):
    with pytest.raises(SetupError, match="tasks must be a whole number of at least 1"):
        storage(Setup(model="gpt2"), tasks=tasks)


def test_a_comparison_as_json_holds_both_reports():
    setup = Setup(model="gpt2", method=LoRA())
    both = comparison(estimate(full_of(setup)), estimate(setup))
    found = both.to_dict()
    assert MemoryReport.from_dict(found["full"]) == MemoryReport.from_dict(both.full.to_dict())
    assert found["chosen"]["setup"]["method"] == "lora"
    assert list(found["difference"]) == list(PARTS)
