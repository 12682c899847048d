"""The moments of one step under FSDP2: what is gathered, reduced and kept while each unit runs.

One walk forward and one backward over the units, in FSDP2's own order. Source: torch 2.13, distributed/fsdp/
_fully_shard/_fsdp_param_group.py. `wait_for_unshard` keeps the all-gather's output in the forward pass until
the next unit's weights are there (its variable `prev_all_gather_state` still refers to it);
`_backward_prefetch` gathers one unit ahead; `post_backward` frees the weights, then fills the
reduce-scatter's input beside the gradients and holds it until the next unit's turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from planner.estimate.alive import Alive
from planner.estimate.gathering import UnitMemory
from planner.estimate.nodes import Moment
from planner.estimate.stack import stack
from planner.estimate.stretches import Stack, Stretch
from planner.spec import Setup

__all__ = ["Plan", "backward_moments", "forward_end", "forward_moments", "step_moments"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The units of a step: `embedding` (nothing where it is tied), `layers` in order, `tail`, `root`.

    `reshards`: a layer's weights go after its forward pass; `ahead`: units gathered ahead explicitly, None
    for FSDP2's own; `hidden_bytes`: what flows between two layers.
    """

    embedding: UnitMemory
    layers: tuple[UnitMemory, ...]
    tail: UnitMemory
    root: UnitMemory
    tied: bool
    reshards: bool
    ahead: int | None
    hidden_bytes: int
    workspace: int

    def following(self, index: int) -> int:
        """Buffers of the units that layer `index` asks for in the forward pass."""
        order = self.layers if self.tied else (*self.layers, self.tail)
        return sum([unit.buffer for unit in order[index + 1 : index + 1 + (self.ahead or 0)]])

    def preceding(self, index: int) -> tuple[UnitMemory, ...]:
        """Units that are gathered while layer `index` runs backward: those that the forward pass freed."""
        if not self.reshards:
            return ()
        order = self.layers if self.tied else (self.embedding, *self.layers)
        at = index if self.tied else index + 1
        return order[max(0, at - (self.ahead or 1)) : at]


def _expanded(layers: Stack) -> list[Stretch]:
    return [stretch for stretch in layers.stretches[1:-1] for _ in range(stretch.count)]


def forward_moments(plan: Plan, layers: Stack, gradients: int, earlier_logits: int) -> Iterator[Alive]:
    """Every moment of the forward pass that may be its worst.

    `gradients` of earlier micro batches and `earlier_logits`, their output, are there.
    """

    def alive(activations: int, gathered: int, logits: int = 0) -> Alive:
        return Alive(
            phase="forward",
            gradients=gradients,
            activations=activations,
            logits_and_loss=earlier_logits + logits,
            temporaries=gathered,
            workspace=plan.workspace,
        )

    leaf = 0 if layers.leaf_is_input else layers.leaf_bytes
    waiting = layers.inputs_bytes + layers.tables_bytes + layers.masks_bytes + leaf
    first, last = layers.stretches[0], layers.stretches[-1]
    held = plan.root.gathered + (plan.tail.gathered if plan.tied else 0)
    before = plan.tail if plan.tied else plan.embedding
    kept = 0 if plan.tied else plan.embedding.gathered
    yield alive(waiting + first.forward_peak_bytes, held + kept + before.buffer)
    kept = 0 if plan.reshards else kept
    waiting += first.kept_bytes + first.copied_bytes + first.pinned_bytes + layers.embedded_bytes
    for index, (stretch, unit) in enumerate(zip(_expanded(layers), plan.layers, strict=True)):
        ahead = max(0, plan.following(index - 1) - unit.buffer)
        arriving = before.buffer + unit.arriving_bytes + ahead
        yield alive(waiting + plan.hidden_bytes, held + kept + arriving)
        gathered = held + kept + unit.gathered + unit.buffer + plan.following(index)
        yield alive(waiting + stretch.input_bytes + stretch.forward_peak_bytes, gathered)
        waiting += stretch.kept_bytes + stretch.copied_bytes + stretch.pinned_bytes
        kept += 0 if plan.reshards else unit.gathered
        before = unit
    if plan.tied:
        gathered = held + kept + before.buffer
    else:
        yield alive(waiting + plan.hidden_bytes, held + kept + before.buffer + plan.tail.arriving_bytes)
        gathered = held + kept + plan.tail.gathered + plan.tail.buffer
    yield alive(waiting + last.input_bytes + last.forward_peak_bytes, gathered)
    waiting += last.kept_bytes + last.copied_bytes + last.pinned_bytes - layers.embedded_bytes
    waiting -= 0 if layers.masks_kept else layers.masks_bytes
    yield alive(waiting + layers.hidden_bytes, gathered, layers.loss.forward_peak_bytes)


def backward_moments(plan: Plan, layers: Stack, accumulated: int) -> Iterator[Alive]:
    """Every moment of the last micro batch's backward pass that may be its worst.

    `accumulated`: unsharded gradients of the micro batches before, each freed with its unit's reduction.
    """
    stretches = _expanded(layers)
    loss, last = layers.loss, layers.stretches[-1]
    waiting = layers.inputs_bytes + layers.tables_bytes + (0 if layers.leaf_is_input else layers.leaf_bytes)
    waiting += layers.masks_bytes if layers.masks_kept else 0
    waiting += sum([s.kept_bytes * s.count for s in layers.stretches]) + layers.pinned_bytes
    held = plan.root.gathered + plan.tail.gathered
    held += 0 if plan.reshards else plan.embedding.gathered + sum([unit.gathered for unit in plan.layers])
    gradients, whole = accumulated, 0  # shards of them, and what is not reduced yet
    again = accumulated > 0

    def alive(activations: int, temporaries: int, logits: int = 0) -> Alive:
        return Alive(
            phase="backward",
            gradients=gradients + whole,
            activations=activations,
            logits_and_loss=loss.output_bytes + logits,
            temporaries=held + temporaries,
            workspace=plan.workspace,
        )

    worst = loss.backward
    yield alive(waiting, worst.gradients_bytes, worst.kept_bytes + worst.temporaries_bytes)
    ahead = plan.preceding(len(plan.layers))
    buffers = sum([unit.buffer for unit in ahead])
    copied = max([unit.copied for unit in ahead], default=0)
    head = loss.output_bytes + loss.weight_bytes + plan.hidden_bytes
    yield alive(waiting, buffers + head)
    yield alive(waiting, buffers + copied, loss.output_bytes)
    made = loss.weight_bytes
    if last.backward is not None:
        moment = last.backward
        yield alive(
            waiting - last.kept_bytes + last.input_bytes + moment.kept_bytes,
            buffers + made + moment.temporaries_bytes + moment.gradients_bytes,
        )
        made += last.weight_bytes
    waiting -= last.kept_bytes
    reducing = 0
    if plan.tied:
        whole = loss.waiting_bytes if again else made  # the head's waits for the embeddings'
    else:
        held -= plan.tail.gathered
        yield alive(waiting + plan.hidden_bytes, buffers + plan.tail.reduce_input + (0 if again else made))
        gradients += plan.tail.gradients + plan.tail.waiting_reduced - (plan.tail.accumulated if again else 0)
        reducing = plan.tail.reduce_input
        yield alive(waiting + plan.hidden_bytes, buffers + plan.tail.reducing_bytes(accumulated=again))
    for index in range(len(plan.layers) - 1, -1, -1):
        unit, stretch = plan.layers[index], stretches[index]
        if stretch.backward is None:
            break
        waiting -= stretch.kept_bytes
        moment = stretch.backward
        if plan.reshards:
            others = buffers - unit.buffer if unit in ahead else buffers
            yield alive(
                waiting + stretch.kept_bytes + plan.hidden_bytes,
                reducing + unit.gathered + unit.buffer + others,
            )
        ahead = plan.preceding(index)
        buffers = sum([one.buffer for one in ahead])
        copied = max([one.copied for one in ahead], default=0)
        gathered = unit.gathered if plan.reshards else 0
        yield alive(
            waiting + stretch.kept_bytes + plan.hidden_bytes, reducing + gathered + buffers + copied
        )
        yield alive(
            waiting + stretch.input_bytes + moment.kept_bytes,
            reducing + gathered + buffers + moment.temporaries_bytes + moment.gradients_bytes,
        )
        held -= 0 if plan.reshards else unit.gathered
        own = 0 if again else unit.unsharded_gradients
        yield alive(waiting + plan.hidden_bytes, buffers + own + unit.reduce_input)
        gradients += unit.gradients + unit.waiting_reduced - (unit.accumulated if again else 0)
        reducing = unit.reduce_input
        yield alive(waiting + plan.hidden_bytes, buffers + unit.reducing_bytes(accumulated=again))
    else:
        first, outer = layers.stretches[0], (plan.root, plan.tail if plan.tied else plan.embedding)
        held += plan.embedding.gathered if plan.reshards else 0
        moment = first.backward or Moment(0, 0, 0)
        yield alive(
            waiting - first.kept_bytes + first.input_bytes + moment.kept_bytes,
            reducing + moment.temporaries_bytes + moment.gradients_bytes,
        )
        left = sum([unit.unsharded_gradients for unit in outer])
        held = whole = 0
        for unit in outer:  # one after the other, when the backward pass is over
            yield alive(layers.inputs_bytes, (0 if again else left) + unit.reduce_input)
            gradients += unit.gradients - (unit.accumulated if again else 0)
            left -= unit.unsharded_gradients
            yield alive(layers.inputs_bytes, (0 if again else left) + unit.reducing_bytes(accumulated=again))


def step_moments(setup: Setup, forward: Plan, backward: Plan, layers: Stack) -> Iterator[Alive]:
    """Moments of forward and backward pass; after other micro batches their gradients wait, and their logits.

    Those gradients are not reduced yet, as accelerate accumulates them (`no_sync`).
    """
    yield from forward_moments(forward, layers, 0, 0)
    if setup.training.gradient_accumulation_steps == 1:
        yield from backward_moments(backward, layers, 0)
        return
    members = (backward.root, backward.embedding, *backward.layers, backward.tail)
    accumulated = sum([unit.accumulated for unit in members])
    again = stack(setup, accumulates=True)
    yield from forward_moments(forward, again, accumulated, layers.loss.output_bytes)
    yield from backward_moments(backward, again, accumulated)


def forward_end(plan: Plan, layers: Stack) -> int:
    """Bytes beside shards, states and workspaces when the forward pass is over."""
    kept = sum([stretch.kept_bytes * stretch.count for stretch in layers.stretches])
    masks = layers.masks_bytes if layers.masks_kept else 0
    leaf = 0 if layers.leaf_is_input else layers.leaf_bytes
    waiting = layers.inputs_bytes + layers.tables_bytes + kept + layers.pinned_bytes + masks + leaf
    gathered = plan.root.gathered + plan.tail.gathered
    if not plan.reshards:
        gathered += plan.embedding.gathered + sum([unit.gathered for unit in plan.layers])
    return waiting + gathered + layers.loss.output_bytes + layers.loss.kept_bytes
