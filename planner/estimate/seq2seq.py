"""An encoder and a decoder: two stacks of layers, the second of which reads what the first answers.

The graph runs backwards through the decoder, then through the encoder. The encoder's output goes into every
layer of the decoder, and the position bias that the first layer of a stack makes into all of its layers: they
are kept once, and their gradients wait, summed layer by layer, until the layer that made them is reached.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby

from planner.estimate.blocks import looked_up
from planner.estimate.forms import LayerForm, ModelForm
from planner.estimate.loss import loss_memory
from planner.estimate.nodes import Moment, Tensor
from planner.estimate.operations import Operations
from planner.estimate.resident import block_bytes
from planner.estimate.stretches import Stack, Stretch, stretch_of
from planner.estimate.t5_layers import Given, t5_layer, t5_norm
from planner.model import Architecture
from planner.spec import Setup

__all__ = ["seq2seq_stack"]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Walk:
    """The setup, and how its stretches are walked. `blank` is an empty tape."""

    setup: Setup
    shape: Architecture
    form: ModelForm
    blank: Operations
    accumulates: bool

    @property
    def checkpointed(self) -> bool:
        return self.setup.training.activation_checkpointing

    def operations(self) -> Operations:
        """A tape of its own for one stretch."""
        blank = self.blank
        return Operations(blank.tokens, blank.seq_len, blank.recipe, blank.traits, fp16=blank.fp16)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layers:
    """The layers of one stack: their stretches, what comes out, what they shared and what of it they keep.

    `beside_bytes`: the variables of their loop, which live to the end of the stack.
    """

    stretches: tuple[Stretch, ...]
    out: Tensor
    given: Given
    kept: frozenset[Tensor]
    pinned: frozenset[Tensor]
    beside_bytes: int


def seq2seq_stack(
    setup: Setup, form: ModelForm, blank: Operations, *, inputs_bytes: int, accumulates: bool
) -> Stack:
    """All stretches of an encoder-decoder. `blank` is an empty tape of the setup.

    The encoder's output stays to the end of the step where the loop holds the model's output, else until the
    decoder's first layer has run backwards. Leaves of the graph beside the weights, which checkpointing asks
    for: the embeddings' output of both stacks, and the empty bias of the attention to the encoder's output.
    """
    shape, training = setup.model.architecture, setup.training
    assert shape is not None  # the caller asks for closed-form families only
    walk = _Walk(setup=setup, shape=shape, form=form, blank=blank, accumulates=accumulates)
    rows, start, x = _embedded(walk, tied=True)
    encoder = _layers(walk, form.encoder_runs, x, Given(), beside_bytes=_local_bytes(walk, rows, x))
    memory, end = _tail(walk, encoder.out, encoder.beside_bytes, last=False)
    decoder_rows, decoder_start, y = _embedded(walk, tied=form.head_table_trained, memory=memory)
    masks_bytes = _masks_bytes(walk)
    beside_bytes = _local_bytes(walk, decoder_rows, y) + (0 if walk.checkpointed else masks_bytes)
    decoder = _layers(walk, form.runs, y, Given(memory=memory), beside_bytes=beside_bytes)
    if walk.checkpointed:
        decoder_start = replace(decoder_start, kept_bytes=decoder_start.kept_bytes + masks_bytes)
    head = walk.operations()
    hidden, tail = _tail(walk, decoder.out, decoder.beside_bytes, last=True)
    loss = loss_memory(head, hidden, form, shape, training, accumulates=accumulates)
    if loss.input_kept:
        tail = replace(tail, kept_bytes=tail.kept_bytes + hidden.size_bytes)
    plain = training.loop == "plain"
    empty = _leaf(walk, decoder.given)
    later = [*([decoder_rows] if _hooked(walk) else []), *([empty] if empty else [])]
    leaves = [rows, *later] if _hooked(walk) else later
    later_bytes = sum([leaf.size_bytes for leaf in leaves if leaf is not rows])
    pinned = plain or memory in decoder.pinned
    of_encoder = start, *encoder.stretches, _held(end, memory, pinned=pinned, kept=memory in decoder.kept)
    return Stack(
        stretches=(
            *_behind(of_encoder, later_bytes),
            decoder_start,
            *decoder.stretches,
            tail,
        ),
        loss=loss,
        inputs_bytes=inputs_bytes,
        tables_bytes=0,
        masks_bytes=0,
        hidden_bytes=0 if loss.input_kept else hidden.size_bytes,
        leaf_bytes=sum([leaf.size_bytes for leaf in leaves]),
        leaf_is_input=False,
        keeps_graph=plain,
    )


def _embedded(
    walk: _Walk, *, tied: bool, memory: Tensor | None = None
) -> tuple[Tensor, Stretch, Tensor]:
    """Rows of the one table, their stretch, and with dropout the first layer's input.

    The token ids of a decoder (given `memory`) are its labels shifted, a tensor of its own. Their table's
    gradient waits for the encoder's; a trained head has made it before.
    """
    ops, table = walk.operations(), walk.form.tables[0]
    rows = looked_up(ops, table, ops.tokens, tied=tied)
    rows.needs_grad = rows.needs_grad or walk.checkpointed
    x = ops.dropout(rows, walk.shape.embedding_dropout)
    carried = [memory] if memory is not None and memory.needs_grad else []
    stretch = stretch_of(ops, None, x, accumulates=walk.accumulates, carried=carried)
    if memory is not None:
        ids_bytes = block_bytes(8 * ops.tokens)
        if table.trained:
            stretch = replace(stretch, kept_bytes=stretch.kept_bytes + ids_bytes)
        else:
            stretch = replace(stretch, copied_bytes=ids_bytes)
    return rows, stretch, x


def _hooked(walk: _Walk) -> bool:
    """Whether the embeddings' output is a leaf: frozen, and checkpointing asks for its gradient."""
    return walk.checkpointed and not walk.form.tables[0].trained


def _local_bytes(walk: _Walk, rows: Tensor, x: Tensor) -> int:
    """The embeddings' output, a variable beside x while the layers run; a leaf is counted as one."""
    return 0 if rows is x or _hooked(walk) else rows.size_bytes


def _layers(
    walk: _Walk,
    runs: tuple[tuple[LayerForm, int], ...],
    x: Tensor,
    given: Given,
    *,
    beside_bytes: int,
) -> _Layers:
    """All layers of a stack; the first makes what they share, the last is the first to run backwards."""
    forms = [form for form, count in runs for _ in range(count)]
    walked: dict[tuple[object, ...], _Layer] = {}
    found: list[_Layer] = []
    lent = given
    for index, form in enumerate(forms):
        place = index == 0, index == len(forms) - 1
        key = (id(form), x.needs_grad, x.element, place)
        if key not in walked:
            walked[key] = _layer(walk, form, x, lent, len(forms), last=place[1])
        found.append(walked[key])
        x, lent = found[-1].out, found[-1].given
    kept = frozenset[Tensor]().union(*[layer.kept for layer in walked.values()])
    pinned = frozenset[Tensor]().union(*[layer.pinned for layer in walked.values()])
    if walk.checkpointed and x.needs_grad:  # every layer's inputs, but what the first one makes
        kept |= set(lent.tensors() if len(forms) > 1 else given.tensors())
    leaf = _leaf(walk, lent)
    made = [t for t in lent.tensors() if t not in given.tensors() and t is not leaf]
    waiting = sum([t.size_bytes for t in made if t in kept])
    passing = sum([t.size_bytes for t in made if t not in kept])
    inputs = 0 if walk.checkpointed else x.size_bytes  # a checkpoint counts them
    again = leaf.size_bytes if leaf else 0  # counted twice while it is made
    stretches = [replace(found[0].stretch, beside_bytes=beside_bytes + inputs - again)]
    stretches[0] = _kept_beside(stretches[0], waiting, to_its_end=not walk.checkpointed)
    for stretch, alike in groupby([layer.stretch for layer in found[1:]]):
        count = len(list(alike))
        stretches.append(replace(stretch, count=count, beside_bytes=beside_bytes + inputs + passing))
    return _Layers(
        stretches=tuple(stretches),
        out=x,
        given=lent,
        kept=kept,
        pinned=pinned,
        beside_bytes=beside_bytes + passing,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layer:
    """One layer: its stretch without what is shared, its output, what it passes on and keeps of that."""

    stretch: Stretch
    out: Tensor
    given: Given
    kept: frozenset[Tensor]
    pinned: frozenset[Tensor]


def _layer(walk: _Walk, form: LayerForm, x: Tensor, given: Given, repeats: int, *, last: bool) -> _Layer:
    """`last`: no layer behind it has made gradients of what is shared."""
    ops, start = walk.operations(), Tensor(x.numel, x.element, x.needs_grad)
    out, shared = t5_layer(ops, start, walk.shape, form, walk.setup, given)
    tensors = shared.tensors()
    stretch = stretch_of(
        ops,
        start if walk.checkpointed else None,  # the norm gives its input up before it is through
        out,
        repeats=repeats,
        accumulates=walk.accumulates,
        checkpointed=walk.checkpointed,
        lent=tensors,
        carried=[] if last else [t for t in tensors if t.needs_grad],
    )
    keepers = ops.keepers() if not walk.checkpointed else {}
    return _Layer(
        stretch=stretch,
        out=out,
        given=shared,
        kept=frozenset([t for t in tensors if t in keepers]),
        pinned=frozenset([t for t in tensors if t in ops.pinned()]),
    )


def _leaf(walk: _Walk, given: Given) -> Tensor | None:
    """What is shared and a leaf of the graph, counted as such: checkpointing makes the empty bias one."""
    return given.zeros if walk.checkpointed else None


def _tail(walk: _Walk, x: Tensor, beside_bytes: int, *, last: bool) -> tuple[Tensor, Stretch]:
    """Final norm and dropout, for the head also times a number; what comes before that is a variable."""
    ops, start = walk.operations(), Tensor(x.numel, x.element, x.needs_grad)
    normed = t5_norm(ops, start, walk.form.outer_norms[-1 if last else 0])
    hidden = ops.dropout(normed, walk.shape.hidden_dropout)
    scaled = ops.scaled(hidden) if last and walk.shape.scaled_head_input else hidden
    stretch = stretch_of(ops, None, scaled, accumulates=walk.accumulates)
    stretch = replace(stretch, beside_bytes=beside_bytes + start.size_bytes)
    if scaled is not hidden:
        stretch = replace(stretch, copied_bytes=hidden.size_bytes)
    return Tensor(scaled.numel, scaled.element, scaled.needs_grad), stretch


def _held(stretch: Stretch, memory: Tensor, *, pinned: bool, kept: bool) -> Stretch:
    """The encoder's last stretch with its output: held to the end, by the decoder's layers, or by neither."""
    size_bytes = memory.size_bytes
    if pinned:
        return replace(stretch, pinned_bytes=size_bytes)
    if kept:
        return replace(stretch, kept_bytes=stretch.kept_bytes + size_bytes)
    return replace(stretch, copied_bytes=size_bytes)


def _kept_beside(stretch: Stretch, size_bytes: int, *, to_its_end: bool) -> Stretch:
    """The stretch with more that waits for it."""
    moment = stretch.backward
    if moment is not None and to_its_end:
        moment = Moment(moment.kept_bytes + size_bytes, moment.temporaries_bytes, moment.gradients_bytes)
    return replace(stretch, kept_bytes=stretch.kept_bytes + size_bytes, backward=moment)


def _behind(stretches: Iterable[Stretch], size_bytes: int) -> Iterator[Stretch]:
    """The stretches with gradients beside them that were made before theirs and stay."""
    for stretch in stretches:
        moment = stretch.backward
        if moment is not None:
            temporaries = moment.temporaries_bytes + size_bytes
            stretch = replace(
                stretch, backward=Moment(moment.kept_bytes, temporaries, moment.gradients_bytes)
            )
        yield stretch


def _masks_bytes(walk: _Walk) -> int:
    """The decoder's mask [b, 1, s, s] under eager attention, in the embeddings' type."""
    training = walk.setup.training
    if training.attention != "eager":
        return 0
    return block_bytes(training.micro_batch_size * training.seq_len**2 * walk.blank.recipe.base)
