"""Weights of a quantized model in other orders of arrival: the order itself, and the run taken again."""

from __future__ import annotations

import dataclasses
import importlib.util
from functools import cache
from typing import Any

import pytest

from planner.advise.fits import verdict
from planner.allocator import AllocatorConfig
from planner.catalog.gpus import gpu
from planner.report import LoadingBand, MemoryReport, Phase
from planner.simulate.arrivals import LOADINGS, Arrivals, Loading, loading_band
from planner.simulate.run import simulate
from planner.spec import QLoRA, Setup, Training
from planner.units import MIB
from tests.simulate.small import LLAMA, model_of

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed; tests/requirements.txt brings it",
)


def test_a_lone_thread_that_never_waits_brings_a_weight_ahead() -> None:
    events = list(Loading(threads=1).order([4, 4, 4]))
    assert events == [(0, True), (1, True), (0, False), (2, True), (1, False), (2, False)]


def test_a_large_weight_lets_the_others_run_ahead() -> None:
    events = list(Loading(threads=4).order([9, 1, 1, 1, 1, 1, 1]))
    assert events.index((0, False)) > events.index((6, True))


@pytest.mark.parametrize("loading", LOADINGS)
def test_every_order_brings_each_weight_before_it_is_quantized_and_quantizes_in_turn(
    loading: Loading,
) -> None:
    sizes = [7, 1, 30, 2, 2, 2, 15] * 5
    events = list(loading.order(sizes))
    brought, quantized = ([n for n, event in events if event is arrives] for arrives in (True, False))
    assert quantized == sorted(brought) == list(range(len(sizes)))
    assert (brought == quantized) != bool(loading.overtaking)
    assert all(events.index((n, True)) < events.index((n, False)) for n in range(len(sizes)))
    assert events == list(loading.order(sizes))  # seeded


def trail(*weights: tuple[int, int]) -> list[tuple[Any, ...]]:
    """Each weight of some MiB arrives, is packed into others, and is given up; then a step takes 1 MiB."""
    entries: list[tuple[Any, ...]] = [(0, "phase", "load", None)]
    for number, (size, packed) in enumerate(weights):
        whole, small = 2 * number + 1, 2 * number + 2
        entries += [(whole, size * MIB), (0, "arrived"), (small, packed * MIB), (-whole,)]
    entries += [(0,), (0, "empty_cache"), (0, "end"), (0, "phase", "attach", None), (0, "end")]
    return [*entries, (0, "phase", "forward", 1), (99, MIB), (-99,), (0, "end")]


def test_waiting_weights_take_room_and_the_cache_keeps_it_for_the_step() -> None:
    arrivals = Arrivals(trail((32, 8), (32, 8), (32, 8)), AllocatorConfig())
    load, attach, forward = arrivals.phases(Loading(threads=4))
    assert load.peak_allocated_bytes == 104 * MIB  # all three wait while the first is packed
    assert (attach.allocated_bytes, attach.reserved_bytes) == (24 * MIB, 116 * MIB)  # 3 of 32, one of 20
    assert forward.peak_allocated_bytes == 25 * MIB
    _, cleared, _ = arrivals.phases(Loading(threads=4, cache_kept=False))
    assert (cleared.allocated_bytes, cleared.reserved_bytes) == (24 * MIB, 52 * MIB)


def test_the_band_holds_the_run_s_own_order_too() -> None:
    own = Phase(name="attach", allocated_bytes=MIB, peak_allocated_bytes=MIB)
    step = Phase(name="forward", step=1, allocated_bytes=MIB, peak_allocated_bytes=99 * MIB)
    band = loading_band(trail((32, 8), (32, 8)), (own, step), AllocatorConfig())
    assert band == LoadingBand(
        resident_bytes=(MIB, 16 * MIB),
        step_bytes=(MIB, 98 * MIB),
        peak_allocated_bytes=(17 * MIB, 99 * MIB),
        orders=len(LOADINGS) + 1,
    )


@cache
def small() -> MemoryReport:
    return simulate(
        Setup(
            model=model_of({**LLAMA, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4}),
            method=QLoRA(lora_rank=8),
            training=Training(seq_len=64, precision="fp16"),
            gpu="t4",
        ),
        steps=1,
    )


@needs_bitsandbytes
def test_a_report_carries_its_band_through_json() -> None:
    report = small()
    assert report.loading_band is not None
    assert MemoryReport.from_dict(report.to_dict()) == report
    lowest, highest = report.loading_band.peak_allocated_bytes
    assert lowest < highest
    assert f"{lowest / MIB:,.0f} to {highest / MIB:,.0f} MiB" in report.notes[-1]


@needs_bitsandbytes
def test_a_run_taken_again_in_its_own_order_is_the_run() -> None:
    watched: list[Any] = []
    setup = Setup.from_dict(small().setup)
    report = simulate(setup, steps=1, watch=watched.append)
    (simulation,) = watched
    arrivals = Arrivals(simulation.trail, simulation.allocator.config)
    in_turn = InTurn(cache_kept=False)
    assert arrivals.phases(in_turn) == report.phases


class InTurn(Loading):
    """No weight before the one before it is quantized."""

    def order(self, sizes_bytes: Any) -> Any:
        return ((number, arrives) for number in range(len(sizes_bytes)) for arrives in (True, False))


@needs_bitsandbytes
def test_a_verdict_s_upper_edge_holds_the_band() -> None:
    report = small()
    assert report.loading_band is not None
    _, highest = report.loading_band.peak_allocated_bytes
    without = dataclasses.replace(report, loading_band=None)
    card = gpu("t4")
    more = verdict(report, card).upper_bytes - verdict(without, card).upper_bytes
    assert more == max(0, highest - report.peak_allocated_bytes)
    wide = dataclasses.replace(
        report.loading_band, peak_allocated_bytes=(highest, report.peak_allocated_bytes + 5 * MIB)
    )
    wider = dataclasses.replace(report, loading_band=wide)
    assert verdict(wider, card).upper_bytes == verdict(without, card).upper_bytes + 5 * MIB


@needs_bitsandbytes
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_an_8_bit_weight_comes_twice(precision: Any) -> None:
    """transformers 5.23, Bnb8bitQuantize: over the host to Int8Params, which brings it back in fp16."""
    watched: list[Any] = []
    model = model_of({**LLAMA, "num_hidden_layers": 1})
    setup = Setup(
        model=model, method=QLoRA(quantization="int8"), training=Training(seq_len=64, precision=precision)
    )
    simulate(setup, steps=1, watch=watched.append)
    entries = watched[0].trail
    marks = [i for i, entry in enumerate(entries) if entry[1:] == ("arrived",)]
    at = next(i for i in marks if all(entry[0] > 0 for entry in entries[i + 1 : i + 4]))
    weight, again, scales, codes = (entries[i] for i in (at - 1, at + 1, at + 2, at + 3))
    count = 256 * 512  # down_proj
    assert [entry[1] for entry in (weight, again, scales, codes)] == [2 * count, 2 * count, 4 * 256, count]
    assert [-entry[0] for entry in entries[at + 4 : at + 6]] == [again[0], weight[0]]
