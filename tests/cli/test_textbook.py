"""The figures worked by hand, through the real command line."""

from __future__ import annotations

import pytest

TEXTBOOK = ("compare", "--model", "params:7e9", "--precision", "textbook", "--trainable-params", "4e6")
GB = 10**9


@pytest.fixture(scope="module")
def textbook(answer):
    return answer(*TEXTBOOK)


def test_full_fine_tuning_of_7_billion_parameters_takes_84_gb(textbook):
    # 7e9 x (2 weights + 2 gradients + 8 AdamW)
    parts = textbook["full"]["parts"]
    assert parts["base_weights"] == 14 * GB
    assert parts["gradients"] == 14 * GB
    assert parts["optimizer_states"] == 56 * GB
    assert textbook["full"]["peak_allocated_bytes"] == 84 * GB


def test_4_million_trained_parameters_take_14_048_gb(textbook):
    # 14 GB frozen + 8 MB weights + 8 MB gradients + 32 MB AdamW
    parts = textbook["chosen"]["parts"]
    assert parts["base_weights"] == 14 * GB
    assert parts["adapter_weights"] == 8_000_000
    assert parts["gradients"] == 8_000_000
    assert parts["optimizer_states"] == 32_000_000
    assert textbook["chosen"]["peak_allocated_bytes"] == 14_048_000_000


def test_the_reduction_is_unrounded(textbook):
    assert textbook["reduction"] == pytest.approx(1 - 14.048 / 84, abs=1e-15)
    assert f"{textbook['reduction']:.1%}" == "83.3%"
    assert textbook["peak"]["saved_bytes"] == 84 * GB - 14_048_000_000


def test_differences_of_the_parts_sum_to_that_of_the_peak(textbook):
    saved = sum(part["saved_bytes"] for part in textbook["difference"].values())
    assert saved == textbook["peak"]["saved_bytes"]
    assert textbook["difference"]["base_weights"]["reduction"] == 0
    assert textbook["difference"]["adapter_weights"]["reduction"] is None  # nothing to reduce


def test_five_tasks_take_70_gb_as_copies_and_14_04_gb_as_adapters(answer):
    space = answer(*TEXTBOOK, "--tasks", "5")["storage"]
    assert space["full_copies_bytes"] == 70 * GB
    assert space["base_bytes"] == 14 * GB
    assert space["adapter_bytes"] == 8_000_000
    assert space["base_and_adapters_bytes"] == 14_040_000_000


def test_people_read_the_same_figures(command):
    text = command(*TEXTBOOK).stdout
    for figure in ("84 GB", "14.05 GB", "83.3 %", "70 GB as full copies", "14.04 GB as one base"):
        assert figure in text, text


def test_lora_of_rank_8_on_one_4096_by_4096_matrix(answer):
    # 8 x 4096 + 4096 x 8 = 65,536 of 16,777,216: 99.6 % fewer
    found = answer(
        "params", "--model", "meta-llama/Llama-2-7b-hf", "--method", "lora", "--lora-rank", "8",
        "--target-modules", "layers.0.self_attn.q_proj",
    )  # fmt: skip
    (matrix,) = found["adapted"]
    assert (matrix["shape"], matrix["count"]) == ([4096, 4096], 1)
    assert matrix["full"] == 16_777_216
    assert matrix["trainable"] == found["parameters"]["trainable"] == 65_536
    assert matrix["reduction"] == 1 - 65_536 / 16_777_216
    assert f"{matrix['reduction']:.1%}" == "99.6%"
