"""The Measure page: run one real training step here, or see what was measured elsewhere."""

from __future__ import annotations

import streamlit as st

from planner.dashboard import here, measuring, recorded, simulating, state
from planner.dashboard.answers import current_setup
from planner.dashboard.links import command
from planner.dashboard.measurements import blocked
from planner.dashboard.uploads import MOST_LINES
from planner.dashboard.words import method_title, plain
from planner.errors import PlannerError
from planner.estimate import estimate
from planner.measure.nvml import DriverGpu
from planner.report import MemoryReport
from planner.spec import Setup
from planner.units import gib

_REFUSED, _SEEN = "_measure_refused", "_upload_seen"
_POLL_SECONDS = 0.5


def page() -> None:
    """Draw the page for the setup of the sidebar."""
    setup, problem = current_setup()
    st.title("What does it really take?", anchor=False)
    if problem:
        st.error(f"{plain(problem)} Below is the last setup that made sense.", icon=":material/block:")
    predicted = estimate(setup)
    left, right = st.columns(2, gap="large")
    with left:
        _here(setup, predicted)
    with right:
        _simulation(setup, predicted)
    _recorded(setup, predicted)
    left, right = st.columns(2, gap="large")
    with left:
        _elsewhere()
    with right:
        _upload(setup, predicted)


def _here(setup: Setup, predicted: MemoryReport) -> None:
    """What will run, the button, and what comes of it."""
    st.subheader("Measure on this server", anchor=False)
    last = here.measurements().last
    if last is not None and last.active:
        if last.visitor == here.visitor().name:
            st.fragment(_running, run_every=_POLL_SECONDS)()
            st.button("Cancel", key="_cancel_measurement", icon=":material/close:", on_click=_cancel)
        else:
            st.info("Another measurement is running on this machine.", icon=":material/hourglass_empty:")
        return
    allowed = here.allowed()
    gpus = here.gpus() if allowed else ()
    reason = simulating.why_not(setup) or blocked(allowed=allowed, gpus=gpus, predicted=predicted)
    if reason:
        st.info(plain(reason), icon=":material/block:")
    else:
        _offer(setup, predicted, gpus[0])
    if last is not None and last.visitor == here.visitor().name and last.setup == setup:
        measuring.ended(last, predicted)


def _offer(setup: Setup, predicted: MemoryReport, gpu: DriverGpu) -> None:
    training = setup.training
    st.markdown(
        f"Two optimizer steps of **{plain(setup.model.id)}**, {method_title(setup.method.name)}, "
        f"{training.precision}, {training.micro_batch_size} x {training.seq_len:,} tokens, on "
        f"**{plain(gpu.name)}** ({gib(gpu.total_bytes)}, {gib(gpu.used_bytes)} in use). Random weights, "
        f"nothing is downloaded; the predicted peak is {gib(predicted.peak_allocated_bytes)}. Running out of "
        "memory is a result, too."
    )
    refused = st.session_state.pop(_REFUSED, None)
    if refused:
        st.warning(plain(refused), icon=":material/hourglass_empty:")
    st.button("Measure", key="_measure", icon=":material/speed:", on_click=_start, args=(setup,))


def _start(setup: Setup) -> None:
    if not here.allowed():
        return
    try:
        here.measurements().start(setup, here.visitor().name)
    except PlannerError as error:
        st.session_state[_REFUSED] = str(error)


def _cancel() -> None:
    here.measurements().cancel(here.visitor().name)


def _running() -> None:
    """The stages as they come, again every half second; the whole page once at the end."""
    last = here.measurements().last
    if last is None or not last.active:
        here.gpus.clear()
        if last is not None and last.record is not None:
            recorded.remember_live(last.record)
        st.rerun()
    measuring.stages(last)


def _simulation(setup: Setup, predicted: MemoryReport) -> None:
    st.subheader("Simulate it without a GPU", anchor=False)
    st.markdown(
        "The same training step, operation by operation, on tensors without storage, through a model of "
        "CUDA's allocator: no GPU, a few seconds."
    )
    simulating.control(setup)
    one = next((one for one in simulating.simulated(setup) if one.setup == setup and one.report), None)
    if one is not None:
        st.markdown(plain(simulating.summary(one, predicted)))


def _recorded(setup: Setup, predicted: MemoryReport) -> None:
    """The recorded run of this setup, or the nearest one."""
    st.subheader("Predicted, simulated, measured", anchor=False)
    try:
        nearest = recorded.nearest_run(setup)
    except PlannerError as error:
        st.warning(plain(str(error)), icon=":material/report:")
        nearest = None
    simulated = next((r for r in simulating.simulated_reports(setup) if r.setup == setup.to_dict()), None)
    if nearest is None:
        st.caption("No run of this model with this method is recorded yet: not measured.")
        measuring.beside(predicted, simulated, None)
        return
    record = nearest.record
    measuring.about(record, live=record in recorded.measured_here())
    if nearest.exact:
        measuring.result(record, predicted, simulated or record.simulation.report)
        return
    st.caption(
        plain(
            f"This very setup is not measured. The nearest measured run differs: "
            f"{'; '.join(nearest.differences)}."
        )
    )
    measuring.result(record, record.estimate.report, record.simulation.report)


def _elsewhere() -> None:
    st.subheader("Measure on your own machine", anchor=False)
    st.markdown(
        "This command runs the step on your GPU, prints the result beside both predictions and appends it "
        "to the file that it names."
    )
    flat = state.asked()
    if state.config_text():
        flat["model"] = "./config.json"
    st.code(command(flat, verb="measure"), language="bash", wrap_lines=True)


def _upload(setup: Setup, predicted: MemoryReport) -> None:
    st.subheader("Bring its result here", anchor=False)
    file = st.file_uploader(
        f"Records as JSON lines, at most 1 MB and {MOST_LINES} runs",
        type=["jsonl", "json"],
        key="_records_upload",
        max_upload_size=1,
        help="They stay in this session: nobody else sees them, and nothing is kept.",
    )
    if file is not None and st.session_state.get(_SEEN, (None,))[0] != file.file_id:
        st.session_state[_SEEN] = (file.file_id, recorded.accept(file.getvalue()))
        st.rerun()  # what was measured of this setup stands higher up
    if file is None and st.session_state.pop(_SEEN, None) is not None:
        recorded.forget_uploads()
        st.rerun()
    if _SEEN in st.session_state:
        measuring.uploaded(st.session_state[_SEEN][1])


if __name__ == "__main__":  # streamlit runs a page's file as the main script
    page()
