"""The estimate of one rank under FSDP2: what stays, and the worst moment of each phase.

Rank 0 is meant, whose chunks of tensors that do not divide evenly are the largest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from planner.estimate.alive import Alive
from planner.estimate.forms import model_form
from planner.estimate.gathered_step import Plan, forward_end, step_moments
from planner.estimate.gathering import UnitMemory, unit_memory
from planner.estimate.optimizers import optimizer_memory
from planner.estimate.parameters import TrainedTensor, trained_tensors
from planner.estimate.rank_report import UNKNOWN, Held, bare_report, not_known, one_gpu, rank_report, worst
from planner.estimate.recipes import RECIPES, recipe_of
from planner.estimate.resident import resident
from planner.estimate.rounding import block_bytes, packed_bytes
from planner.estimate.shards import Piece, Units, chunk_numel, units
from planner.estimate.stack import has_formulas, stack
from planner.estimate.stretches import Stack
from planner.estimate.workspace import workspace_bytes
from planner.report import MemoryReport
from planner.spec import Setup

__all__ = ["Shards", "fsdp_report", "shards"]

_PACKED_UNITS = 8  # after so many the pattern of shared segments changes little


@dataclass(frozen=True, kw_only=True, slots=True)
class Shards:
    """Bytes of rank 0's shards of parameters, gradients and optimizer states, and of the optimizer's step.

    On the card, or under CPU offload in the host's memory.
    """

    base_weights_bytes: int
    adapter_weights_bytes: int
    gradients_bytes: int
    optimizer_states_bytes: int
    step_temporaries_bytes: int


def shards(setup: Setup) -> Shards:
    """Rank 0's shards, tensor by tensor; the gradients of a unit are views of one buffer."""
    ranks = setup.sharding.shard_ranks
    found = units(setup)
    sizes: dict[int, tuple[list[int], list[int]]] = {}  # by unit: base, added
    for unit in found.all():
        if id(unit) not in sizes:
            sizes[id(unit)] = _chunk_bytes(unit, ranks, added=False), _chunk_bytes(unit, ranks, added=True)
    optimizer = optimizer_memory(setup, _rows_of_rank_0(setup), None)
    memories = _memories(setup, tuple(found.all()), offloaded=False)
    return Shards(
        base_weights_bytes=packed_bytes(size for unit in found.all() for size in sizes[id(unit)][0]),
        adapter_weights_bytes=packed_bytes(size for unit in found.all() for size in sizes[id(unit)][1]),
        gradients_bytes=sum([memory.gradients for memory in memories]),
        optimizer_states_bytes=optimizer.states_bytes,
        step_temporaries_bytes=optimizer.temporaries_bytes,
    )


def _chunk_bytes(unit: Sequence[Piece], ranks: int, *, added: bool) -> list[int]:
    return [chunk_numel(piece.shape, ranks) * piece.element_bytes for piece in unit if piece.added == added]


def fsdp_report(setup: Setup) -> MemoryReport:
    """The report of rank 0; parts without a formula count as 0 and are named in `not_known`."""
    if setup.model.is_bare:
        return _bare(setup)
    own = shards(setup)
    known = _has_formulas(setup)
    workspace = workspace_bytes(setup, model_form(setup) if known else None)
    offloaded = setup.sharding.cpu_offload == "parameters"
    held = Held(
        base_weights_bytes=own.base_weights_bytes,
        adapter_weights_bytes=own.adapter_weights_bytes,
        gradients_bytes=own.gradients_bytes,
        optimizer_states_bytes=own.optimizer_states_bytes,
    )
    step_temporaries = own.step_temporaries_bytes
    if offloaded:
        held, step_temporaries = _on_host(held), 0
    if not known:
        return bare_report(setup, held, workspace, not_known=not_known(setup), notes=_notes(setup))
    layers = stack(setup, accumulates=False)
    plan = _plan(setup, units(setup), layers, workspace)
    steps = list(step_moments(setup, plan, plan, layers))
    output = layers.loss.output_bytes + layers.inputs_bytes + 2 * layers.leaf_bytes + layers.pinned_bytes
    steps.append(
        Alive(
            phase="optimizer_step",
            gradients=held.gradients_bytes,
            activations=output - layers.loss.output_bytes,
            logits_and_loss=layers.loss.output_bytes,
            temporaries=step_temporaries,
            workspace=workspace,
        )
    )
    ends = {
        "forward": forward_end(plan, layers) + workspace,
        "backward": held.gradients_bytes + output + workspace,
        "optimizer_step": output + workspace,
    }
    load = 0 if offloaded else _load_peak(setup)
    notes = _notes(setup)
    return rank_report(setup, held, worst(steps), ends, not_known=(), notes=notes, load_peak_bytes=load)


def _load_peak(setup: Setup) -> int:
    """A unit is on the card as a whole until its shards are there: layers, embedding, tail, then the root."""
    found, ranks = units(setup), setup.sharding.shard_ranks
    before = most = 0
    sizes: dict[int, tuple[int, int]] = {}
    for unit in (*found.layers, found.embedding, found.tail, found.root):
        if id(unit) not in sizes:
            chunks = (chunk_numel(piece.shape, ranks) * piece.element_bytes for piece in unit)
            whole = packed_bytes(piece.numel * piece.element_bytes for piece in unit)
            sizes[id(unit)] = packed_bytes(chunks), whole
        before += sizes[id(unit)][0]
        most = max(most, before + sizes[id(unit)][1])
    return most


def _plan(setup: Setup, found: Units, layers: Stack, workspace: int) -> Plan:
    sharding, training = setup.sharding, setup.training
    offloaded = sharding.cpu_offload == "parameters"
    shape = setup.model.architecture
    assert shape is not None  # has formulas
    tokens = training.micro_batch_size * training.seq_len
    return Plan(
        embedding=_memory(setup, found.embedding, offloaded=offloaded),
        layers=_memories(
            setup,
            found.layers,
            offloaded=offloaded,
            together=1 if sharding.reshard_after_forward else min(len(found.layers), _PACKED_UNITS),
        ),
        tail=_memory(setup, found.tail, offloaded=offloaded),
        root=_memory(setup, found.root, offloaded=offloaded),
        tied=found.tied,
        reshards=sharding.reshard_after_forward,
        ahead=sharding.prefetch,
        hidden_bytes=block_bytes(tokens * shape.hidden_size * recipe_of(setup).base),
        workspace=workspace,
    )


def _memories(
    setup: Setup, found: tuple[tuple[Piece, ...], ...], *, offloaded: bool, together: int = 1
) -> tuple[UnitMemory, ...]:
    """Of each unit; equal layers are one object, which is looked at once."""
    known: dict[int, UnitMemory] = {}
    for unit in found:
        if id(unit) not in known:
            known[id(unit)] = _memory(setup, unit, offloaded=offloaded, together=together)
    return tuple(known[id(unit)] for unit in found)


def _memory(setup: Setup, unit: Sequence[Piece], *, offloaded: bool, together: int = 1) -> UnitMemory:
    sharding = setup.sharding
    return unit_memory(
        unit,
        sharding.shard_ranks,
        reduce_dtype=sharding.reduce_dtype,
        offloaded=offloaded,
        replicated=sharding.sharding == "hsdp",
        together=together,
    )


def _rows_of_rank_0(setup: Setup) -> tuple[TrainedTensor, ...]:
    """The trained tensors as the optimizer of rank 0 sees them."""
    ranks, recipe = setup.sharding.shard_ranks, RECIPES[setup.training.precision]
    return tuple(
        replace(
            tensor,
            shape=(-(-tensor.shape[0] // ranks), *tensor.shape[1:]),
            element_bytes=recipe.adapter if tensor.added else recipe.base,
        )
        for tensor in trained_tensors(setup)
    )


def _on_host(held: Held) -> Held:
    """CPUOffloadPolicy: parameters, gradients and the optimizer's states live in pinned host memory."""
    return Held(
        host_bytes=held.base_weights_bytes
        + held.adapter_weights_bytes
        + held.gradients_bytes
        + held.optimizer_states_bytes
    )


def _bare(setup: Setup) -> MemoryReport:
    """A bare parameter count, divided evenly: the products alone, without padding and units."""
    alone = resident(one_gpu(setup))
    ranks = setup.sharding.shard_ranks
    held = Held(
        base_weights_bytes=-(-alone.base_weights_bytes // ranks),
        adapter_weights_bytes=-(-alone.adapter_weights_bytes // ranks),
        gradients_bytes=-(-alone.gradients_bytes // ranks),
        optimizer_states_bytes=-(-alone.optimizer_states_bytes // ranks),
    )
    if setup.sharding.cpu_offload == "parameters":
        held = _on_host(held)
    return bare_report(
        setup,
        held,
        0,
        not_known=(*UNKNOWN, "workspace"),
        notes=("Only the number of parameters is known; gathered units and activations count as 0.",),
    )


def _has_formulas(setup: Setup) -> bool:
    """Whether the units are known: a layer each. BERT's `_no_split_modules` names its embeddings, too."""
    unit, shape = setup.sharding.shard_unit, setup.model.architecture
    by_layer = unit is None or (shape is not None and unit == shape.layer_class)
    return has_formulas(setup) and by_layer and setup.model.task == "causal-lm"


def _notes(setup: Setup) -> tuple[str, ...]:
    notes = []
    if not has_formulas(setup):
        notes.append(f"Activations of {setup.model.id} have no formula yet; run simulate for the whole peak.")
    elif not _has_formulas(setup):
        notes.append("These units have no formula, a causal model's layers have; run simulate for the peak.")
    if setup.training.precision.endswith("-mixed"):
        notes.append(
            "Shards are fp32: FSDP under mixed precision trains fp32 weights, and HF Trainer upcasts a model "
            "that was loaded in 16 bits."
        )
    return tuple(notes)
