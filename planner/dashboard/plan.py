"""The Plan page: does it fit, and where does the memory go?"""

from __future__ import annotations

from functools import partial

import streamlit as st

from planner.advise import largest_micro_batch
from planner.checkpointing import offloaded_note
from planner.compare import full_of
from planner.dashboard import figures, packed, pinned, recorded, several, simulating, state, tables
from planner.dashboard.answers import Answer, answer, current_setup
from planner.dashboard.details import beside_the_table, details, nearest_change
from planner.dashboard.words import method_title, peak_place, plain
from planner.optimizers import paged_note
from planner.report import PARTS, early_peak_note
from planner.units import count, gib, percent

_VERDICTS = {
    "fits": (st.success, ":material/check_circle:", "Fits"),
    "tight": (st.warning, ":material/warning:", "Tight"),
    "does not fit": (st.error, ":material/cancel:", "Does not fit"),
    "not known": (st.info, ":material/help:", "Not known"),
}


def page() -> None:
    """Draw the page: words and cards first, the figure after them."""
    setup, problem = current_setup()
    st.title("Does it fit?", anchor=False)
    for line in state.link_warnings():
        st.warning(f"The link: {plain(line)} The default is used.", icon=":material/link_off:")
    beside = dict.fromkeys((setup, full_of(setup)))
    shown = answer(setup, [*simulating.simulated_reports(setup), *recorded.measured_reports(*beside)])
    if problem:
        _problem(problem, shown)
    _verdict(shown)
    if shown.chosen.not_known:
        simulating.control(setup)
    nearest_change(shown)
    _cards(shown)
    _bars(shown)
    left, right = st.columns(2, gap="large")
    with left:
        _table(shown)
    with right:
        beside_the_table(shown)
    pinned.section(shown)
    several.section(shown)
    details(shown)


def _problem(problem: str, shown: Answer) -> None:
    st.error(plain(problem), icon=":material/block:")
    setup = shown.setup
    st.caption(
        f":material/history: Below is the last setup that made sense: {plain(setup.model.id)}, "
        f"{method_title(setup.method.name)}, {setup.training.micro_batch_size} x "
        f"{setup.training.seq_len:,} tokens."
    )


def _verdict(shown: Answer) -> None:
    if shown.verdict is None:
        return
    box, icon, word = _VERDICTS[shown.verdict.word]
    sentence = shown.verdict.sentence
    box(f"**{word}**{sentence.removeprefix(word)}" if sentence.startswith(word) else sentence, icon=icon)


def _cards(shown: Answer) -> None:
    chosen, peak = shown.chosen, shown.comparison.peak
    row = st.container(horizontal=True, gap="small")
    with row:
        against = None if shown.is_full else f"{gib(peak.saved_bytes)} less than full"
        if peak.saved_bytes < 0:
            against = f"{gib(-peak.saved_bytes)} more than full"
        st.metric(
            "Predicted peak",
            gib(chosen.peak_allocated_bytes),
            against or f"at {peak_place(chosen)}",
            delta_color="off",
            delta_arrow="off",
            border=True,
            height="stretch",
            help=f"Peak of allocated memory, by formula. It is reached in {peak_place(chosen)}.",
        )
        _measured_card(shown)
        st.metric(
            "Trainable parameters",
            count(chosen.parameters.trainable),
            f"{percent(chosen.parameters.trainable_share)} of {count(chosen.parameters.total)}",
            delta_color="off",
            delta_arrow="off",
            border=True,
            height="stretch",
        )
        _largest_card(shown)


def _measured_card(shown: Answer) -> None:
    error = shown.prediction_error
    st.metric(
        "Measured peak",
        "Not measured" if shown.measured is None else gib(shown.measured.peak_allocated_bytes),
        "no run recorded"
        if error is None
        else f"the prediction is {'+' if error > 0 else ''}{percent(error)} off",
        delta_color="off",
        delta_arrow="off",
        border=True,
        height="stretch",
        help="Only what a CUDA device produced is shown as measured.",
    )


def _largest_card(shown: Answer) -> None:
    largest = largest_micro_batch(shown.setup) if shown.setup.gpu else None
    value = "Not known" if largest is None else f"{largest:,}" if largest else "None"
    st.metric(
        "Largest micro batch",
        value,
        f"at {shown.setup.training.seq_len:,} tokens",
        delta_color="off",
        delta_arrow="off",
        border=True,
        height="stretch",
        help="The most sequences in one pass that still fit the GPU at the upper edge of the error band.",
    )


def _bars(shown: Answer) -> None:
    with st.container(horizontal=True, vertical_alignment="center"):
        st.subheader("Where the memory goes", anchor=False, width="stretch")
        pinned.control(shown)
        if not shown.chosen.not_known:
            simulating.control(shown.setup)
    st.plotly_chart(
        figures.bars(shown.rows, shown.verdict),
        key="_bars",
        config=figures.CONFIG,
        alt=figures.bars_alt(shown.rows, shown.verdict),
    )
    st.html(figures.legend(shown.rows, shown.verdict))
    if any(part in report.not_known for _, report in shown.rows for part in PARTS):
        for note in shown.chosen.notes:
            st.caption(f":material/info: {plain(note)}")
        return
    host = shown.chosen.provenance
    notes = (
        early_peak_note(shown.chosen),  # the other parts are none at the peak
        offloaded_note(host["offloaded_bytes"]) if host.get("offloaded_bytes") else "",
        paged_note(host["paged_bytes"]) if host.get("paged_bytes") else "",
    )
    for note in filter(None, notes):
        st.caption(f":material/info: {plain(note)}")


def _table(shown: Answer) -> None:
    st.html(tables.parts_table(shown.rows, None if shown.is_full else shown.comparison))
    with st.container(horizontal=True):
        st.download_button(
            "CSV",
            partial(tables.parts_csv, shown.rows),
            file_name="vram-plan.csv",
            mime="text/csv",
            icon=":material/download:",
            on_click="ignore",
            key="_csv",
        )
        st.download_button(
            "JSON",
            partial(tables.reports_json, shown.rows),
            file_name="vram-plan.json",
            mime="application/json",
            icon=":material/download:",
            on_click="ignore",
            key="_json",
        )
        packed.download(shown.setup)


if __name__ == "__main__":  # streamlit runs a page's file as the main script
    page()
