"""The rows of the report's phases: what is there at the end of each, and at its worst moment."""

from __future__ import annotations

from planner.estimate.alive import Alive
from planner.estimate.peft_form import Change, peft_form
from planner.estimate.recipes import recipe_of
from planner.estimate.resident import Resident
from planner.estimate.rounding import block_bytes
from planner.estimate.stretches import Stack
from planner.estimate.workspace import Workspaces
from planner.report import Phase
from planner.spec import PeftConfig, Setup

__all__ = ["phases"]


def phases(
    setup: Setup,
    kept: Resident,
    layers: Stack | None,
    worst: tuple[dict[str, Alive], dict[str, Alive]],
    taken: Workspaces,
) -> tuple[Phase, ...]:
    """Load, attach and two steps: optimizer states come at the end of the first.

    `worst` are the moments of the first step and of the second.
    """
    left = kept.gradients_bytes if setup.training.zero_grad == "zero" else 0
    base = kept.base_weights_bytes
    attached = base + kept.adapter_weights_bytes
    states = kept.optimizer_states_bytes
    waiting = output = held = 0
    workspace = taken.total_bytes
    if layers is not None:
        waiting = layers.loss.output_bytes + layers.loss.kept_bytes + layers.loss.early_bytes
        waiting += layers.waiting_bytes
        output = layers.loss.output_bytes + layers.inputs_bytes + 2 * layers.leaf_bytes
        output += layers.pinned_bytes + layers.stray_bytes
        held = layers.loss.output_bytes + layers.left_bytes
    rows = [
        Phase(name="load", allocated_bytes=base, peak_allocated_bytes=base + kept.load_beside_bytes),
        _attach(setup, kept, taken),
    ]
    for step in (1, 2):
        resident_bytes = attached + (states if step == 2 else 0)
        begins = step == 1 and setup.training.gradient_accumulation_steps == 1
        before_products = taken.forward_bytes if begins else workspace
        ends = {
            "forward": resident_bytes + waiting + before_products + (left if step == 2 else 0),
            "backward": resident_bytes + kept.gradients_bytes + output + workspace,
            "optimizer_step": attached + states + held + workspace + left,
        }
        for name, end in ends.items():
            base_bytes = attached + states if name == "optimizer_step" else resident_bytes
            peak = max(base_bytes + worst[step - 1][name].total_bytes, end)
            rows.append(Phase(name=name, allocated_bytes=end, peak_allocated_bytes=peak, step=step))
    return tuple(rows)


def _attach(setup: Setup, kept: Resident, taken: Workspaces) -> Phase:
    """DoRA starts from the norms |W + B A|: three matrices [out, in] in the model's type, and a product.

    peft 0.21, tuners/lora/dora.py, `update_layer`; adapters become fp32 when all are there.
    """
    end = kept.base_weights_bytes + kept.adapter_weights_bytes
    recipe = recipe_of(setup)
    norms = [block_bytes(change.weight.numel * recipe.base) for change in _changes(setup) if change.dora]
    if not norms:
        return Phase(name="attach", allocated_bytes=end, peak_allocated_bytes=end)
    adapters = kept.adapter_weights_bytes * recipe.base // recipe.adapter
    end += taken.forward_bytes
    worst = kept.base_weights_bytes + adapters + 3 * max(norms) + taken.forward_bytes
    return Phase(name="attach", allocated_bytes=end, peak_allocated_bytes=max(end, worst))


def _changes(setup: Setup) -> tuple[Change, ...]:
    form = peft_form(setup.model, setup.method) if isinstance(setup.method, PeftConfig) else None
    return form.changes if form else ()
