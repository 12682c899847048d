"""Setups side by side: pin what is planned, compare it with what is planned next."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Any

import streamlit as st

from planner.advise import Verdict, verdict
from planner.dashboard import figures, state, tables
from planner.dashboard.answers import Answer, setup_of
from planner.dashboard.fields import spelled
from planner.dashboard.links import DEFAULTS, PINS, pin_text, pin_values
from planner.dashboard.words import PART_TITLES, SIGNS, field_label, method_title, plain
from planner.errors import PlannerError
from planner.estimate import estimate
from planner.report import PARTS, MemoryReport
from planner.spec import Setup
from planner.units import count, gib, percent

__all__ = ["Column", "column", "compared_csv", "compared_table", "control", "section"]

_OTHER = "\N{EN DASH}"  # a setting that a column's method does not have


@dataclass(frozen=True, kw_only=True)
class Column:
    """One setup of the comparison: its title, its report and its verdict on its own GPU."""

    title: str
    setup: Setup
    report: MemoryReport
    verdict: Verdict | None

    @property
    def row(self) -> tuple[str, MemoryReport]:
        """Label and report, as the bars take them."""
        name = method_title(self.setup.method.name)
        return f"{self.title}: {name}, predicted", self.report


def control(shown: Answer) -> None:
    """The button that pins what the page shows."""
    pins, text = state.pins(), _text()
    why = "Keeps this setup beside what you plan next, in the link too."
    if state.config_text():
        why = "A config.json of your own is not part of the link, so it cannot be pinned."
    elif state.last_good() != _setup(text):
        why = "Only a setup that makes sense can be pinned."
    elif text in pins:
        why = "This setup is pinned already."
    elif len(pins) == len(PINS):
        why = f"At most {len(PINS)} setups can be pinned; take one away first."
    else:
        st.button("Pin", key="_pin", icon=":material/keep:", on_click=state.pin, args=(text,), help=why)
        return
    st.button("Pin", key="_pin", icon=":material/keep:", disabled=True, help=why)


def section(shown: Answer) -> None:
    """The pinned setups beside the current one; nothing where none is pinned."""
    state.show_pins_in_address()
    if not state.pins():
        return
    st.subheader("Side by side", anchor=False)
    found = [column("This setup", shown.setup)]
    for number, text in enumerate(state.pins(), start=1):
        title = f"Pin {number}"
        try:
            setup = setup_of(pin_values(text))
        except PlannerError as error:
            _heading(title, plain(str(error)), text, None)
            continue
        one = column(title, setup)
        found.append(one)
        _heading(title, _in_words(one), text, pin_values(text))
    same_card = len({one.setup.gpu for one in found}) == 1
    rows = [one.row for one in found]
    st.plotly_chart(
        figures.bars(rows, shown.verdict if same_card else None),
        key="_compared",
        config=figures.CONFIG,
        alt=figures.bars_alt(rows, shown.verdict if same_card else None),
    )
    st.html(figures.legend(rows, shown.verdict if same_card else None))
    st.html(compared_table(found))
    with st.container(horizontal=True):
        for name, made, kind in (
            ("CSV", partial(compared_csv, found), "text/csv"),
            ("JSON", partial(tables.reports_json, rows), "application/json"),
        ):
            st.download_button(
                name,
                made,
                file_name=f"vram-compare.{name.lower()}",
                mime=kind,
                icon=":material/download:",
                on_click="ignore",
                key=f"_compared_{name.lower()}",
                help="The setups side by side.",
            )


def column(title: str, setup: Setup) -> Column:
    """A setup with its estimate and verdict."""
    report = estimate(setup)
    return Column(
        title=title,
        setup=setup,
        report=report,
        verdict=None if setup.gpu is None else verdict(report, setup.gpu),
    )


def compared_table(columns: Sequence[Column]) -> str:
    """HTML: what the setups differ in, verdicts, trained parameters, then every part and the peak."""
    head = ["", *(one.title for one in columns)]
    lines = [[name, *map(escape, values)] for name, values in _settings(columns)]
    lines.append(["Verdict", *(_verdict(one) for one in columns)])
    lines.append(["Trainable parameters", *(_trained(one.report) for one in columns)])
    for part in PARTS:
        lines.append([PART_TITLES[part], *(_size(one.report, part) for one in columns)])
    lines.append(["Peak allocated", *(gib(one.report.peak_allocated_bytes) for one in columns)])
    return tables.html_table(head, lines, alt="Setups side by side", last_is_total=True)


def compared_csv(columns: Sequence[Column]) -> str:
    """The same table for a spreadsheet: settings as the link spells them, sizes in bytes."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["", *(one.title for one in columns)])
    flats = [one.setup.to_dict() for one in columns]
    for key in dict.fromkeys(key for flat in flats for key in flat if key != "model_config"):
        writer.writerow([key, *("" if flat.get(key) is None else spelled(flat[key]) for flat in flats)])
    writer.writerow(["verdict", *("" if one.verdict is None else one.verdict.word for one in columns)])
    writer.writerow(["trainable_parameters", *(one.report.parameters.trainable for one in columns)])
    for part in PARTS:
        cells = ("" if part in r.not_known else getattr(r.parts, part) for r in (c.report for c in columns))
        writer.writerow([f"{part}_bytes", *cells])
    writer.writerow(["peak_allocated_bytes", *(one.report.peak_allocated_bytes for one in columns)])
    return text.getvalue()


def _heading(title: str, words: str, text: str, flat: dict[str, Any] | None) -> None:
    """A pin's line: what it is, its buttons."""
    number = title.rpartition(" ")[2]
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        st.markdown(f"**{title}.** {words}", width="stretch")
        if flat is not None:
            st.button("Plan this", key=f"_plan_{number}", on_click=_plan, args=(flat,))
        st.button(
            "Unpin", key=f"_unpin_{number}", icon=":material/keep_off:", on_click=state.unpin, args=(text,)
        )


def _plan(flat: dict[str, Any]) -> None:
    state.forget_config()
    state.apply(flat)


def _text() -> str:
    return pin_text(state.asked())


def _setup(text: str) -> Setup | None:
    try:
        return setup_of(pin_values(text))
    except PlannerError:
        return None


def _in_words(one: Column) -> str:
    setup, training = one.setup, one.setup.training
    card = "" if one.verdict is None else f", {one.verdict.gpu}: {one.verdict.word}"
    return plain(
        f"{setup.model.id}, {method_title(setup.method.name)}, {training.micro_batch_size} x "
        f"{training.seq_len:,} tokens{card}, {gib(one.report.peak_allocated_bytes)}."
    )


def _settings(columns: Sequence[Column]) -> list[tuple[str, list[str]]]:
    """Model, method and GPU, then every setting that is not the same wherever there is one."""
    flats = [{k: v for k, v in one.setup.to_dict().items() if k != "model_config"} for one in columns]
    found = []
    for key in dict.fromkeys(key for flat in flats for key in flat):
        values = [_OTHER if key not in flat else _spelled(flat[key]) for flat in flats]
        if key in DEFAULTS or len({value for value in values if value != _OTHER}) > 1:
            found.append((field_label(key), values))
    return found


def _spelled(value: Any) -> str:
    return "default" if value is None else spelled(value)


def _verdict(one: Column) -> str:
    return _OTHER if one.verdict is None else f"{SIGNS[one.verdict.word]} {one.verdict.word}"


def _trained(report: MemoryReport) -> str:
    return f"{count(report.parameters.trainable)}, {percent(report.parameters.trainable_share)}"


def _size(report: MemoryReport, part: str) -> str:
    size_bytes = int(getattr(report.parts, part))
    return "not known" if part in report.not_known else gib(size_bytes) if size_bytes else "0"
