"""Every method for the model, sorted by peak: predicted at once, simulated on request, one by one."""

from __future__ import annotations

import csv
import io
from functools import partial
from html import escape

import streamlit as st

from planner.advise import MethodRow, MethodTable, method_table, verdict
from planner.advise.default_methods import default_methods
from planner.dashboard import simulating
from planner.dashboard.answers import Answer
from planner.dashboard.simulations import Simulated
from planner.dashboard.tables import html_table
from planner.dashboard.words import PART_TITLES, SIGNS, SOURCE_TITLES, plain
from planner.errors import PlannerError
from planner.estimate import estimate
from planner.report import MemoryReport
from planner.spec import Setup
from planner.units import count, gib

__all__ = ["section", "table_csv", "table_html"]

_SHOWN = "_every_method"
_ASKED = "_every_method_asked"  # the setup whose methods this session has simulated
_POLL_SECONDS = 0.5
_NOT_KNOWN = "\N{EN DASH}"


def section(shown: Answer) -> None:
    """The switch, and behind it the table; nothing is computed before it is asked for."""
    st.subheader("Every method", anchor=False)
    setup = shown.setup
    if setup.model.is_bare:
        st.caption("Methods differ by the model's layers; choose a model to see them side by side.")
        return
    if not st.toggle("Show every method for this model, sorted by peak", key=_SHOWN):
        return
    polls = _asked(setup)
    st.fragment(_section, run_every=_POLL_SECONDS if polls else None)(setup, polls)


def _section(setup: Setup, polls: bool) -> None:
    """Runs again by itself while methods are simulated; the whole page does where that begins or ends."""
    if _asked(setup) and not _next(setup):
        st.session_state.pop(_ASKED, None)
    if _asked(setup) is not polls:
        st.rerun()
    table = method_table(setup, _report)
    st.markdown(plain(table.sentence))
    st.html(table_html(table, setup))
    for row in table.left_out:
        st.caption(f"Without {row.title}: {plain(row.reason)}")
    with st.container(horizontal=True, vertical_alignment="center"):
        _control(setup, table)
        st.download_button(
            "CSV",
            partial(table_csv, table),
            file_name="vram-methods.csv",
            mime="text/csv",
            icon=":material/download:",
            on_click="ignore",
            key="_every_method_csv",
            help="Every method with all parts at its peak, in bytes.",
        )


def table_html(table: MethodTable, setup: Setup) -> str:
    """HTML: a row for each method, from the smallest peak up."""
    against = table.reference.title if table.reference else ""
    head = ["Method", "Trainable", "Peak allocated", "Source", f"Most against {against}"]
    head += ["On the card"] if setup.gpu else []
    lines = []
    for row in table.rows:
        trained = _NOT_KNOWN if row.trainable is None else count(row.trainable)
        peak = _NOT_KNOWN if row.peak_bytes is None else gib(row.peak_bytes)
        source = SOURCE_TITLES[row.report.source] if row.report and row.peak_bytes is not None else "simulate"
        cells = [row.title, trained, peak, source, _difference(row, table.reference)]
        if setup.gpu:
            word = verdict(row.report, setup.gpu).word if row.report else "not known"
            cells.append(f"{SIGNS[word]} {word}" if row.peak_bytes is not None else _NOT_KNOWN)
        lines.append([escape(cell) for cell in cells])
    return html_table([escape(cell) for cell in head], lines, alt="Every method, sorted by peak")


def table_csv(table: MethodTable) -> str:
    """The same for a spreadsheet, in bytes, with every part at the peak."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["method", "trainable", "peak_allocated_bytes", "source", *(f"{name}_bytes" for name in PART_TITLES)]
    )
    for row in table.rows:
        if row.report is None:
            continue
        found = row.report
        parts = ["" if name in found.not_known else getattr(found.parts, name) for name in PART_TITLES]
        numbers = ["" if value is None else value for value in (row.trainable, row.peak_bytes)]
        writer.writerow([row.title, *numbers, found.source, *parts])
    return text.getvalue()


def _difference(row: MethodRow, reference: MethodRow | None) -> str:
    found = row.difference(reference) if reference else None
    if found is None:
        return ""
    part, more_bytes = found
    sign = "+" if more_bytes > 0 else "\N{MINUS SIGN}"
    return f"{PART_TITLES[part]} {sign}{gib(abs(more_bytes))}"


def _report(setup: Setup) -> MemoryReport:
    """The simulation where it is there, else the formula's answer. Raises PlannerError where it failed."""
    stands = simulating.simulations().of(setup)
    if stands is not None and stands.state == "failed":
        raise PlannerError(stands.reason)
    return stands.report if stands is not None and stands.report is not None else estimate(setup)


def _stands(setup: Setup) -> list[tuple[str, Setup, Simulated | None]]:
    """Each method that this model can have, and its simulation as it stands."""
    queue = simulating.simulations()
    return [(n.title, n.setup, queue.of(n.setup)) for n in default_methods(setup) if n.setup is not None]


def _control(setup: Setup, table: MethodTable) -> None:
    """The button; while it runs, what runs and Stop."""
    if reason := simulating.why_not(setup):
        st.caption(f":material/info: {reason}", width="content")
        return
    stands = _stands(setup)
    ended = [one for _, _, one in stands if one is not None and not one.active]
    if _asked(setup):
        title = next((title for title, _, one in stands if one is not None and one.active), "")
        words = plain(f"{len(ended)} of {len(stands)} simulated. {title}")
        st.progress(len(ended) / len(stands), text=words, width=320)
        st.button("Stop", key="_every_method_stop", icon=":material/close:", on_click=_stop, args=(setup,))
    elif len(ended) < len(stands):
        st.button(
            f"Simulate all {len(stands)}",
            key="_every_method_simulate",
            icon=":material/play_arrow:",
            on_click=_ask,
            args=(setup,),
            help="Runs the real training step of every method without a GPU, one after the other: a second "
            "or two for each, and other visitors' simulations in between.",
        )


def _asked(setup: Setup) -> bool:
    """Whether this session simulates the methods of exactly this setup."""
    return bool(st.session_state.get(_ASKED) == setup)


def _ask(setup: Setup) -> None:
    st.session_state[_ASKED] = setup
    _next(setup)


def _next(setup: Setup) -> bool:
    """Ask for one more where none is under way; whether any is still to come."""
    stands = _stands(setup)
    if any(one is not None and one.active for _, _, one in stands):
        return True
    waiting = [one for _, one, found in stands if found is None]
    if waiting:
        simulating.ask_beside(waiting[0])
    return bool(waiting)


def _stop(setup: Setup) -> None:
    st.session_state.pop(_ASKED, None)
    for _, one, found in _stands(setup):
        if found is not None and found.active:
            simulating.cancel_beside(one)
