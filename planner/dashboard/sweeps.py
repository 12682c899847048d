"""The Sweeps page: thousands of setups in one table and one picture."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import pandas as pd
import streamlit as st

from planner.catalog.gpus import Gpu, gpu as gpu_named
from planner.dashboard.figures import CONFIG
from planner.dashboard.lines import public_line
from planner.dashboard.links import link
from planner.dashboard.sweep_figure import MOST_POINTS, sweep_alt, sweep_figure
from planner.dashboard.sweep_files import (
    LARGEST_BYTES,
    MOST_ROWS,
    flat_setup,
    sweep_table,
    varying,
    verdicts,
)
from planner.dashboard.tables import html_table
from planner.dashboard.words import SIGNS, field_label, plain
from planner.errors import PlannerError
from planner.units import GIB, MIB, gib

_EXAMPLE = """\
verb = "simulate"  # or estimate, measure

[defaults]
precision = "bf16"

[[group]]
model = ["Qwen/Qwen2.5-0.5B", "meta-llama/Llama-3.2-1B"]
method = ["full", "lora"]
micro_batch_size = [1, 4]
seq_len = [512, 1024, 2048]
"""
_VERDICT = "verdict_here"
_ROW, _SEEN = "_sweep_row", "_sweep_rows_seen"
_MOST_REASONS = 50
_SHOWN_FIRST = ("micro_batch_size", "seq_len", "lora_rank", "precision", "optimizer")
_HIDDEN = {"key", "place", "date", "schema", "verdict", "error"}


def page() -> None:
    """Draw the page: upload, filters, cards, picture, table, a row's link."""
    st.title("What did the sweep find?", anchor=False)
    file = st.file_uploader(
        f"Results of a sweep: Parquet or CSV, at most {LARGEST_BYTES // MIB} MB and {MOST_ROWS:,} rows",
        type=["parquet", "csv"],
        key="_sweep_upload",
        max_upload_size=LARGEST_BYTES // MIB,
        help="It stays in this session: nobody else sees it, and nothing is kept.",
    )
    if file is None:
        _empty()
        return
    table, reason = _read(file.file_id, file)
    if table is None:
        st.error(plain(reason), icon=":material/error:")
        _empty()
        return
    card = _card()
    table = table.assign(**{_VERDICT: _verdicts(file.file_id, card.name if card else "", table, card)})
    shown = _filtered(table)
    _cards(shown, card)
    if shown.empty:
        st.info("No row is left; change the filters.", icon=":material/filter_alt_off:")
        return
    answered = shown[shown["peak_allocated_bytes"].notna()]
    if not answered.empty:
        _picture(answered)
    _table(shown)
    _chosen(shown)
    _unanswered(shown)


def _empty() -> None:
    """What to do where nothing is there yet."""
    st.info(
        "**No sweep is open.** Write setups into a file, run them in a shell, and upload the results here.",
        icon=":material/dataset:",
    )
    st.markdown("A list stands for each of its values; every combination is one setup:")
    st.code(_EXAMPLE, language="toml")
    st.code("python -m planner sweep sweep.toml", language="bash", wrap_lines=True)
    st.caption(
        "Interrupted, the same command goes on. It writes results.parquet and results.csv into the folder "
        "sweep; with --ray it runs on a Ray cluster."
    )


@st.cache_data(max_entries=4, scope="session", show_spinner="Reading the file")
def _read(file_id: str, _file: Any) -> tuple[pd.DataFrame | None, str]:
    """The table of an uploaded file, or why it is none."""
    try:
        return sweep_table(_file.getvalue()), ""
    except PlannerError as error:
        return None, public_line(str(error))


def _card() -> Gpu | None:
    """The GPU of the sidebar."""
    try:
        return gpu_named(str(st.session_state.get("gpu", "")))
    except PlannerError:
        return None


@st.cache_data(max_entries=4, scope="session", show_spinner=False)
def _verdicts(file_id: str, name: str, _table: pd.DataFrame, _card: Gpu | None) -> list[str]:
    return verdicts(_table, _card) if _card is not None else ["no answer"] * len(_table)


def _filtered(table: pd.DataFrame) -> pd.DataFrame:
    """The rows that the visitor wants to see; only what differs is offered."""
    kept = table
    with st.container(horizontal=True, gap="small"):
        for name in [_VERDICT, *varying(table)]:
            values = sorted(table[name].dropna().unique().tolist())  # a column has one type
            if len(values) < 2:
                continue
            label = "Verdict" if name == _VERDICT else field_label(name)
            wanted = st.multiselect(label, values, placeholder="All", key=f"_sweep_{name}", width=200)
            if wanted:
                kept = kept[kept[name].isin(wanted)]
    return kept


def _cards(shown: pd.DataFrame, card: Gpu | None) -> None:
    counts = shown[_VERDICT].value_counts()
    name = card.driver_name.removeprefix("NVIDIA ") if card else "no GPU"
    with st.container(horizontal=True, gap="small"):
        st.metric("Setups", f"{len(shown):,}", border=True, height="stretch")
        for word, title in (("fits", "Fit"), ("tight", "Tight"), ("does not fit", "Do not fit")):
            st.metric(title, f"{int(counts.get(word, 0)):,}", border=True, height="stretch")
    known = shown["peak_allocated_bytes"].dropna()
    words = f"On {name}, the GPU of the sidebar."
    if not known.empty:
        words += f" Peaks from {gib(int(known.min()))} to {gib(int(known.max()))}."
    without = int(counts.get("no answer", 0)) + int(counts.get("not known", 0))
    if without:
        words += f" {without:,} without a verdict."
    st.caption(plain(words))


def _picture(answered: pd.DataFrame) -> None:
    """Peak over any column."""
    offered = [
        name
        for name in answered.columns
        if name not in _HIDDEN | {_VERDICT, "peak_allocated_bytes"} and answered[name].nunique() >= 2
    ]
    if not offered:
        return
    first = next((name for name in _SHOWN_FIRST if name in offered), offered[0])
    across = st.selectbox(
        "Peak allocated memory against",
        offered,
        index=offered.index(first),
        format_func=_column_title,
        key="_sweep_across",
        width=320,
    )
    title = _column_title(str(across))
    st.plotly_chart(
        sweep_figure(answered, str(across), title, _VERDICT),
        key="_sweep_figure",
        config=CONFIG,
        alt=sweep_alt(answered, title, _VERDICT),
    )
    if len(answered) > MOST_POINTS:
        st.caption(f"{MOST_POINTS:,} of {len(answered):,} setups are drawn, spread evenly over the file.")


def _table(shown: pd.DataFrame) -> None:
    """Every column that tells rows apart, sizes in GiB, sortable by a click on its head."""
    st.subheader("All setups", anchor=False)
    columns = {"Row": shown.index + 1, "Verdict": [f"{SIGNS.get(w, '–')} {w}" for w in shown[_VERDICT]]}
    peaks = [name for name in shown.columns if name.endswith("_bytes")]
    others = [n for n in shown.columns if n not in _HIDDEN | {_VERDICT, *peaks} and shown[n].nunique() >= 2]
    for name in [*[n for n in ("model", "method") if n not in others], *others]:
        if name in ("model", "method", *varying(shown, MOST_ROWS)):
            columns[_column_title(name)] = shown[name]
    for name in peaks:
        columns[_column_title(name)] = (shown[name] / GIB).round(3)
    st.dataframe(pd.DataFrame(columns), hide_index=True, height=380, key="_sweep_table")
    st.download_button(
        "These rows as CSV",
        lambda: shown.drop(columns=_VERDICT).to_csv(index=False),
        file_name="vram-planner-sweep.csv",
        mime="text/csv",
        icon=":material/download:",
        on_click="ignore",
        key="_sweep_csv",
    )


def _chosen(shown: pd.DataFrame) -> None:
    """A row's setup on the Plan page, by the row's number."""
    st.subheader("Plan one of them", anchor=False)
    seen = (len(shown), int(shown.index[0]))
    if st.session_state.get(_SEEN) != seen and st.session_state.get(_ROW, 0) - 1 not in shown.index:
        st.session_state[_ROW] = int(shown.index[0]) + 1  # filtered away: the first of those that are left
    st.session_state[_SEEN] = seen
    number = st.number_input(
        "Row of the table",
        min_value=1,
        value=int(shown.index[0]) + 1,
        step=1,
        key=_ROW,
        width=200,
    )
    if int(number) - 1 not in shown.index:
        st.caption("No such row among these; take a number from the table's first column.")
        return
    row = shown.loc[int(number) - 1].to_dict()
    flat = flat_setup(row)
    words = f"{row['model']}, {row['method']}"
    if not pd.isna(row["peak_allocated_bytes"]):
        words += f", {gib(int(row['peak_allocated_bytes']))}"
    st.caption(plain(words))
    if flat is None:
        st.caption("Its model is not in the catalogue: a link cannot carry a config.json of one's own.")
        return
    flat.setdefault("gpu", st.session_state.get("gpu"))
    st.link_button("Open on the page Plan", link(_plan_address(), flat), icon=":material/memory:")


def _plan_address() -> str:
    """The address of the Plan page beside this one, behind a proxy too."""
    here = str(st.context.url or "").partition("?")[0].rstrip("/")
    return here.removesuffix("/sweeps") + "/"


def _unanswered(shown: pd.DataFrame) -> None:
    """Why some rows have no answer."""
    if "error" not in shown.columns:
        return
    lost = shown[shown["error"].notna()]
    if lost.empty:
        return
    more = f", the first {_MOST_REASONS}" if len(lost) > _MOST_REASONS else ""
    with st.expander(f"{len(lost):,} without an answer{more}", icon=":material/report:"):
        lines: Sequence[list[str]] = [
            [f"{index + 1}: {escape(str(row['model']))}", _wrapped(str(row["error"]))]
            for index, row in lost.head(_MOST_REASONS).iterrows()
        ]
        st.html(html_table(["Row", "Reason"], lines, alt="Setups without an answer"))


def _wrapped(reason: str) -> str:
    return f'<span style="white-space:normal">{escape(public_line(reason))}</span>'


def _column_title(name: str) -> str:
    """`peak_allocated_bytes` is "Peak allocated, GiB"."""
    if name.endswith("_bytes"):
        return field_label(name.removesuffix("_bytes")) + ", GiB"
    return field_label(name)


if __name__ == "__main__":  # streamlit runs a page's file as the main script
    page()
