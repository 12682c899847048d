"""The Accuracy page: how far off are we?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from html import escape

import streamlit as st

from planner.dashboard import figures, recorded
from planner.dashboard.lines import public_line
from planner.dashboard.runs import (
    PREDICTIONS,
    SELECTORS,
    Run,
    published_run,
    recorded_run,
    reserved_spread,
    runs_csv,
    runs_json,
    signed_percent,
    spread,
    worst,
)
from planner.dashboard.scatter import BAND, against_figure, errors_figure, figure_alt
from planner.dashboard.tables import html_table
from planner.dashboard.words import plain
from planner.errors import PlannerError
from planner.measure.published import published_runs
from planner.units import gib

_WHOSE = {"ours": "Our own", "published": "Published by others", "uploaded": "Uploaded by you"}
_MOST_SKIPPED = 3


def page() -> None:
    """Draw the page: whose runs, how far off, the worst, all of them."""
    st.title("How far off are we?", anchor=False)
    everything = _everything()
    if not everything["ours"]:
        st.info(
            "**No measurement of our own yet.** No record of the probe on a GPU is packaged; the page "
            "Measure shows how to make one. Until then, these are runs that others measured and published, "
            "beside what this version predicts.",
            icon=":material/science:",
        )
    whose = _chosen_source(everything)
    runs = _filtered(everything[whose], whose)
    _words(whose, runs)
    if not any(run.error(name) is not None for run in runs for name in PREDICTIONS):
        st.info("None of these runs can be compared; change the filters.", icon=":material/filter_alt_off:")
        return
    _cards(runs)
    left, right = st.columns(2, gap="large")
    with left:
        st.subheader("Predicted against measured", anchor=False)
        st.plotly_chart(against_figure(runs), key="_against", config=figures.CONFIG, alt=figure_alt(runs))
    with right:
        st.subheader("Error by size", anchor=False)
        st.plotly_chart(errors_figure(runs), key="_errors", config=figures.CONFIG, alt=figure_alt(runs))
    st.caption(f"The band is {BAND * 100:.0f} % to both sides: the most that the formula may err.")
    _groups(runs)
    _worst(runs)
    _all(runs, whose)


def _everything() -> dict[str, list[Run]]:
    """The runs by who measured them; the figures of one are never mixed with another's."""
    found: dict[str, list[Run]] = {"ours": [], "published": [], "uploaded": []}
    try:
        shelf = recorded.recorded()
    except PlannerError as error:
        st.warning(plain(public_line(str(error))), icon=":material/report:")
    else:
        for record in shelf.records:
            found["uploaded" if record.origin == "uploaded" else "ours"].append(recorded_run(record))
        if shelf.unreadable:
            lines = "; ".join(public_line(str(line)) for line in shelf.unreadable[:_MOST_SKIPPED])
            st.warning(
                f"Skipped, as they are no records: {plain(lines)}{_more(len(shelf.unreadable))}.",
                icon=":material/report:",
            )
    found["published"] = [published_run(run) for run in published_runs()]
    found["uploaded"] += [recorded_run(record) for record in recorded.uploads()]
    return found


def _more(count: int) -> str:
    return f", and {count - _MOST_SKIPPED} more" if count > _MOST_SKIPPED else ""


def _chosen_source(everything: dict[str, list[Run]]) -> str:
    there = [whose for whose, runs in everything.items() if runs]
    if len(there) == 1:
        return there[0]
    chosen = st.segmented_control(
        "Whose runs",
        there,
        default=there[0],
        required=True,
        format_func=lambda whose: f"{_WHOSE[whose]} ({len(everything[whose])})",
        key="_whose",
    )
    return str(chosen or there[0])


def _filtered(runs: list[Run], whose: str) -> list[Run]:
    """The runs that the visitor wants to see; a filter with one value is not offered."""
    kept = runs
    with st.container(horizontal=True, gap="small"):
        for name, of in SELECTORS.items():
            values = sorted({of(run) for run in runs})
            if len(values) < 2:
                continue
            wanted = st.multiselect(
                name, values, placeholder="All", key=f"_filter_{whose}_{name.lower()}", width=210
            )
            if wanted:
                kept = [run for run in kept if of(run) in wanted]
    return kept


def _words(whose: str, runs: Sequence[Run]) -> None:
    devices = ", ".join(sorted({run.device for run in runs}))
    full = sum(run.full_device for run in runs)
    line = f"{len(runs)} {'run' if len(runs) == 1 else 'runs'} on {devices}." if runs else "No run."
    if full:
        line += (
            f" {full} of them ended out of memory and {'has' if full == 1 else 'have'} no peak to compare."
        )
    label, icon, colour = recorded.BADGES[{"ours": "packaged"}.get(whose, whose)]
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        st.badge(label, icon=icon, color=colour)  # type: ignore[arg-type]
        st.caption(plain(line), width="stretch")
    if whose == "published":
        run = published_runs()[0]
        st.markdown(
            f"Source: [{plain(run.source)}]({run.url}). Figures only; they are not our own measurements. "
            "Formulas and simulations are this project's."
        )


def _cards(runs: Sequence[Run]) -> None:
    """Four cards for this version's formula; where others were made, all of them as a table."""
    found = spread(runs, "estimate_now")
    st.markdown(f"**{PREDICTIONS['estimate_now']}**")
    with st.container(horizontal=True, gap="small"):
        st.metric("Runs", f"{found.runs:,}", border=True, height="stretch")
        st.metric("Median error", _median(found.median), border=True, height="stretch")
        st.metric("Worst above", _edge(found.over), border=True, height="stretch")
        st.metric("Worst below", _edge(found.under), border=True, height="stretch")
    made = [(title, spread(runs, name)) for name, title in PREDICTIONS.items()]
    made.append(("Simulation, peak of reserved memory", reserved_spread(runs)))
    lines = [
        [title, f"{one.runs:,}", _median(one.median), _edge(one.over), _edge(one.under)]
        for title, one in made
        if one.runs
    ]
    if len(lines) > 1:
        head = ["Prediction", "Runs", "Median error", "Worst above", "Worst below"]
        st.html(html_table(head, lines, alt="Errors of each prediction"))


def _groups(runs: Sequence[Run]) -> None:
    """Runs, median and worst by method, family, recipe and device, where there is more than one."""
    lines = []
    for title, of in SELECTORS.items():
        values = sorted({of(run) for run in runs})
        if len(values) < 2:
            continue
        for value in values:
            inside = [run for run in runs if of(run) == value]
            found = spread(inside, "estimate_now")
            edges = ["\N{EN DASH}"] * 3
            if found.runs:
                edges = [_median(found.median), _edge(found.over), _edge(found.under)]
            simulated = _median(spread(inside, "simulation").median)
            lines.append([f"{title}: {escape(value)}", f"{found.runs:,}", *edges, simulated])
    if lines:
        st.subheader("By group", anchor=False)
        head = ["Runs of", "Runs", "Median, formula", "Worst above", "Worst below", "Median, simulation"]
        _table(head, lines, runs, alt="Errors by group")


def _worst(runs: Sequence[Run]) -> None:
    st.subheader("The worst five", anchor=False)
    lines = [
        [
            _title(run),
            gib(run.measured_bytes),
            _size(run, "estimate_now"),
            _error(run.error("estimate_now")),
            _error(run.error("simulation")),
        ]
        for run in worst(runs)
    ]
    head = ["Run", "Measured", "Formula", "Its error", "Simulation's error"]
    _table(head, lines, runs, alt="The five runs with the largest errors")


def _table(head: list[str], lines: list[list[str]], runs: Sequence[Run], *, alt: str) -> None:
    """An HTML table; its last column, the simulation's, is left out where no run has one."""
    last = None if spread(runs, "simulation").runs else -1
    st.html(html_table(head[:last], [line[:last] for line in lines], alt=alt))


def _all(runs: Sequence[Run], whose: str) -> None:
    known = [name for name in PREDICTIONS if spread(runs, name).runs]
    with st.expander(f"All {len(runs)} runs as a table", icon=":material/table:"):
        lines = [
            [
                _title(run),
                f"{escape(run.device)}<br><small>{escape(run.versions)}</small>",
                "out of memory" if run.full_device else gib(run.measured_bytes),
                *(_size(run, name) for name in known),
                *(_error(run.error(name)) for name in known),
            ]
            for run in runs
        ]
        errors = [f"Error: {PREDICTIONS[name].lower()}" for name in known]
        head = ["Run", "Device", "Measured", *(PREDICTIONS[name] for name in known), *errors]
        st.html(html_table(head, lines, alt="All runs with their predictions"))
    with st.container(horizontal=True):
        st.download_button(
            "CSV",
            partial(runs_csv, runs),
            file_name=f"vram-planner-{whose}-runs.csv",
            mime="text/csv",
            icon=":material/download:",
            on_click="ignore",
            key="_runs_csv",
        )
        st.download_button(
            "JSON",
            partial(runs_json, runs),
            file_name=f"vram-planner-{whose}-runs.json",
            mime="application/json",
            icon=":material/download:",
            on_click="ignore",
            key="_runs_json",
        )


def _title(run: Run) -> str:
    """HTML: the run, and what is special in its settings."""
    setup = run.setup
    words = [str(setup.get("precision")), str(setup.get("attention")), str(setup.get("optimizer", "adamw"))]
    if setup.get("activation_checkpointing"):
        words.append("checkpointing" + _checkpoints(run))
    return f"{escape(run.title)}<br><small>{escape(', '.join(words))}</small>"


def _checkpoints(run: Run) -> str:
    """Which layers and where, unless it is every layer on the GPU."""
    every = run.setup.get("checkpoint_every", 1)
    some = f" of one layer in {every}" if every != 1 else ""
    return some + (" on the host" if run.setup.get("checkpoint_offload") else "")


def _size(run: Run, prediction: str) -> str:
    size = run.predicted_bytes.get(prediction)
    return "not known" if size is None else gib(size)


def _error(share: float | None) -> str:
    if share is None:
        return "\N{EN DASH}"
    return signed_percent(share) if share else "equal"


def _edge(share: float | None) -> str:
    """The worst error to one side; "none" where no run errs that way."""
    return "none" if share is None else signed_percent(share)


def _median(share: float | None) -> str:
    return "\N{EN DASH}" if share is None else signed_percent(share).lstrip("+")


if __name__ == "__main__":  # streamlit runs a page's file as the main script
    page()
