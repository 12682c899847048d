"""The whole model as stretches of equal layers, each with what it keeps and its worst moment."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace

from planner.batching import has_masks, row_shape, takes_lengths
from planner.estimate.blocks import embedded, layer, prefix_of
from planner.estimate.forms import LayerForm, model_form
from planner.estimate.loss import LossMemory, chunked_loss_memory, hidden_for_head, loss_memory
from planner.estimate.operations import Operations
from planner.estimate.peft_form import peft_form
from planner.estimate.recipes import recipe_of
from planner.estimate.resident import block_bytes, packed_bytes
from planner.estimate.tape import Moment, Tensor
from planner.estimate.traits import TRAITS
from planner.losses import LOSS_CHUNK_TOKENS
from planner.model import Architecture
from planner.spec import PeftConfig, PeftOfSize, Setup, Training
from planner.units import MIB

__all__ = ["Stack", "Stretch", "has_formulas", "stack"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stretch:
    """`count` equal layers; bytes of one of them.

    `kept_bytes` wait for its backward pass, of which `input_bytes` stay to its end; `backward` is its worst
    moment without them, None where nothing in it or before it is trained; `weight_bytes` are the
    gradients it leaves. `copied_bytes` are copies of weights that autocast holds through the forward pass
    though a checkpoint drops them. `pinned_bytes` stay to the end of the step.
    """

    count: int
    kept_bytes: int
    input_bytes: int
    forward_peak_bytes: int
    backward: Moment | None
    weight_bytes: int
    copied_bytes: int = 0
    pinned_bytes: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """Stretches in the order of the forward pass, then head and loss.

    `inputs_bytes` are token ids and labels, `tables_bytes` cos and sin of the positions, `masks_bytes`
    attention masks, which only checkpoints hold after the forward pass; `hidden_bytes` the head's input.
    `leaf_bytes`: the token embeddings' output where checkpointing asks for its gradient. The graph holds
    both to its end; `leaf_is_input`: the first layer keeps it anyway. `keeps_graph`: the loop holds the loss
    and with it the graph to the end of the step.
    """

    stretches: tuple[Stretch, ...]
    loss: LossMemory
    inputs_bytes: int
    tables_bytes: int
    masks_bytes: int
    hidden_bytes: int
    leaf_bytes: int
    leaf_is_input: bool
    keeps_graph: bool

    @property
    def pinned_bytes(self) -> int:
        """What nodes of the graph hold to its end."""
        return sum([stretch.pinned_bytes * stretch.count for stretch in self.stretches])

    @property
    def left_bytes(self) -> int:
        """What the loop still holds in the optimizer step, logits apart."""
        return self.inputs_bytes + (2 * self.leaf_bytes + self.pinned_bytes if self.keeps_graph else 0)


def has_formulas(setup: Setup) -> bool:
    """Whether the activations of the setup have formulas; others need `simulate`."""
    shape = setup.model.architecture
    return (
        shape is not None
        and shape.family in TRAITS
        and not (shape.family == "falcon" and (shape.positions == "alibi" or not shape.parallel_residual))
        and not isinstance(setup.method, PeftOfSize)
        and (not isinstance(setup.method, PeftConfig) or _has_form(setup, setup.method))
    )


def _has_form(setup: Setup, method: PeftConfig) -> bool:
    """Not where ranks share the weights, nor a prefix with checkpoints, which peft refuses."""
    form = peft_form(setup.model, method)
    if form is None or setup.sharding.shard_ranks > 1:
        return False
    return form.kind != "prefix_tuning" or not setup.training.activation_checkpointing


def _virtual_tokens(setup: Setup, kind: str) -> int:
    """How many a method of this kind puts before a sample's tokens, 0 for others."""
    form = peft_form(setup.model, setup.method) if isinstance(setup.method, PeftConfig) else None
    return form.virtual_tokens if form is not None and form.kind == kind else 0


def _lengthened(setup: Setup, tokens: int) -> Setup:
    """The same run over longer samples; nothing is checked again."""
    longer = copy(setup)
    training = replace(setup.training, seq_len=setup.training.seq_len + tokens)
    object.__setattr__(longer, "training", training)
    return longer


def stack(setup: Setup, *, accumulates: bool) -> Stack:
    """All stretches of the setup. `accumulates`: gradients of an earlier micro batch are there."""
    shape = setup.model.architecture
    assert shape is not None  # the caller asks for closed-form families only
    form = model_form(setup)
    inputs_bytes = _inputs_bytes(setup.training)
    prompts = _virtual_tokens(setup, "prompt_tuning")
    if prompts:
        setup = _lengthened(setup, prompts)
    # With checkpointing the token embeddings' output is made to require gradients: transformers 5.23,
    # modeling_utils.py, `activation_checkpointing_enable`. Where they are frozen it is a leaf of the graph.
    training = setup.training
    hooked = training.activation_checkpointing and not form.tables[0].trained
    ops = _operations(setup, shape)
    if ops.prefix:
        prefix_of(ops, shape)
    rows, x = embedded(ops, form, shape, inputs_need_grad=hooked, prompts=prompts)
    leaf_is_input = rows is x
    stretches = [_stretch(ops, None, x, accumulates=accumulates)]
    walked: dict[tuple[int, bool, int], tuple[Tensor, Stretch]] = {}
    for layer_form, count in form.runs:
        left = count
        while left:
            key = (id(layer_form), x.needs_grad, x.element)
            if key not in walked:
                walked[key] = _layer(setup, shape, layer_form, x, accumulates=accumulates)
            out, stretch = walked[key]
            # the first trained layer differs from those after it
            alike = left if (out.needs_grad, out.element) == (x.needs_grad, x.element) else 1
            stretches.append(stretch if alike == 1 else replace(stretch, count=alike))
            left -= alike
            x = out
    ops, start = _operations(setup, shape), _input(x)
    hidden = hidden_for_head(ops, start, form, shape)
    head, memory = _operations(setup, shape), loss_memory
    if training.loss == "chunked":
        head.tokens = min(head.tokens, LOSS_CHUNK_TOKENS)
        memory = chunked_loss_memory
    loss = memory(head, _input(hidden), form, shape, training, accumulates=accumulates)
    stretches.append(_stretch(ops, start, hidden, accumulates=accumulates, keeps_output=loss.input_kept))
    return Stack(
        stretches=tuple(stretches),
        loss=loss,
        inputs_bytes=inputs_bytes,
        tables_bytes=_tables_bytes(shape, row_shape(training)[1], recipe_of(setup).base),
        masks_bytes=_masks_bytes(shape, training, recipe_of(setup).base, ops.prefix),
        hidden_bytes=0 if loss.input_kept else hidden.size_bytes,
        leaf_bytes=rows.size_bytes if hooked else 0,
        leaf_is_input=leaf_is_input,
        keeps_graph=training.loop == "plain",
    )


def _operations(setup: Setup, shape: Architecture) -> Operations:
    training = setup.training
    rows, length = row_shape(training)
    prefix = _virtual_tokens(setup, "prefix_tuning")
    return Operations(rows * length, length, recipe_of(setup), TRAITS[shape.family], prefix=prefix)


def _input(x: Tensor) -> Tensor:
    """x as the input of the next stretch."""
    return Tensor(x.numel, x.element, x.needs_grad)


def _inputs_bytes(training: Training) -> int:
    """Token ids and labels, and the mask of padding or the positions of packed samples (int64).

    Flash attention on a packed row takes where samples begin, twice. HF Trainer's loop has the tensors of
    every micro batch of the step.
    """
    batches = training.gradient_accumulation_steps if training.loop == "trainer" else 1
    each = 2 if training.batching == "full" else 3
    lengths = 2 * block_bytes(4 * (training.micro_batch_size + 1)) if takes_lengths(training) else 0
    return batches * (each * block_bytes(8 * training.micro_batch_size * training.seq_len) + lengths)


def _tables_bytes(shape: Architecture, seq_len: int, element: int) -> int:
    """cos and sin [1, s, d] in the embeddings' type, made once and kept by every layer."""
    if shape.positions != "rope":
        return 0
    return 2 * block_bytes(seq_len * (shape.rotary_dim or shape.head_dim) * element)


def _masks_bytes(shape: Architecture, training: Training, element: int, prefix: int) -> int:
    """Masks [b, 1, s, s], one for each kind of layer; transformers 5.23, masking_utils.py.

    Eager attention always has them, in the embeddings' type. Fused attention has one of bools where a
    sliding window is shorter than the sequence, or keys of a prefix come first; where samples are padded or
    packed, one for each kind of layer.
    """
    b, s = row_shape(training)
    sliding = len(shape.sliding_layers)
    if training.attention == "eager" or not shape.sdpa:
        kinds = (sliding > 0) + (sliding < shape.num_layers)
        return kinds * block_bytes(b * s * (s + prefix) * element)
    if takes_lengths(training):
        return 0
    if has_masks(training):
        return ((sliding > 0) + (sliding < shape.num_layers)) * block_bytes(b * s * (s + prefix))
    if prefix or TRAITS[shape.family].always_masked:
        return block_bytes(b * s * (s + prefix))
    if shape.sliding_window is not None and sliding and s > shape.sliding_window:
        return block_bytes(b * s * s)
    return 0


def _layer(
    setup: Setup, shape: Architecture, form: LayerForm, x: Tensor, *, accumulates: bool
) -> tuple[Tensor, Stretch]:
    """One layer and its output."""
    ops, start = _operations(setup, shape), _input(x)
    out = layer(ops, start, shape, form, setup)
    stretch = _stretch(
        ops,
        start,
        out,
        repeats=shape.num_layers,
        accumulates=accumulates,
        checkpointed=setup.training.activation_checkpointing,
    )
    return out, stretch


def _stretch(
    ops: Operations,
    start: Tensor | None,
    out: Tensor,
    *,
    accumulates: bool,
    repeats: int = 1,
    checkpointed: bool = False,
    keeps_output: bool = False,
) -> Stretch:
    """What the tape comes to, `repeats` times in the model.

    `checkpointed`: only the input is kept, the rest is made again.
    """
    keepers = ops.keepers()
    keepers.pop(out.owner, None)  # the next stretch counts its input
    pinned = ops.pinned()
    held = {**keepers, **dict.fromkeys(pinned, 1)} if pinned else keepers
    forward_peak = ops.forward_peak_bytes(dict.fromkeys(pinned, 1) if checkpointed else held)
    if not out.needs_grad:
        return Stretch(
            count=1,
            kept_bytes=0,
            input_bytes=0,
            forward_peak_bytes=forward_peak,
            backward=None,
            weight_bytes=0,
        )
    if not checkpointed:
        for owner in pinned:
            keepers.pop(owner, None)
    input_bytes = 0
    if start is not None and (checkpointed or start in keepers) and start not in pinned:
        input_bytes = start.size_bytes
    kept = input_bytes + (out.size_bytes if keeps_output else 0)
    moment, asking = ops.backward_moment(keepers, start, out, accumulates=accumulates)
    if checkpointed:
        again = ops.forward_peak_bytes(held, recomputed=True)
        if again + asking > moment.total_bytes:
            moment = Moment(again, asking, 0)
    else:
        kept += _kept_bytes([owner.size_bytes for owner in keepers if owner is not start], repeats)
    return Stretch(
        count=1,
        kept_bytes=kept,
        input_bytes=input_bytes,
        forward_peak_bytes=forward_peak,
        backward=moment,
        weight_bytes=sum([node.weight_bytes for node in ops.nodes]),
        copied_bytes=ops.copied_bytes if checkpointed or ops.prefix else 0,
        pinned_bytes=_kept_bytes([owner.size_bytes for owner in pinned], repeats),
    )


def _kept_bytes(sizes: list[int], repeats: int) -> int:
    """What the tensors that one layer keeps count for, averaged over a few layers packed in segments."""
    if repeats == 1 or not any(MIB < size < 10 * MIB for size in sizes):
        return sum(sizes)
    layers = min(repeats, _PACKED_LAYERS)
    return packed_bytes(sizes * layers) // layers


_PACKED_LAYERS = 4  # after so many the pattern repeats: a segment of 20 MiB holds 2 to 19 of them
