"""The Method page: every formula in symbols and with the current numbers in it, its source and its limits."""

from __future__ import annotations

from html import escape

import streamlit as st

from planner.compare import comparison, full_of, storage
from planner.dashboard import tables
from planner.dashboard.answers import Answer, answer, current_setup
from planner.dashboard.formulas import terms
from planner.dashboard.words import GLOSSARY, NOT_COUNTED, method_title, peak_place, plain
from planner.estimate import estimate
from planner.estimate.parameters import trained_tensors
from planner.spec import PeftOfSize, Setup, Training
from planner.units import count, gb, gib, percent

_SHOWN_TENSORS = 24  # a model has few kinds of tensors; full fine-tuning of a mixture of experts has most


def page() -> None:
    """Draw the page for the setup of the sidebar."""
    setup, problem = current_setup()
    shown = answer(setup)
    st.title("How the number is made", anchor=False)
    if problem:
        st.error(
            f"{problem} The formulas below are for the last setup that made sense.", icon=":material/block:"
        )
    st.markdown(
        f"Now: **{plain(setup.model.id)}**, {method_title(setup.method.name)}, {setup.training.precision}, "
        f"{setup.training.optimizer}, {setup.training.micro_batch_size} x {setup.training.seq_len:,} tokens. "
        "Change the inputs, and the numbers here follow."
    )
    _terms(shown)
    _trained(shown)
    _by_hand()
    _glossary()


def _terms(shown: Answer) -> None:
    st.subheader("The parts of the peak", anchor=False)
    st.caption(
        "In each box the formula of the whole part; at the right what of it is alive at the peak, "
        f"in {peak_place(shown.chosen)}."
    )
    for term in terms(shown.setup, shown.chosen):
        with st.container(border=True, gap="xsmall"):
            with st.container(horizontal=True, vertical_alignment="center"):
                st.markdown(f"**{term.title}**", width="stretch")
                st.markdown(f"**{term.result}**")
            st.latex(term.formula)
            st.markdown(f"{term.numbers}  \n:small[Source: {term.source}]")
    peak = gib(shown.chosen.peak_allocated_bytes)
    st.markdown(f"The peak of allocated memory is the sum of the parts alive at it: **{peak}**.")


def _trained(shown: Answer) -> None:
    st.subheader("The trained tensors", anchor=False)
    tensors = trained_tensors(shown.setup)
    if not tensors:
        st.caption("Of this model only the number of parameters is known.")
        return
    lines = [
        [
            f"<code>{escape(t.name)}</code>",
            " x ".join(f"{size:,}" for size in t.shape),
            f"{t.count:,}",
            f"{t.numel * t.count:,}",
        ]
        for t in tensors[:_SHOWN_TENSORS]
    ]
    st.html(
        tables.html_table(["Tensor", "Shape", "How many", "Parameters"], lines, alt="The trained tensors")
    )
    if len(tensors) > _SHOWN_TENSORS:
        st.caption(f"And {len(tensors) - _SHOWN_TENSORS} more kinds.")
    numbers = shown.chosen.parameters
    st.markdown(
        f"Together **{numbers.trainable:,}** trained parameters, {percent(numbers.trainable_share)} of "
        f"{numbers.total:,}."
    )


def _by_hand() -> None:
    """The textbook's example, worked by the same code as everything else."""
    st.subheader("Worked by hand: 7 billion parameters", anchor=False)
    chosen = Setup(
        model="params:7e9",
        method=PeftOfSize(trainable_params=4_000_000),
        training=Training(precision="textbook"),
    )
    compared = comparison(estimate(full_of(chosen)), estimate(chosen))
    titles = {part.name: tables.part_title(part.name) for part in compared.parts}
    lines = [
        [titles[part.name], gb(part.full_bytes), gb(part.chosen_bytes)]
        for part in compared.parts
        if part.full_bytes or part.chosen_bytes
    ]
    lines.append(["Together", gb(compared.peak.full_bytes), gb(compared.peak.chosen_bytes)])
    st.markdown(
        "16-bit weights and gradients and two fp32 states: 2 + 2 + 8 bytes for each trained parameter, 2 for "
        "a frozen one. In GB of 10^9 bytes, activations not counted."
    )
    head = ["Part", "Full fine-tuning", f"PEFT, {count(4_000_000)} trained"]
    st.html(tables.html_table(head, lines, alt="The hand-worked example", last_is_total=True))
    disk = storage(chosen, 5)
    less = percent(compared.peak.reduction or 0)
    st.markdown(
        f"That is **{less}** less. On disk five tasks take {gb(disk.full_copies_bytes)} as full copies, and "
        f"{gb(disk.base_and_adapters_bytes)} as one base and five adapters."
    )


def _glossary() -> None:
    left, right = st.columns(2, gap="large")
    with left:
        st.subheader("Words", anchor=False)
        st.markdown("\n".join(f"- **{word}**: {meaning}" for word, meaning in GLOSSARY.items()))
    with right:
        st.subheader("What is not counted", anchor=False)
        st.markdown("\n".join(f"- {line}" for line in NOT_COUNTED))


if __name__ == "__main__":  # streamlit runs a page's file as the main script
    page()
