"""The whole model as stretches of equal layers, each with what it keeps and its worst moment."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from functools import partial

from planner.batching import has_masks, row_shape, takes_lengths, unpads
from planner.catalog.gpus import multiprocessors
from planner.checkpointing import checkpoints_some
from planner.estimate.attention_plan import attention_plan
from planner.estimate.blocks import embedded, layer, prefix_of
from planner.estimate.forms import LayerForm, ModelForm, model_form
from planner.estimate.fused_loss import fused_loss_memory
from planner.estimate.liger_operations import LigerOperations
from planner.estimate.loss import chunked_loss_memory, hidden_for_head, loss_memory
from planner.estimate.masks import shares_mask
from planner.estimate.nodes import Moment, Tensor
from planner.estimate.operations import Operations
from planner.estimate.peft_form import peft_form
from planner.estimate.recipes import recipe_of
from planner.estimate.resident import block_bytes
from planner.estimate.seq2seq import seq2seq_stack
from planner.estimate.stretches import Stack, Stretch, stretch_of
from planner.estimate.traits import TRAITS
from planner.liger import fuses_experts, replaced
from planner.losses import LOSS_CHUNK_TOKENS
from planner.model import Architecture
from planner.spec import LoRA, PeftConfig, PeftOfSize, Setup, Training
from planner.targets import adapted_weights

__all__ = ["has_formulas", "stack"]


def has_formulas(setup: Setup) -> bool:
    """Whether the activations of the setup have formulas; others need `simulate`."""
    shape = setup.model.architecture
    return (
        shape is not None
        and shape.family in TRAITS
        and not isinstance(setup.method, PeftOfSize)
        and (not isinstance(setup.method, PeftConfig) or _has_form(setup, setup.method))
        and not fuses_experts(setup.training.kernels, setup.model)
        and not (shape.encoder_layers and _unknown_seq2seq(setup))
    )


def _unknown_seq2seq(setup: Setup) -> bool:
    return _changes_tables(setup) or _pads_biases(setup.training) or checkpoints_some(setup.training)


def _pads_biases(training: Training) -> bool:
    """Whether padding makes a fused kernel's bias one for each sample; eager attention has that anyway."""
    return training.batching == "padded" and training.attention != "eager"


def _changes_tables(setup: Setup) -> bool:
    """Whether LoRA goes on an embedding, or a copy of more than norms is trained."""
    method = setup.method
    if isinstance(method, LoRA):
        return any(t.kind == "embedding" for t in adapted_weights(setup.model, method.target_modules))
    form = peft_form(setup.model, method) if isinstance(method, PeftConfig) else None
    if form is None:
        return False
    adapted = any(change.weight.kind == "embedding" for change in form.changes)
    return adapted or any(t.kind != "norm" for t in form.saved)


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
    if shape.encoder_layers:
        blank = _operations(setup, shape)
        return seq2seq_stack(setup, form, blank, inputs_bytes=inputs_bytes, accumulates=accumulates)
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
    rows, given, x = embedded(ops, form, shape, inputs_need_grad=hooked, prompts=prompts)
    leaf_is_input, embeddings = rows is x and not training.checkpoint_offload, x
    # `inputs_embeds` in the model's forward: the tokens' own, or what is made of them at once
    named = shape.embedding_scale or TRAITS[shape.family].masked_head
    variable, kept = (x if named else given), given in ops.keepers()
    stretches = [stretch_of(ops, None, x, accumulates=accumulates)]
    walked: dict[tuple[int, bool, int, bool], tuple[Tensor, Stretch]] = {}
    every = training.checkpoint_every
    number = 0
    for layer_form, count in form.runs:
        left = count
        while left:
            checkpointed = training.activation_checkpointing and number % every == 0
            key = (id(layer_form), x.needs_grad, x.element, checkpointed)
            if key not in walked:
                walked[key] = _layer(
                    setup, shape, layer_form, x, accumulates=accumulates, checkpointed=checkpointed
                )
            out, stretch = walked[key]
            # the first trained layer differs from those after it
            alike = left if (out.needs_grad, out.element) == (x.needs_grad, x.element) else 1
            if every > 1:  # up to the next checkpoint
                alike = min(alike, 1 if checkpointed else every - number % every)
            if number + alike == 1:  # no layer before it whose answer a variable holds
                stretch = replace(stretch, beside_bytes=0)
            number += alike
            stretches.append(stretch if alike == 1 else replace(stretch, count=alike))
            left -= alike
            x = out
    if variable is embeddings:
        kept = stretches[1].input_bytes > 0 and not stretches[1].offloaded_bytes
    ops, start = _operations(setup, shape), _input(x)
    hidden = hidden_for_head(ops, start, form, shape)
    head, memory = _operations(setup, shape), loss_memory
    if training.loss == "chunked":
        head.tokens = min(head.tokens, LOSS_CHUNK_TOKENS)
        memory = chunked_loss_memory
    if training.loss == "liger":
        loss = fused_loss_memory(head, hidden, form, setup)
    else:
        loss = memory(head, _input(hidden), form, shape, training, accumulates=accumulates)
    stretches.append(stretch_of(ops, start, hidden, accumulates=accumulates, keeps_output=loss.input_kept))
    return Stack(
        stretches=tuple(stretches),
        loss=loss,
        inputs_bytes=inputs_bytes,
        tables_bytes=_tables_bytes(shape, row_shape(training)[1], recipe_of(setup).base),
        masks_kept=_keeps_masks(setup, shape, form),
        masks_bytes=_masks_bytes(shape, training, recipe_of(setup).base, ops.prefix),
        hidden_bytes=0 if loss.input_kept else hidden.size_bytes,
        embedded_bytes=0 if kept or (variable is rows and hooked) else variable.size_bytes,
        leaf_bytes=rows.size_bytes if hooked else 0,
        leaf_is_input=leaf_is_input,
        embedded_is_input=variable is embeddings,
        embedded_stays=prompts > 0,
        keeps_graph=training.loop == "plain",
        handed_on_bytes=loss.kept_bytes if training.loss == "liger" and _writes_over(ops) else 0,
    )


def _operations(setup: Setup, shape: Architecture) -> Operations:
    training = setup.training
    rows, length = row_shape(training)
    prefix = _virtual_tokens(setup, "prefix_tuning")
    what = replaced(training.kernels, setup.model)
    card = multiprocessors(setup.gpu)
    kind = partial(LigerOperations, what=what, multiprocessors=card) if what else Operations
    return kind(
        rows * length,
        length,
        recipe_of(setup),
        TRAITS[shape.family],
        prefix=prefix,
        fp16=training.precision.startswith("fp16"),
    )


def _writes_over(ops: Operations) -> bool:
    """Whether the last norm's backward pass writes over the gradient that comes in."""
    return isinstance(ops, LigerOperations) and ops.what.last_in_place


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
    width = shape.rotary_dim or shape.head_dim
    return 2 * block_bytes(seq_len * (width // 2 if TRAITS[shape.family].rotary_halves else width) * element)


def _masks_bytes(shape: Architecture, training: Training, element: int, prefix: int) -> int:
    """Masks [b, 1, s, s], one for each kind of layer; transformers 5.23, masking_utils.py.

    Eager attention always has them, in the embeddings' type. Fused attention has one of bools where a
    sliding window is not longer than the sequence, or keys of a prefix come first; where samples are padded
    or packed, one for each kind of layer.
    """
    b, s = row_shape(training)
    sliding = len(shape.sliding_layers)
    alibi = TRAITS[shape.family].always_masked and shape.positions == "alibi"
    if alibi:  # joined with the mask, for each head
        return block_bytes(b * shape.num_attention_heads * s * s * element)
    if training.attention == "eager" or not shape.sdpa:
        kinds = (sliding > 0) + (sliding < shape.num_layers)
        return kinds * block_bytes(b * s * (s + prefix) * element)
    if takes_lengths(training):
        return 0
    if unpads(training):  # which tokens are no padding
        return ((sliding > 0) + (sliding < shape.num_layers)) * block_bytes(b * s)
    if has_masks(training):
        return ((sliding > 0) + (sliding < shape.num_layers)) * block_bytes(b * s * (s + prefix))
    if prefix or TRAITS[shape.family].always_masked:
        return block_bytes(b * s * (s + prefix))
    if shape.sliding_window is not None and sliding and s >= shape.sliding_window:
        return block_bytes(b * s * s)
    return 0


def _keeps_masks(setup: Setup, shape: Architecture, form: ModelForm) -> bool:
    """Whether masks wait for the backward pass: with checkpoints, or where a kernel keeps the very tensor."""
    training, recipe = setup.training, recipe_of(setup)
    if training.activation_checkpointing and not _copies_masks(setup, shape):
        return True
    if training.activation_checkpointing and training.checkpoint_every == 1:
        return False
    plan = attention_plan(shape, form.runs[0][0], setup, recipe.compute)
    return shares_mask(plan, recipe.base, recipe.compute)


def _copies_masks(setup: Setup, shape: Architecture) -> bool:
    """Whether each checkpoint has a copy of the mask on the host, beside its layer's input."""
    return setup.training.checkpoint_offload and TRAITS[shape.family].mask_by_place


def _layer(
    setup: Setup, shape: Architecture, form: LayerForm, x: Tensor, *, accumulates: bool, checkpointed: bool
) -> tuple[Tensor, Stretch]:
    """One layer and its output."""
    ops, start = _operations(setup, shape), _input(x)
    out = layer(ops, start, shape, form, setup)
    stretch = stretch_of(
        ops,
        start,
        out,
        repeats=shape.num_layers,
        accumulates=accumulates,
        checkpointed=checkpointed,
        offloaded=checkpointed and setup.training.checkpoint_offload,
    )
    if checkpointed and ops.traits.weights_returned:
        returned = sum([weights.size_bytes for weights in ops.handed_out])
        stretch = replace(stretch, beside_bytes=returned)
    if stretch.offloaded_bytes and stretch.backward is not None and _copies_masks(setup, shape):
        mask_bytes = _masks_bytes(shape, setup.training, recipe_of(setup).base, ops.prefix)
        moment = stretch.backward
        stretch = replace(
            stretch,
            backward=Moment(
                moment.kept_bytes + mask_bytes, moment.temporaries_bytes, moment.gradients_bytes
            ),
            offloaded_bytes=stretch.offloaded_bytes + mask_bytes,
        )
    return out, stretch


