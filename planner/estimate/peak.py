"""The peak of allocated memory over the phases of a training step, and the parts alive at it."""

from __future__ import annotations

from planner.estimate.resident import Resident, resident
from planner.report import MemoryReport, Parts, Phase
from planner.spec import Setup
from planner.version import __version__

__all__ = ["estimate"]

_ACTIVATION_PARTS = ("activations", "logits_and_loss", "temporaries")


def estimate(setup: Setup) -> MemoryReport:
    """The memory of one training step by formulas: parts, phases and peak, in bytes.

    Parts that a model does not tell (a bare parameter count, or an architecture without formulas)
    count as 0 and are named in `not_known`.
    """
    kept = resident(setup)
    parts = Parts(
        base_weights=kept.base_weights_bytes,
        adapter_weights=kept.adapter_weights_bytes,
        gradients=kept.gradients_bytes,
        optimizer_states=kept.optimizer_states_bytes,
    )
    return MemoryReport(
        source="estimate",
        setup=setup.to_dict(),
        parameters=kept.parameters,
        parts=parts,
        phases=_phases_without_activations(kept),
        peak_phase="optimizer_step",
        not_known=(*_ACTIVATION_PARTS, "workspace") if setup.model.is_bare else _ACTIVATION_PARTS,
        notes=_notes(setup),
        provenance={"planner": __version__, "model": setup.model.source},
    )


def _phases_without_activations(kept: Resident) -> tuple[Phase, ...]:
    base = kept.base_weights_bytes
    attached = base + kept.adapter_weights_bytes
    backward = attached + kept.gradients_bytes
    stepped = attached + kept.optimizer_states_bytes
    peak = backward + kept.optimizer_states_bytes
    return (
        Phase(name="load", allocated_bytes=base, peak_allocated_bytes=base),
        Phase(name="attach", allocated_bytes=attached, peak_allocated_bytes=attached),
        Phase(name="forward", allocated_bytes=attached, peak_allocated_bytes=attached, step=1),
        Phase(name="backward", allocated_bytes=backward, peak_allocated_bytes=backward, step=1),
        Phase(name="optimizer_step", allocated_bytes=stepped, peak_allocated_bytes=peak, step=1),
        Phase(name="forward", allocated_bytes=stepped, peak_allocated_bytes=stepped, step=2),
        Phase(name="backward", allocated_bytes=peak, peak_allocated_bytes=peak, step=2),
        Phase(name="optimizer_step", allocated_bytes=stepped, peak_allocated_bytes=peak, step=2),
    )


def _notes(setup: Setup) -> tuple[str, ...]:
    if setup.model.is_bare:
        return ("Only the number of parameters is known: activations, loss and temporaries are not counted.",)
    return (
        f"Activations of {setup.model.id} are not known by formula; run simulate for the whole peak.",
    )
