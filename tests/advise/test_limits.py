"""The most that fits, the smallest GPU and the grid."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from planner.advise import grid, largest_micro_batch, largest_seq_len, smallest_gpu, verdict, verdicts
from planner.advise.limits import _largest
from planner.catalog.gpus import gpus
from planner.errors import SetupError
from planner.estimate import estimate
from planner.spec import LoRA, PeftOfSize, Setup, Training

LLAMA = "meta-llama/Llama-3.2-1B"


def setup(gpu="24GiB", **training):
    return Setup(model=LLAMA, method=LoRA(), training=Training(**training), gpu=gpu)


def fits(planned):
    return verdict(estimate(planned), planned.gpu).fits


@given(threshold=st.integers(0, 5000), limit=st.integers(1, 3000))
def test_bisection_finds_the_largest_that_fits(threshold, limit):
    assert _largest(lambda size: size <= threshold, limit) == min(threshold, limit)


@given(threshold=st.integers(0, 10**9))
def test_bisection_asks_few_times_and_never_beyond_the_limit(threshold):
    asked = []

    def check(size):
        asked.append(size)
        return size <= threshold

    _largest(check, 10**9)
    assert max(asked) <= 10**9
    assert len(asked) <= 2 * 31


def test_the_largest_micro_batch_fits_and_one_more_does_not():
    planned = setup()
    found = largest_micro_batch(planned)
    assert found >= 1
    assert fits(planned.replace(micro_batch_size=found))
    assert not fits(planned.replace(micro_batch_size=found + 1))


def test_the_longest_sequence_fits_and_one_more_does_not():
    planned = setup()
    found = largest_seq_len(planned)
    assert 1 <= found < planned.model.max_positions
    assert fits(planned.replace(seq_len=found))
    assert not fits(planned.replace(seq_len=found + 1))


def test_the_longest_sequence_ends_at_the_positions_of_the_model():
    planned = Setup(model="gpt2", method=LoRA(), gpu="80GiB")
    assert largest_seq_len(planned) == 1024


def test_a_card_too_small_for_the_weights_takes_nothing():
    assert largest_micro_batch(setup("1GiB")) == 0
    assert largest_seq_len(setup("1GiB")) == 0


def test_limits_do_not_depend_on_the_batch_that_is_asked_for():
    assert largest_micro_batch(setup(micro_batch_size=1)) == largest_micro_batch(setup(micro_batch_size=512))


def test_a_bare_parameter_count_has_no_known_limit():
    planned = Setup(model="params:1e9", method=PeftOfSize(trainable_params=1000), gpu="24GiB")
    assert largest_micro_batch(planned) is None
    assert largest_seq_len(planned) is None
    assert smallest_gpu(planned) is None


def test_no_gpu_is_an_error():
    planned = Setup(model=LLAMA)
    for ask in (largest_micro_batch, largest_seq_len, lambda asked: grid(asked, [1], [1])):
        with pytest.raises(SetupError, match="no GPU is given"):
            ask(planned)


def test_no_smaller_gpu_fits():
    planned = setup(None, micro_batch_size=8, seq_len=1024)
    found = smallest_gpu(planned)
    assert found is not None
    assert fits(planned.replace(gpu=found))
    for smaller in gpus():
        if smaller.total_bytes < found.total_bytes:
            assert not fits(planned.replace(gpu=smaller)), smaller.name


@pytest.mark.parametrize("model", ["gpt2", LLAMA])
def test_the_verdict_on_every_card_is_that_of_its_own_estimate(model):
    planned = Setup(model=model, method=LoRA(), training=Training(micro_batch_size=8))
    expected = {c.name: verdict(estimate(planned.replace(gpu=c)), c) for c in gpus()}
    assert {card.name: found for card, found in verdicts(planned)} == expected
    assert len({card.capability for card in gpus()}) > 3  # what an estimate may share


def test_a_grid_asked_again_is_the_same_and_another_setup_gets_its_own():
    planned = setup()
    first = grid(planned, [1, 2], [128, 256])
    assert grid(planned.replace(micro_batch_size=2), [1, 2], [128, 256]) == first
    other = grid(planned.replace(precision="fp32"), [1, 2], [128, 256])
    assert other[0][0].verdict.peak_bytes > first[0][0].verdict.peak_bytes


def test_no_gpu_fits_what_is_too_large():
    assert smallest_gpu(Setup(model="meta-llama/Llama-3.1-70B", training=Training(precision="fp32"))) is None


def test_the_grid_has_a_verdict_for_each_cell():
    planned = Setup(model="gpt2", gpu="16GiB")
    cells = grid(planned, [1, 64], [256, 1024, 2048])
    assert [[(cell.micro_batch_size, cell.seq_len) for cell in row] for row in cells] == [
        [(batch, seq_len) for seq_len in (256, 1024, 2048)] for batch in (1, 64)
    ]
    assert cells[0][0].verdict.word == "fits"
    assert cells[1][1].verdict.word == "does not fit"
    assert cells[0][2].verdict is None  # gpt2 has 1,024 positions
    assert cells[0][1].verdict == verdict(estimate(planned.replace(seq_len=1024)), planned.gpu)
    assert cells[0][2].to_dict() == {"micro_batch_size": 1, "seq_len": 2048, "verdict": None}
