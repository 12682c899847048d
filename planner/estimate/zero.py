"""The estimate of one rank under DeepSpeed's ZeRO, by formula: what each stage divides by the ranks.

Letters: P parameters (16-bit), T trained ones, N ranks. Stages as in Rajbhandari et al. 2020 (arXiv
1910.02054, section 5): stage 1 divides fp32 weights and AdamW's states (12 T / N), stage 2 also the
gradients (2 T / N), stage 3 also the weights (2 P / N). Buffers from DeepSpeed 0.19: runtime/zero/config.py
(its defaults, which accelerate keeps), stage_1_and_2.py, stage3.py. Held against no run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from planner.estimate.alive import Alive
from planner.estimate.forms import model_form
from planner.estimate.gathered_step import Plan, forward_end, step_moments
from planner.estimate.gathering import UnitMemory
from planner.estimate.parameters import parameters
from planner.estimate.rank_report import UNKNOWN, Held, bare_report, not_known, rank_report, worst
from planner.estimate.recipes import recipe_of
from planner.estimate.rounding import block_bytes
from planner.estimate.shards import Piece, pieces, units
from planner.estimate.stack import has_formulas, stack
from planner.estimate.workspace import workspace_bytes
from planner.report import MemoryReport
from planner.spec import Setup

__all__ = ["zero_report"]

_BUCKET_NUMEL = 500_000_000  # reduce_bucket_size: gradients on their way, one buffer of that many
_LIVE_NUMEL = 1_000_000_000  # stage3_max_live_parameters: gathered weights that stay for their next use
_SUB_GROUP_NUMEL = 1_000_000_000  # sub_group_size: what stage 3 updates at a time
_FP32_BYTES = 4  # the optimizer's weights and gradients
_STATES = {"adamw": 2, "adamw-fused": 2, "adamw-single": 2, "sgd": 0, "sgd-momentum": 1}  # fp32 each
_NOTES = (
    "By DeepSpeed's formulas and default buffers, held against no run; gradients are reduced in buckets of "
    "500 million.",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Slices:
    """Elements: all and trained, whole and of one rank; tensor by tensor where there are some."""

    base: int
    added: int
    trained: int
    base_slice: int
    added_slice: int
    trained_slice: int


def zero_report(setup: Setup) -> MemoryReport:
    """The report of one rank; parts without a formula count as 0 and are named in `not_known`."""
    found = _slices(setup)
    held, step_bytes = _held(setup, found)
    bucket_bytes = _BUCKET_NUMEL * recipe_of(setup).base
    if setup.model.is_bare:
        return bare_report(setup, held, 0, not_known=(*UNKNOWN, "workspace"), notes=_NOTES)
    if not has_formulas(setup) or setup.model.task == "seq2seq-lm":  # two stacks of units have no walk
        workspace = workspace_bytes(setup, None)
        return bare_report(setup, held, workspace, not_known=not_known(setup), notes=_NOTES)
    workspace = workspace_bytes(setup, model_form(setup))
    layers = stack(setup, accumulates=False)
    live = _live_bytes(setup, found)
    backward = _plan(setup, layers.hidden_bytes, workspace, live + bucket_bytes)
    forward = replace(backward, root=replace(backward.root, gathered=live))
    moments = list(step_moments(setup, forward, backward, layers))
    output = layers.inputs_bytes + 2 * layers.leaf_bytes + layers.pinned_bytes
    moments.append(
        Alive(
            phase="optimizer_step",
            gradients=held.gradients_bytes,
            activations=output,
            logits_and_loss=layers.loss.output_bytes,
            temporaries=step_bytes,
            workspace=workspace,
        )
    )
    output += layers.loss.output_bytes + workspace
    ends = {
        "forward": forward_end(forward, layers) + workspace,
        "backward": held.gradients_bytes + output,
        "optimizer_step": output,
    }
    return rank_report(setup, held, worst(moments), ends, not_known=(), notes=_NOTES)


def _slices(setup: Setup) -> _Slices:
    ranks = setup.sharding.shard_ranks
    if setup.model.is_bare:
        counts = parameters(setup)
        base = setup.model.parameters
        return _Slices(
            base=base,
            added=counts.added,
            trained=counts.trainable,
            base_slice=-(-base // ranks),
            added_slice=-(-counts.added // ranks),
            trained_slice=-(-counts.trainable // ranks),
        )
    found = pieces(setup)

    def whole(chosen: list[Piece]) -> tuple[int, int]:
        return sum([p.numel for p in chosen]), sum([-(-p.numel // ranks) for p in chosen])

    base, base_slice = whole([p for p in found if not p.added])
    added, added_slice = whole([p for p in found if p.added])
    trained, trained_slice = whole([p for p in found if p.trained])
    return _Slices(
        base=base,
        added=added,
        trained=trained,
        base_slice=base_slice,
        added_slice=added_slice,
        trained_slice=trained_slice,
    )


def _held(setup: Setup, found: _Slices) -> tuple[Held, int]:
    """What stays, and what the optimizer's step takes: fp32 gradients and foreach AdamW's square roots."""
    stage, offload = setup.sharding.zero_stage, setup.sharding.cpu_offload
    element, optimizer = recipe_of(setup).base, setup.training.optimizer
    whole = stage < 3
    base = (found.base if whole else found.base_slice) * element
    added = (found.added if whole else found.added_slice) * element
    gradients = (found.trained if stage == 1 else found.trained_slice) * element
    states = found.trained_slice * _FP32_BYTES * (1 + _STATES[optimizer])
    stepped = min(found.trained_slice, _SUB_GROUP_NUMEL) if stage == 3 else found.trained_slice
    step = stepped * _FP32_BYTES * (2 if optimizer == "adamw" else 1)
    host = 0
    if offload != "none":  # the update runs on the host, where gradients come in fp32
        host = states + found.trained_slice * _FP32_BYTES
        states = step = gradients = 0
    if offload == "parameters":
        host += base + added
        base = added = 0
    held = Held(
        base_weights_bytes=block_bytes(base),
        adapter_weights_bytes=block_bytes(added),
        gradients_bytes=block_bytes(gradients),
        optimizer_states_bytes=block_bytes(states),
        host_bytes=host,
    )
    return held, block_bytes(step)


def _live_bytes(setup: Setup, found: _Slices) -> int:
    """Stage 3: gathered weights stay while their next use is less than 10^9 parameters away."""
    if setup.sharding.zero_stage < 3:
        return 0
    return min(found.base + found.added, _LIVE_NUMEL) * recipe_of(setup).base


def _plan(setup: Setup, hidden_bytes: int, workspace: int, constant: int) -> Plan:
    """A walk in which nothing is gathered unit by unit: `constant` bytes are there all along."""
    found = units(setup)
    slices = setup.sharding.shard_ranks if setup.sharding.zero_stage > 1 else 1
    offloaded = setup.sharding.cpu_offload != "none"

    def of(unit: tuple[Piece, ...]) -> UnitMemory:
        whole = sum([p.numel * p.gathered_element_bytes for p in unit if p.trained])
        kept = 0 if offloaded else whole // slices
        return UnitMemory(unsharded_gradients=whole, accumulated=kept, gradients=kept)

    return Plan(
        embedding=of(found.embedding),
        layers=tuple(of(unit) for unit in found.layers),
        tail=of(found.tail),
        root=replace(of(found.root), gathered=constant),
        tied=found.tied,
        reshards=False,
        ahead=None,
        hidden_bytes=hidden_bytes,
        workspace=workspace,
    )
