"""The peak of allocated memory over the phases of a training step, and the parts alive at it."""

from __future__ import annotations

from dataclasses import replace

from planner.checkpointing import offloaded_note
from planner.estimate.alive import Alive
from planner.estimate.experts import router_note
from planner.estimate.forms import model_form
from planner.estimate.optimizers import clipping_bytes, states_are_known
from planner.estimate.peft_form import peft_form
from planner.estimate.phases import phases
from planner.estimate.rank_report import one_gpu, with_load
from planner.estimate.recipes import recipe_of
from planner.estimate.resident import Resident, resident
from planner.estimate.sharded import sharded_report
from planner.estimate.stack import has_formulas, stack
from planner.estimate.stretches import Stack
from planner.estimate.workspace import Workspaces, workspaces
from planner.liger import fuses_experts
from planner.optimizers import paged_note
from planner.report import MemoryReport, Parts, early_peak_note
from planner.spec import PeftConfig, Setup
from planner.version import __version__

__all__ = ["estimate"]

_UNKNOWN = ("activations", "logits_and_loss", "temporaries")
_UNKNOWN_TO_PEFT_CONFIG = ("adapter_weights", "gradients", "optimizer_states", *_UNKNOWN)


def estimate(setup: Setup) -> MemoryReport:
    """The memory of one training step by formulas: parts, phases and peak, in bytes.

    Parts that a model does not tell (a bare parameter count, or an architecture without formulas)
    count as 0 and are named in `not_known`. Of several GPUs, rank 0 is meant. Left out: the CUDA context and
    the allocator's unused rest.
    """
    if setup.sharding.is_distributed:
        alone = None if setup.sharding.shard_ranks > 1 else _of_steps(one_gpu(setup))
        report = sharded_report(setup, alone)
    else:
        report = with_load(_of_steps(setup))
    note = early_peak_note(report)
    return _with_offloaded(setup, replace(report, notes=(*report.notes, note)) if note else report)


def _with_offloaded(setup: Setup, report: MemoryReport) -> MemoryReport:
    """With what waits in the host's memory, of each rank."""
    if not setup.training.checkpoint_offload or "activations" in report.not_known:
        return report
    size_bytes = stack(setup, accumulates=False).offloaded_bytes
    return replace(
        report,
        notes=(*report.notes, offloaded_note(size_bytes)),
        provenance={**report.provenance, "offloaded_bytes": size_bytes},
    )


def _of_steps(setup: Setup) -> MemoryReport:
    """One GPU's report with the parts of the steps' peak, whatever the load took."""
    kept = resident(setup)
    if setup.training.clip_grad_norm is not None:
        step_bytes = max(kept.step_temporaries_bytes, clipping_bytes(kept.trained))
        kept = replace(kept, step_temporaries_bytes=step_bytes)
    known = has_formulas(setup)
    layers = stack(setup, accumulates=False) if known else None
    workspace = _workspaces(setup, known=known)
    first = _moments(kept, layers, workspace, begins=True)
    worst = _moments(kept, layers, workspace)
    if layers is not None and setup.training.gradient_accumulation_steps > 1:
        again = stack(setup, accumulates=True)
        later = _moments(kept, again, workspace, accumulates=True)
        first, worst = _worse(first, later), _worse(worst, later)
    steady = worst
    if layers is not None and setup.training.zero_grad == "zero":
        again = stack(setup, accumulates=True)
        later = _moments(kept, again, workspace, after_zeroing=True)
        steady = _worse(worst, later)
    peak = max(steady.values(), key=lambda moment: moment.total_bytes)
    return MemoryReport(
        source="estimate",
        setup=setup.to_dict(),
        parameters=kept.parameters,
        parts=Parts(
            base_weights=kept.base_weights_bytes,
            adapter_weights=kept.adapter_weights_bytes,
            gradients=peak.gradients,
            optimizer_states=kept.optimizer_states_bytes,
            activations=peak.activations,
            logits_and_loss=peak.logits_and_loss,
            temporaries=peak.temporaries,
            workspace=peak.workspace,
        ),
        phases=phases(setup, kept, layers, (first, steady), workspace),
        peak_phase=peak.phase,
        not_known=_not_known(setup),
        notes=_notes(setup, kept.paged_bytes),
        provenance={
            "planner": __version__,
            "model": setup.model.source,
            **({"paged_bytes": kept.paged_bytes} if kept.paged_bytes else {}),
        },
    )


def _workspaces(setup: Setup, *, known: bool) -> Workspaces:
    if setup.model.is_bare:
        return Workspaces()
    return workspaces(setup, model_form(setup) if known else None)


def _worse(moments: dict[str, Alive], others: dict[str, Alive]) -> dict[str, Alive]:
    return {phase: max(moments[phase], others[phase], key=lambda m: m.total_bytes) for phase in moments}


def _moments(
    kept: Resident,
    layers: Stack | None,
    taken: Workspaces,
    *,
    begins: bool = False,
    accumulates: bool = False,
    after_zeroing: bool = False,
) -> dict[str, Alive]:
    """The worst moment of each phase in a step whose states are there.

    `begins`: autograd has multiplied nothing before and has no workspace; `accumulates`: after another micro
    batch, whose output waits; `after_zeroing`: after a step that left its gradients.
    """
    gradients, workspace = kept.gradients_bytes, taken.total_bytes
    before_products = taken.forward_bytes if begins else workspace
    optimizer = Alive(
        phase="optimizer_step",
        gradients=gradients,
        activations=layers.left_bytes if layers else 0,
        logits_and_loss=layers.loss.output_bytes if layers else 0,
        temporaries=kept.step_temporaries_bytes if layers else 0,
        workspace=workspace,
    )
    if layers is None:
        return {
            "forward": Alive(phase="forward", workspace=before_products),
            "backward": Alive(phase="backward", gradients=gradients, workspace=workspace),
            "optimizer_step": optimizer,
        }
    before = gradients if accumulates or after_zeroing else 0
    return {
        "forward": _forward(layers, before, before_products, again=accumulates),
        "backward": _backward(layers, before, workspace, before_products),
        "optimizer_step": optimizer,
    }


def _forward(layers: Stack, gradients: int, workspace: int, *, again: bool) -> Alive:
    """In the last layers, or at the loss, where everything that is kept is there.

    `again`: after another micro batch, whose output, and of its graph what nodes refer to, is held until this
    one's is there.
    """
    earlier_logits = layers.loss.output_bytes if again else 0
    beside = 0 if layers.masks_kept else layers.masks_bytes  # gone with the layers
    beside += 0 if layers.embedded_stays else layers.embedded_bytes
    waiting = layers.inputs_bytes + layers.tables_bytes + layers.masks_bytes + layers.leaf_kept_bytes
    waiting += layers.left_bytes - layers.inputs_bytes if again else 0
    best = Alive(phase="forward")
    for number, stretch in enumerate(layers.stretches):
        left_bytes = stretch.kept_bytes + stretch.copied_bytes + stretch.pinned_bytes
        waiting += left_bytes * (stretch.count - 1)
        held_bytes = stretch.input_bytes + stretch.passed_bytes + stretch.beside_bytes
        if number == stretch.count == 1 and layers.embedded_is_input:
            held_bytes -= layers.embedded_bytes  # waiting already
        activations = waiting + held_bytes + stretch.forward_peak_bytes
        moment = Alive(
            phase="forward",
            gradients=gradients,
            activations=activations,
            logits_and_loss=earlier_logits,
            workspace=workspace,
        )
        best = max(best, moment, key=lambda m: m.total_bytes)
        waiting += left_bytes + (layers.embedded_bytes if stretch is layers.stretches[0] else 0)
    waiting -= beside
    moment = Alive(
        phase="forward",
        gradients=gradients + layers.loss.early_bytes,
        activations=waiting + layers.hidden_bytes,
        logits_and_loss=earlier_logits + layers.loss.forward_peak_bytes,
        workspace=workspace,
    )
    return max(best, moment, key=lambda m: m.total_bytes)


def _backward(layers: Stack, gradients: int, workspace: int, before_products: int) -> Alive:
    """At the loss, or in a layer: the last one with everything kept, the first with all gradients.

    `before_products`: what there is of the workspace before the first product.
    """
    waiting = layers.waiting_bytes
    output = layers.loss.output_bytes
    at_loss = [
        Alive(
            phase="backward",
            gradients=gradients + loss.gradients_bytes,
            activations=waiting,
            logits_and_loss=output + loss.kept_bytes + loss.temporaries_bytes,
            workspace=there,
        )
        for loss, there in ((layers.loss.backward, before_products), (layers.loss.multiplied, workspace))
    ]
    best = max(at_loss, key=lambda m: m.total_bytes)
    made = gradients + layers.loss.waiting_bytes if gradients else layers.loss.weight_bytes
    for back, stretch in enumerate(reversed(layers.stretches)):
        moment = stretch.backward
        if moment is None:  # nothing in it or before it is trained; an encoder before it may be
            continue
        left_bytes = stretch.stray_bytes if gradients else stretch.weight_bytes
        for index in {stretch.count - 1, 0}:
            later = stretch.count - 1 - index
            handed = layers.handed_on_bytes if later == 0 and back <= 1 else 0
            candidate = Alive(
                phase="backward",
                gradients=made + left_bytes * later + moment.gradients_bytes,
                activations=waiting
                - stretch.kept_bytes * (later + 1)
                + stretch.input_bytes
                + moment.kept_bytes,
                logits_and_loss=output + handed,
                temporaries=moment.temporaries_bytes - handed,
                workspace=workspace,
            )
            best = max(best, candidate, key=lambda m: m.total_bytes)
        waiting -= stretch.kept_bytes * stretch.count
        made += left_bytes * stretch.count
    return best


def _not_known(setup: Setup) -> tuple[str, ...]:
    if not states_are_known(setup):
        return ("optimizer_states", *_UNKNOWN, *(("workspace",) if setup.model.is_bare else ()))
    if setup.model.is_bare:
        return (*_UNKNOWN, "workspace")
    if isinstance(setup.method, PeftConfig) and peft_form(setup.model, setup.method) is None:
        return _UNKNOWN_TO_PEFT_CONFIG
    return () if has_formulas(setup) else _UNKNOWN


def _notes(setup: Setup, paged_bytes: int) -> tuple[str, ...]:
    paged = (paged_note(paged_bytes),) if paged_bytes else ()
    return (*_not_known_notes(setup), *_router_notes(setup), *paged)


def _router_notes(setup: Setup) -> tuple[str, ...]:
    shape, training = setup.model.architecture, setup.training
    if shape is None or shape.mlp != "experts" or not has_formulas(setup):
        return ()
    return (router_note(shape, training.micro_batch_size * training.seq_len, recipe_of(setup).compute),)


def _not_known_notes(setup: Setup) -> tuple[str, ...]:
    if not states_are_known(setup):
        return (
            "Adafactor's states follow from the shapes of what is trained, of which only a number of "
            "parameters is known; activations, loss and temporaries count as 0, too.",
        )
    if setup.model.is_bare:
        return ("Only the number of parameters is known; activations, loss and temporaries count as 0.",)
    if isinstance(setup.method, PeftConfig) and peft_form(setup.model, setup.method) is None:
        return ("What this peft method trains has no formula; run simulate for the whole peak.",)
    if fuses_experts(setup.training.kernels, setup.model):
        return (
            "Liger's experts have no formula: their kernels are tried in several forms in the first step, "
            "with 256 MiB beside them; run simulate for the whole peak.",
        )
    if not has_formulas(setup):
        return (f"Activations of {setup.model.id} have no formula yet; run simulate for the whole peak.",)
    return ()
