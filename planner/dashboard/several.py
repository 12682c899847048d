"""The Plan page's section for several GPUs: memory by their number, ways to share, how many it takes."""

from __future__ import annotations

from html import escape

import plotly.graph_objects as go
import streamlit as st

from planner.advise.shardings import Need, Option, Shardings, shardings
from planner.dashboard import figures, state
from planner.dashboard.answers import Answer
from planner.dashboard.palette import CATEGORICAL, LINE
from planner.dashboard.tables import html_table
from planner.dashboard.words import SIGNS
from planner.units import GIB, gib

__all__ = ["by_number", "by_number_alt", "by_number_table", "needs_table", "options_table", "section"]

_COLOURS = dict(
    zip(("ddp", "zero1", "zero2", "fsdp-grad-op", "fsdp", "hsdp", "zero3"), CATEGORICAL[::-1], strict=False)
)


def section(shown: Answer) -> None:
    """Draw the section where the setup has several GPUs."""
    sharding = shown.setup.sharding
    if not sharding.is_distributed:
        return
    found = shardings(shown.setup)
    st.subheader("Several GPUs", anchor=False)
    _beside(shown)
    left, right = st.columns(2, gap="large")
    with left:
        st.caption("Peak of one GPU by the number of GPUs, GiB; the dashed line is what the card can give.")
        alt = by_number_alt(found, sharding.num_gpus)
        st.plotly_chart(by_number(found), key="_by_number", config=figures.CONFIG, alt=alt)
        with st.expander("The figure as a table", icon=":material/table:"):
            st.html(by_number_table(found))
    with right:
        here = [option for option in found.options if option.num_gpus == sharding.num_gpus]
        st.html(options_table(here, sharding.sharding))
        _cheapest(found.cheapest, sharding.sharding)
        if found.needs:
            st.html(needs_table(found.needs))


def _beside(shown: Answer) -> None:
    """What the report of one GPU leaves out: the host's memory and NCCL's."""
    report, sharding = shown.chosen, shown.setup.sharding
    nodes = "1 machine" if sharding.nodes == 1 else f"{sharding.nodes:,} machines"
    number = f"{sharding.num_gpus:,} in {nodes}"
    words = [f"All numbers are of one GPU of {number}: rank 0, whose shards are the largest."]
    if report.host_bytes:
        each = report.host_bytes * sharding.per_node
        words.append(f"On the host its shards take {gib(report.host_bytes)}, {gib(each)} a machine.")
    if report.nccl_bytes:
        usual, largest = report.nccl_bytes
        words.append(f"NCCL takes {gib(usual)} to {gib(largest)} outside torch; the verdict adds it.")
    st.caption(" ".join(words))


def _cheapest(option: Option | None, chosen: str) -> None:
    if option is None:
        st.markdown(":material/lightbulb: No sharding surely fits on this number of these GPUs.")
        return
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        st.markdown(
            f":material/lightbulb: Of those that fit, {option.sharding} sends least: "
            f"{gib(option.sent_bytes)} a step.",
            width="stretch",
        )
        if option.sharding != chosen:
            keys = {"sharding": option.sharding}
            st.button("Apply", key="_apply_sharding", on_click=state.apply, args=(keys,))


def by_number(found: Shardings) -> go.Figure:
    """Lines of the peak by number of GPUs, one for each kind, both axes logarithmic; the capacity dashed."""
    kinds = list(dict.fromkeys(option.sharding for option in found.options if option.sharding != "none"))
    figure = go.Figure()
    for kind in kinds:
        own = [option for option in found.options if option.sharding in (kind, "none")]
        figure.add_scatter(
            x=[option.num_gpus for option in own],
            y=[option.peak_allocated_bytes / GIB for option in own],
            mode="lines+markers",
            name=kind,
            line={"color": _COLOURS[kind], "width": 2},
            customdata=[[gib(option.peak_allocated_bytes), _word(option)] for option in own],
            hovertemplate=(
                "%{fullData.name}, %{x:,} GPUs<br><b>%{customdata[0]}</b>%{customdata[1]}<extra></extra>"
            ),
        )
    verdict = next((option.verdict for option in found.options if option.verdict), None)
    if verdict is not None:
        figure.add_hline(y=verdict.capacity_bytes / GIB, line={"color": LINE, "width": 2, "dash": "dash"})
    numbers = sorted({option.num_gpus for option in found.options})
    figure.update_layout(
        height=340,
        margin={"l": 0, "r": 8, "t": 8, "b": 0},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.0, "x": 0},
        xaxis={
            "type": "log", "title": "GPUs", "fixedrange": True,
            "tickvals": numbers, "ticktext": [f"{number:,}" for number in numbers],
        },
        yaxis={"type": "log", "title": "GiB", "fixedrange": True, "dtick": 1},
    )  # fmt: skip
    return figure


def by_number_alt(found: Shardings, number: int) -> str:
    """What the figure says, in a sentence."""
    here = [option for option in found.options if option.num_gpus == number]
    least = min(here, key=lambda option: option.peak_allocated_bytes)
    most = max(here, key=lambda option: option.peak_allocated_bytes)
    return (
        f"Peak memory of one GPU by their number. Among {number:,} GPUs from "
        f"{gib(least.peak_allocated_bytes)} ({least.sharding}) to {gib(most.peak_allocated_bytes)} "
        f"({most.sharding})."
    )


def by_number_table(found: Shardings) -> str:
    """HTML: a row for each number of GPUs, a column for each kind."""
    kinds = list(dict.fromkeys(option.sharding for option in found.options if option.sharding != "none"))
    numbers = sorted({option.num_gpus for option in found.options})
    peaks = {(option.num_gpus, option.sharding): option for option in found.options}
    lines = []
    for number in numbers:
        own = [peaks.get((number, kind if number > 1 else "none")) for kind in kinds]
        lines.append([f"{number:,}", *("" if one is None else _sized(one) for one in own)])
    return html_table(["GPUs", *kinds], lines, alt="Peak memory of one GPU by number of GPUs and sharding")


def options_table(here: list[Option], chosen: str) -> str:
    """HTML: each way to share among one number of GPUs, with what it sends and whether it fits."""
    lines = [
        [
            f"<b>{one.sharding}</b>" if one.sharding == chosen else one.sharding,
            _sized(one),
            gib(one.host_bytes) if one.host_bytes else "",
            gib(one.sent_bytes),
        ]
        for one in here
    ]
    head = ["Sharding", "Peak of one GPU", "Host", "Sent a step"]
    return html_table(head, lines, alt="Ways to share the run among this number of GPUs")


def needs_table(needs: tuple[Need, ...]) -> str:
    """HTML: how many of each GPU it takes, and how they share it."""
    lines = [
        [
            escape(need.gpu.driver_name),
            f"{need.option.num_gpus:,}",
            need.option.sharding if need.option.num_gpus > 1 else "",
            gib(need.option.peak_allocated_bytes),
        ]
        for need in needs
    ]
    head = ["GPU", "How many", "Sharding", "Peak of one"]
    return html_table(head, lines, alt="How many of each GPU it takes")


def _sized(option: Option) -> str:
    sign = f"{SIGNS[option.verdict.word]} " if option.verdict else ""
    return sign + gib(option.peak_allocated_bytes)


def _word(option: Option) -> str:
    return f"<br>{option.verdict.word}" if option.verdict else ""
