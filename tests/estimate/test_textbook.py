"""The sums worked by hand in the planning literature: 7 billion parameters, 16-bit weights, Adam in fp32."""

from __future__ import annotations

from planner.estimate import estimate
from planner.model import Model
from planner.spec import Method, PeftOfSize, Setup, Training

SEVEN_BILLION = Model(id="params:7e9", bare_parameters=7 * 10**9)


def _setup(method: Method | None = None, precision: str = "textbook") -> Setup:
    return Setup(model=SEVEN_BILLION, method=method, training=Training(precision=precision))


def test_full_fine_tuning_of_seven_billion_is_84_gb() -> None:
    report = estimate(_setup())
    assert report.parts.base_weights == 14 * 10**9
    assert report.parts.gradients == 14 * 10**9
    assert report.parts.optimizer_states == 56 * 10**9
    assert report.peak_allocated_bytes == 84 * 10**9


def test_four_million_peft_parameters_need_14_048_gb() -> None:
    report = estimate(_setup(PeftOfSize(trainable_params=4 * 10**6)))
    assert report.parts.adapter_weights == report.parts.gradients == 8 * 10**6
    assert report.parts.optimizer_states == 32 * 10**6
    assert report.peak_allocated_bytes == 14_048 * 10**6
    assert report.parameters.trainable == 4 * 10**6
    assert report.parameters.total == 7_004 * 10**6


def test_pure_bf16_full_fine_tuning_is_8_bytes_a_parameter() -> None:
    # torch.optim.AdamW keeps its states in the parameter's type: 2 + 2 + 2 x 2
    assert estimate(_setup(precision="bf16")).peak_allocated_bytes == 8 * 7 * 10**9


def test_a_bare_count_names_what_it_does_not_tell() -> None:
    report = estimate(_setup())
    assert report.not_known == ("activations", "logits_and_loss", "temporaries", "workspace")
    assert all(getattr(report.parts, part) == 0 for part in report.not_known)
