"""From what a rank holds and its worst moments to the report that all verbs share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from planner.estimate.alive import Alive
from planner.estimate.parameters import parameters
from planner.estimate.peft_form import peft_form
from planner.report import MemoryReport, Parts, Phase
from planner.spec import PeftConfig, Setup
from planner.version import __version__

__all__ = ["UNKNOWN", "Held", "bare_report", "not_known", "one_gpu", "rank_report", "with_load", "worst"]

UNKNOWN = ("activations", "logits_and_loss", "temporaries")

PHASES = ("forward", "backward", "optimizer_step")


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """Bytes that one rank holds on its card from step to step, gradients between backward pass and step.

    `host_bytes`: what it holds in the host's memory instead.
    """

    base_weights_bytes: int = 0
    adapter_weights_bytes: int = 0
    gradients_bytes: int = 0
    optimizer_states_bytes: int = 0
    host_bytes: int = 0


def worst(moments: Iterable[Alive]) -> dict[str, Alive]:
    """The moment of most memory of each phase."""
    found: dict[str, Alive] = {phase: Alive(phase=phase) for phase in PHASES}
    for moment in moments:
        if moment.total_bytes > found[moment.phase].total_bytes:
            found[moment.phase] = moment
    return found


def rank_report(
    setup: Setup,
    held: Held,
    moments: Mapping[str, Alive],
    ends: Mapping[str, int],
    *,
    not_known: tuple[str, ...],
    notes: tuple[str, ...],
    load_peak_bytes: int = 0,
) -> MemoryReport:
    """The report of a rank whose worst moments and ends of phases are given without weights and states.

    `load_peak_bytes`: the most while the model is brought to the card, where that is more than what stays.
    """
    peak = max(moments.values(), key=lambda moment: moment.total_bytes)
    base = held.base_weights_bytes
    attached = base + held.adapter_weights_bytes
    states = held.optimizer_states_bytes
    phases = [
        Phase(name="load", allocated_bytes=base, peak_allocated_bytes=max(base, load_peak_bytes)),
        Phase(name="attach", allocated_bytes=attached, peak_allocated_bytes=attached),
    ]
    for step in (1, 2):
        for name in PHASES:
            there = attached + (states if step == 2 or name == "optimizer_step" else 0)
            end = there + ends[name]
            phases.append(
                Phase(
                    name=name,
                    allocated_bytes=end,
                    peak_allocated_bytes=max(there + moments[name].total_bytes, end),
                    step=step,
                )
            )
    return MemoryReport(
        source="estimate",
        setup=setup.to_dict(),
        parameters=parameters(setup),
        parts=Parts(
            base_weights=base,
            adapter_weights=held.adapter_weights_bytes,
            gradients=peak.gradients,
            optimizer_states=states,
            activations=peak.activations,
            logits_and_loss=peak.logits_and_loss,
            temporaries=peak.temporaries,
            workspace=peak.workspace,
        ),
        phases=tuple(phases),
        peak_phase=peak.phase,
        not_known=not_known,
        notes=notes,
        provenance={"planner": __version__, "model": setup.model.source, "rank": 0},
        host_bytes=held.host_bytes or None,
    )


def bare_report(
    setup: Setup, held: Held, workspace: int, *, not_known: tuple[str, ...], notes: tuple[str, ...]
) -> MemoryReport:
    """The report where only what stays is known."""
    gradients = held.gradients_bytes
    moments = {
        "forward": Alive(phase="forward", workspace=workspace),
        "backward": Alive(phase="backward", gradients=gradients, workspace=workspace),
        "optimizer_step": Alive(phase="optimizer_step", gradients=gradients, workspace=workspace),
    }
    ends = {"forward": workspace, "backward": gradients + workspace, "optimizer_step": workspace}
    return rank_report(setup, held, moments, ends, not_known=not_known, notes=notes)


def with_load(report: MemoryReport) -> MemoryReport:
    """The report with the load's peak for its own where that is above the steps'."""
    load_bytes = max(phase.peak_allocated_bytes for phase in report.phases if phase.name == "load")
    if load_bytes <= report.peak_allocated_bytes:
        return report
    return replace(report, parts=Parts(base_weights=load_bytes), peak_phase="load")


def one_gpu(setup: Setup) -> Setup:
    """The same run on one GPU."""
    return Setup(model=setup.model, method=setup.method, training=setup.training, gpu=setup.gpu)


def not_known(setup: Setup) -> tuple[str, ...]:
    """The parts without a formula."""
    if isinstance(setup.method, PeftConfig) and peft_form(setup.model, setup.method) is None:
        return ("adapter_weights", "gradients", "optimizer_states", *UNKNOWN)
    return UNKNOWN
