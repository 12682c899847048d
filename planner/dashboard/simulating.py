"""The simulation on the pages: its button, progress, Cancel and what came of it."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import streamlit as st

from planner.advise import Verdict
from planner.compare import full_of
from planner.dashboard.figures import CONFIG
from planner.dashboard.simulations import Simulated, Simulations
from planner.dashboard.tables import html_table
from planner.dashboard.timeline import phases_beside, timeline_alt, timeline_figure
from planner.dashboard.words import PHASE_TITLES, method_title, plain
from planner.errors import PlannerError
from planner.report import MemoryReport
from planner.spec import FullFineTuning, PeftOfSize, Setup
from planner.units import MIB, gib, percent

__all__ = [
    "ask_beside",
    "cancel_beside",
    "control",
    "place",
    "simulated",
    "simulated_reports",
    "simulations",
    "steps",
    "summary",
    "why_not",
]

_REFUSED = "_simulation_refused"
_POLL_SECONDS = 0.5
_NAMED = {"load": "loading", "attach": "attaching"}


@st.cache_resource(on_release=Simulations.close, show_spinner=False)
def simulations() -> Simulations:
    """The one queue of this server. `PLANNER_SIMULATE_LIMIT_S` sets the seconds for one simulation."""
    return Simulations(time_limit_s=float(os.environ.get("PLANNER_SIMULATE_LIMIT_S", "300")))


@dataclass(frozen=True)
class _Visitor:
    """One session that has asked for a simulation."""

    name: str
    of: Simulations

    def leave(self) -> None:
        """The session is over."""
        self.of.leave(self.name)


@st.cache_resource(scope="session", on_release=_Visitor.leave, show_spinner=False)
def _visitor() -> _Visitor:
    return _Visitor(uuid.uuid4().hex, simulations())


def why_not(setup: Setup) -> str | None:
    """Why no step of this setup can be simulated, in a line; None where one can."""
    if setup.model.is_bare or isinstance(setup.method, PeftOfSize):
        return "A number of parameters alone has no step to simulate; choose a model."
    if setup.training.precision == "textbook":
        return "The textbook recipe is a sum worked by hand, no library runs it; choose bf16 or bf16-mixed."
    return None


def simulated(setup: Setup) -> tuple[Simulated, ...]:
    """What was asked of this setup: its simulation first, then full fine-tuning's beside it."""
    if why_not(setup):
        return ()
    found = (simulations().of(one) for one in _both(setup))
    return tuple(one for one in found if one is not None)


def simulated_reports(setup: Setup) -> tuple[MemoryReport, ...]:
    """The reports that are there, for the rows of the bars."""
    return tuple(one.report for one in simulated(setup) if one.report is not None)


def control(setup: Setup) -> None:
    """The button, or what has become of it: waiting and running with Cancel, failed with the reason, done."""
    reason = why_not(setup)
    if reason:
        st.caption(f":material/info: {reason}", width="content")
        return
    stands = simulated(setup)
    refused = st.session_state.pop(_REFUSED, None)
    if refused:
        st.warning(plain(refused), icon=":material/hourglass_empty:")
    if any(one.active for one in stands):
        _running(setup)
        return
    failed = [one for one in stands if one.state == "failed"]
    if failed:
        _failure(setup, failed)
    elif stands and stands[0].state == "done":
        _done(stands[0])
    else:
        _button(setup, "Simulate this step")


def _button(setup: Setup, label: str) -> None:
    st.button(
        label,
        key="_simulate",
        icon=":material/play_arrow:",
        on_click=_ask,
        args=(setup,),
        help="Runs the real training step, operation by operation, on tensors without storage: no GPU, no "
        "download, a few seconds.",
    )


def _ask(setup: Setup) -> None:
    visitor = _visitor()
    visitor.of.forget_waiting(visitor.name)
    try:
        for one in _both(setup):
            visitor.of.ask(one, visitor.name)
    except PlannerError as error:
        st.session_state[_REFUSED] = str(error)


def ask_beside(setup: Setup) -> None:
    """Queue one simulation of this session beside what the page asks for; a full queue is no error."""
    visitor = _visitor()
    with contextlib.suppress(PlannerError):
        visitor.of.ask(setup, visitor.name)


def cancel_beside(setup: Setup) -> None:
    """This session wants one simulation no longer."""
    visitor = _visitor()
    visitor.of.cancel(setup, visitor.name)


def _cancel(setup: Setup) -> None:
    visitor = _visitor()
    for one in reversed(_both(setup)):
        visitor.of.cancel(one, visitor.name)
    st.toast("The simulation was cancelled.", icon=":material/cancel:")


def _running(setup: Setup) -> None:
    """Progress, which draws itself again, and Cancel, which stands still beside it."""
    with st.container(
        horizontal=True, vertical_alignment="center", gap="small", width="content", key="_simulating"
    ):
        st.fragment(_progress, run_every=_POLL_SECONDS)(setup)
        st.button(
            "Cancel", key="_cancel_simulation", on_click=_cancel, args=(setup,), icon=":material/close:"
        )


def _progress(setup: Setup) -> None:
    """Runs again by itself until everything has ended, then the whole page does, once."""
    stands = simulated(setup)
    active = [one for one in stands if one.active]
    if not active:
        st.rerun()
    wanted = _both(setup)
    done = len(wanted) - len(active)
    share = (done + active[0].share) / len(wanted)
    st.progress(min(share, 1.0), text=plain(_stage(active[0])), width=260)


def _stage(one: Simulated) -> str:
    """What happens now: `"LoRA: backward, step 2"`."""
    if one.state == "waiting":
        others = "one other" if one.ahead == 1 else f"{one.ahead} others"
        return f"Waits for {others}" if one.ahead else "Starts"
    title = method_title(one.setup.method.name)
    if not one.phase:
        return "Starting torch"
    words = _NAMED.get(one.phase, one.phase.replace("_", " "))
    step = "" if one.step is None else f", step {one.step}"
    return f"{title[0].upper()}{title[1:]}: {words}{step}"


def _failure(setup: Setup, failed: Sequence[Simulated]) -> None:
    first = failed[0]
    of = "" if first.setup == setup else " of full fine-tuning"
    st.warning(f"The simulation{of} failed: {plain(first.reason)}", icon=":material/error:")
    _button(setup, "Try again")


def _done(one: Simulated) -> None:
    assert one.report is not None
    versions = one.report.provenance
    st.badge("Simulated", icon=":material/check:", color="blue")
    st.caption(
        plain(f"torch {versions.get('torch')}, transformers {versions.get('transformers')}"), width="content"
    )


def summary(one: Simulated, predicted: MemoryReport) -> str:
    """The simulation in a sentence: peak, how far the prediction is off, where the peak is."""
    report = one.report
    assert report is not None
    peak = f"Simulated peak {gib(report.peak_allocated_bytes)}"
    if report.peak_reserved_bytes is not None:
        peak += f" allocated, {gib(report.peak_reserved_bytes)} reserved"
    if not predicted.not_known:
        off = predicted.peak_allocated_bytes / report.peak_allocated_bytes - 1
        peak += f"; the formula is {percent(abs(off))} {'above' if off >= 0 else 'below'} it"
    if report.loading_band:
        lowest, highest = (size / MIB for size in report.loading_band.peak_allocated_bytes)
        peak += f"; {lowest:,.0f} to {highest:,.0f} MiB by the order in which the weights arrive"
    return f"{peak}. {place(report)}"


def place(report: MemoryReport) -> str:
    """Where the peak is: `"The peak is in the backward pass, at aten.mm in model.layers.3.mlp."`"""
    phase = PHASE_TITLES.get(report.peak_phase, report.peak_phase.replace("_", " "))
    site = report.peak_site
    if site is None or not site.op:
        return f"The peak is in {phase}."
    module = f" in {site.module}" if site.module else ""
    return f"The peak is in {phase}, at {site.op}{module}."


def _both(setup: Setup) -> tuple[Setup, ...]:
    """The setup, and full fine-tuning beside it."""
    return (setup,) if isinstance(setup.method, FullFineTuning) else (setup, full_of(setup))


def steps(setup: Setup, predicted: MemoryReport, verdict: Verdict | None) -> bool:
    """Draw memory over the step as simulated; False, and nothing drawn, where no simulation is there."""
    one = next((one for one in simulated(setup) if one.report is not None and one.setup == setup), None)
    if one is None or not one.begins:
        return False
    st.caption(plain(summary(one, predicted)))
    st.plotly_chart(
        timeline_figure(one, predicted, verdict),
        key="_timeline",
        config=CONFIG,
        alt=timeline_alt(one),
    )
    with st.expander("The phases as a table", icon=":material/table:"):
        lines = [
            [name, "not known" if expected is None else gib(expected), gib(seen)]
            for name, expected, seen in phases_beside(one, predicted)
        ]
        st.html(html_table(["Phase", "Predicted", "Simulated"], lines, alt="Highest point of each phase"))
    return True
