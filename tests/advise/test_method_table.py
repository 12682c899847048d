"""All methods for one model: each with its setup, sorted by peak, and the sentence on their order."""

from __future__ import annotations

import itertools

import pytest

from planner import method_table, simulate
from planner.advise.default_methods import OWN, REFERENCE, default_methods
from planner.advise.method_table import MethodRow, MethodTable
from planner.errors import SetupError, TraceError
from planner.estimate import estimate
from planner.report import MemoryReport, Parameters, Parts
from planner.spec import LoRA, PeftConfig, Setup, Training
from planner.units import count, gib
from tests.simulate.small import GPT2, LLAMA, setup_of

LLAMA_1B = Setup(model="meta-llama/Llama-3.2-1B", training=Training(precision="bf16"))


def row(title: str, trained: int, **parts: int) -> MethodRow:
    """A made-up row with these bytes at its peak."""
    report = MemoryReport(
        source="estimate",
        setup=LLAMA_1B.to_dict(),
        parameters=Parameters(total=10**9, trainable=trained),
        parts=Parts(**parts),
        phases=(),
        peak_phase="backward",
    )
    return MethodRow(title=title, setup=LLAMA_1B, report=report)


def test_rows_are_sorted_by_peak_and_estimated_ones_equal_the_estimate() -> None:
    table = method_table(LLAMA_1B)
    peaks = [one.peak_bytes for one in table.rows if one.peak_bytes is not None]
    assert peaks == sorted(peaks)
    assert len(peaks) >= 5
    unknown = [one.peak_bytes is None for one in table.rows]
    assert unknown == sorted(unknown)  # they stand last
    for one in table.rows:
        assert one.setup is not None
        assert one.report == estimate(one.setup)
    assert {one.title for one in table.left_out} == {"BitFit"}
    assert "has none" in table.left_out[0].reason


def test_titles_are_unique_and_every_method_keeps_the_setup_otherwise() -> None:
    setup = LLAMA_1B.replace(method=LoRA(lora_rank=8, target_modules=("q_proj",)), seq_len=300)
    found = default_methods(setup)
    assert len({named.title for named in found}) == len(found) >= 30
    for named in found:
        if named.setup is None:
            continue
        assert named.setup.training == setup.training
        assert named.setup.model == setup.model
        method = named.setup.method
        if isinstance(method, PeftConfig) and named.title.startswith(("DoRA", "OFT", "VeRA")):
            assert method.values["target_modules"] == ["q_proj"]
    assert OWN not in {named.title for named in found}  # it is LoRA, r = 8
    other = default_methods(setup.replace(lora_rank=5))
    assert other[0].title == OWN
    assert other[0].setup == setup.replace(lora_rank=5)


def test_a_bare_number_of_parameters_is_refused() -> None:
    with pytest.raises(SetupError, match="give a model's id"):
        method_table(Setup(model="params:7e9"))


def test_what_cannot_be_answered_is_left_out_with_its_reason() -> None:
    def answers(setup: Setup) -> MemoryReport:
        if isinstance(setup.method, PeftConfig):
            raise TraceError("it cannot be traced.")
        return estimate(setup)

    table = method_table(LLAMA_1B, answers)
    assert all(not isinstance(one.setup.method, PeftConfig) for one in table.rows if one.setup)
    assert {one.reason for one in table.left_out if one.setup is not None} == {"it cannot be traced."}


def test_the_sentence_names_the_pair_that_stands_most_against_the_order() -> None:
    gib_bytes = 2**30
    low = row(REFERENCE, 8_000_000, base_weights=2 * gib_bytes, activations=gib_bytes)
    high = row("IA3", 500_000, base_weights=2 * gib_bytes, activations=3 * gib_bytes)
    highest = row("Full", 900_000_000, base_weights=2 * gib_bytes, optimizer_states=6 * gib_bytes)
    table = MethodTable(rows=(low, high, highest), left_out=())
    assert table.reference is low
    assert high.difference(low) == ("activations", 2 * gib_bytes)
    assert low.difference(low) is None
    said = table.sentence
    assert "33.3 % of all pairs stand the other way round" in said  # one of three
    assert f"IA3 trains {count(500_000)} parameters and peaks at 5.0 GiB" in said
    assert "2.0 GiB of that are activations" in said
    assert "activations in 1, optimizer states in 1" in said


def test_where_both_orders_agree_the_sentence_says_so() -> None:
    rows = (row("A", 10, activations=1), row("B", 20, activations=2))
    assert "is here the order" in MethodTable(rows=rows, left_out=()).sentence
    assert "Too few" in MethodTable(rows=rows[:1], left_out=()).sentence


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_every_method_is_simulated_on_a_small_model(config: dict[str, object]) -> None:
    setup = setup_of(config, seq_len=32)  # type: ignore[arg-type]
    table = method_table(setup, simulate)
    allowed = {"QLoRA nf4, r = 8"}  # without bitsandbytes
    if config is GPT2:  # peft adapts no Conv1D with these
        allowed |= {one.title for one in table.left_out if "Conv1D" in one.reason or "Linear" in one.reason}
    else:
        allowed |= {"BitFit"}  # it has no biases
    assert {one.title for one in table.left_out} <= allowed, [(o.title, o.reason) for o in table.left_out]
    assert all(one.peak_bytes is not None and one.trainable for one in table.rows)
    peaks = [one.peak_bytes for one in table.rows]
    assert peaks == sorted(peaks)  # type: ignore[type-var]
    trained = [one.trainable for one in table.rows]
    assert trained != sorted(trained)  # type: ignore[type-var]
    assert "stand the other way round" in table.sentence
    flat = table.to_dict()
    assert [one["title"] for one in flat["rows"]] == [one.title for one in table.rows]
    reference = next(one for one in table.rows if one.title == REFERENCE)
    for one, values in zip(table.rows, flat["rows"], strict=True):
        if one is not reference and "difference" in values:
            part, more = values["difference"]["part"], values["difference"]["bytes"]
            assert one.report
            assert reference.report
            assert more == getattr(one.report.parts, part) - getattr(reference.report.parts, part)


def test_the_sentences_numbers_are_those_of_the_rows() -> None:
    table = method_table(LLAMA_1B)
    known = [one for one in table.rows if one.peak_bytes is not None]
    pairs = [(a, b) for a, b in itertools.combinations(known, 2) if a.trainable != b.trainable]
    against = sum(a.trainable > b.trainable for a, b in pairs)  # type: ignore[operator]
    assert f"{100 * against / len(pairs):.1f} %" in table.sentence
    named = [one for one in known if one.title in table.sentence and one.title != REFERENCE]
    assert any(gib(one.peak_bytes or 0) in table.sentence for one in named)
