"""The verdict: what must fit, the error band, and the words."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from planner.advise.fits import context_bytes, verdict
from planner.catalog.gpus import Gpu, gpu
from planner.report import MemoryReport, OutOfMemory, Parameters, Parts
from planner.units import GIB, MIB

T4 = gpu("t4")

# (peak allocated, peak reserved, attention) in MiB of the unquantized LoRA runs on one Tesla T4:
# measurement archive of fitcheck-llm 0.3.1 on PyPI (MIT licence).
T4_RUNS = [
    (1026.91943359375, 1070.0, "efficient"),
    (3148.10693359375, 3284.0, "efficient"),
    (2756.193359375, 2880.0, "efficient"),
    (3287.833984375, 3532.0, "efficient"),
    (4354.115234375, 4696.0, "efficient"),
    (4976.982421875, 5398.0, "efficient"),
    (6528.748046875, 7094.0, "efficient"),
    (2757.193359375, 2908.0, "eager"),
    (1027.29443359375, 1104.0, "eager"),
    (6616.115234375, 7662.0, "eager"),
    (6536.748046875, 7734.0, "eager"),
    (3518.083984375, 4226.0, "eager"),
    (5706.232421875, 7146.0, "eager"),
    (3180.10693359375, 4476.0, "eager"),
]
T4_CONTEXT_MIB = 140.875


def report(allocated_bytes, *, source="estimate", reserved_bytes=None, attention="sdpa", **more):
    return MemoryReport(
        source=source,
        setup={"attention": attention},
        parameters=Parameters(total=100, trainable=1),
        parts=Parts(activations=allocated_bytes),
        phases=(),
        peak_phase="backward",
        peak_reserved_bytes=reserved_bytes,
        **more,
    )


def card(total_bytes, memory_kind="torch", capability=(8, 0)):
    return Gpu(
        name="card", driver_name="A Card", total_bytes=total_bytes, memory_kind=memory_kind,
        capability=capability, source="this test",
    )  # fmt: skip


@pytest.mark.parametrize(("allocated_mib", "reserved_mib", "attention"), T4_RUNS)
def test_the_band_holds_the_runs_it_was_taken_from(allocated_mib, reserved_mib, attention):
    found = verdict(report(int(allocated_mib * MIB), attention=attention), T4)
    used_bytes = (reserved_mib + T4_CONTEXT_MIB) * MIB
    assert allocated_mib * MIB < used_bytes <= found.upper_bytes


def test_the_number_shown_is_unbiased_over_those_runs():
    ratios = [
        verdict(report(int(allocated * MIB), attention=attention), T4).device_bytes
        / ((reserved + T4_CONTEXT_MIB) * MIB)
        for allocated, reserved, attention in T4_RUNS
    ]
    assert abs(sum(ratio > 1 for ratio in ratios) - len(ratios) / 2) <= 1


def test_a_known_reserved_peak_is_used_as_it_is():
    found = verdict(report(5 * GIB, source="measurement", reserved_bytes=6 * GIB), T4)
    assert found.device_bytes == found.upper_bytes == 6 * GIB + int(T4_CONTEXT_MIB * MIB)
    assert found.peak_bytes == 5 * GIB
    simulated = verdict(report(5 * GIB, source="simulation", reserved_bytes=6 * GIB), T4)
    assert simulated.device_bytes == found.device_bytes
    assert simulated.upper_bytes == round(6 * GIB * 1.01) + int(T4_CONTEXT_MIB * MIB)


def test_the_words_at_the_edges_of_the_band():
    run = report(10 * GIB)
    found = verdict(run, card(80 * GIB))
    assert found.word == "fits"
    assert found.peak_bytes < found.device_bytes < found.upper_bytes
    assert verdict(run, card(found.upper_bytes)).word == "fits"
    assert verdict(run, card(found.upper_bytes)).headroom_bytes == 0
    assert verdict(run, card(found.upper_bytes - 1)).word == "tight"
    assert verdict(run, card(found.device_bytes)).word == "tight"
    assert verdict(run, card(found.device_bytes - 1)).word == "does not fit"


def test_an_allocated_peak_as_large_as_the_card_does_not_fit():
    assert verdict(report(16 * GIB), card(16 * GIB)).word == "does not fit"


def test_the_context_counts():
    run = report(0, source="measurement", reserved_bytes=16 * GIB - 100 * MIB)
    assert verdict(run, card(16 * GIB)).word == "does not fit"
    assert context_bytes(T4) == (int(T4_CONTEXT_MIB * MIB),) * 2
    usual, largest = context_bytes(card(GIB))
    assert 400 * MIB < usual < largest <= 512 * MIB


def test_a_size_that_is_no_report_of_torch_gives_less():
    capacities = [
        verdict(report(1), card(GIB, kind)).capacity_bytes for kind in ("torch", "driver", "nominal")
    ]
    assert capacities == sorted(capacities, reverse=True)
    assert capacities[0] == GIB
    assert verdict(report(1), card(GIB, "asked", None)).capacity_bytes == GIB


def test_unknown_parts_are_never_called_a_fit():
    known = report(GIB, not_known=("activations",))
    found = verdict(known, card(80 * GIB))
    assert found.word == "not known"
    assert not found.fits
    assert "activations are not counted" in found.sentence
    assert verdict(report(80 * GIB, not_known=("activations",)), card(80 * GIB)).word == "does not fit"


def test_a_run_that_ran_out_of_memory_does_not_fit():
    failure = OutOfMemory(phase="backward", requested_bytes=GIB, free_bytes=0)
    found = verdict(
        report(GIB, source="simulation", reserved_bytes=GIB, out_of_memory=failure), card(8 * GIB)
    )
    assert found.word == "does not fit"
    assert "ran out" in found.sentence


@pytest.mark.parametrize(
    ("total_bytes", "starts"),
    [(80 * GIB, "Fits A Card: "), (int(11.3 * GIB), "Tight on A Card: "), (8 * GIB, "Does not fit A Card: ")],
)
def test_the_sentence_says_the_word_and_the_numbers(total_bytes, starts):
    found = verdict(report(10 * GIB), card(total_bytes))
    assert found.sentence.startswith(starts)
    assert "the predicted peak of 10.0 GiB" in found.sentence
    assert f"{total_bytes / GIB:.1f} GiB" in found.sentence
    assert "\n" not in found.sentence
    assert found.sentence.endswith(".")


@pytest.mark.parametrize(("source", "word"), [("simulation", "simulated"), ("measurement", "measured")])
def test_the_sentence_says_where_the_number_is_from(source, word):
    assert f"the {word} peak" in verdict(report(GIB, source=source), T4).sentence


@given(less=st.integers(0, 200 * GIB), more=st.integers(0, 200 * GIB), total=st.integers(GIB, 200 * GIB))
def test_a_larger_peak_never_has_a_better_verdict(less, more, total):
    order = ["fits", "tight", "does not fit"]
    small, large = sorted((less, more))
    words = [order.index(verdict(report(size), card(total)).word) for size in (small, large)]
    assert words == sorted(words)


def test_as_json():
    found = verdict(report(GIB), T4).to_dict()
    assert list(found) == [
        "word", "gpu", "peak_bytes", "device_bytes",
        "upper_bytes", "capacity_bytes", "headroom_bytes", "sentence",
    ]  # fmt: skip
