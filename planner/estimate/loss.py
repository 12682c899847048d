"""Output head and loss: often the largest tensors of a step.

Letters: T = b s tokens, `h` hidden, `v` vocabulary. Source: transformers 5.23, loss/loss_utils.py and the
models' `forward`; torch 2.13, aten/src/ATen/native/cuda/SoftMax.cu and Loss.cu.
"""

from __future__ import annotations

from dataclasses import dataclass

from planner.estimate.forms import ModelForm
from planner.estimate.nodes import Moment, Tensor
from planner.estimate.operations import Operations
from planner.estimate.resident import block_bytes
from planner.model import Architecture
from planner.spec import Training

__all__ = ["LossMemory", "chunked_loss_memory", "hidden_for_head", "loss_memory"]

@dataclass(frozen=True, kw_only=True, slots=True)
class LossMemory:
    """Bytes of head and loss, those of the head's input not counted.

    `input_kept`: the head keeps its input [T, h] for its weight's gradient. `weight_bytes` are the
    gradients it leaves, `waiting_bytes` of them in the engine until a tied embedding's come; `backward`
    is its worst moment, `multiplied` that since its first product; `output_bytes` are the logits in the
    model's output, which the plain loop holds to the end of the step and HF Trainer's gives up with the
    forward pass. `early_bytes`: gradients of the weight that the forward pass makes, beside its peak and what
    it keeps.
    """

    forward_peak_bytes: int
    kept_bytes: int
    backward: Moment
    weight_bytes: int
    input_kept: bool
    output_bytes: int
    multiplied: Moment
    waiting_bytes: int = 0
    early_bytes: int = 0


def hidden_for_head(ops: Operations, x: Tensor, form: ModelForm, shape: Architecture) -> Tensor:
    """Final norm, or the transformation in front of a masked language model's head."""
    if ops.traits.masked_head:
        x = ops.activation(ops.linear(x, form.outer_linears[-1]), "gelu")
        return ops.norm(x, form.outer_norms[-1], shape.norm)
    if form.outer_norms:
        x = ops.last_norm(x, form.outer_norms[-1], shape.norm)
    for projection in form.outer_linears:
        if projection.name == "project_out":  # OPT-350m
            x = ops.linear(x, projection)
    return x


def loss_memory(
    ops: Operations,
    hidden: Tensor,
    form: ModelForm,
    shape: Architecture,
    training: Training,
    *,
    accumulates: bool,
) -> LossMemory:
    """Logits [T, v] in the compute type, their fp32 copy, log-softmax [T, v] in fp32 (kept), the loss.

    Forward: logits, copy and log-softmax together. Backward: log-softmax, the gradient that the loss
    hands back and the gradient of the logits, all fp32, beside the logits of the model's output: a loop that
    says `outputs = model(**batch)` holds them. Under autocast accelerate makes them fp32.
    """
    logits = ops.linear(hidden, form.head)
    if ops.traits.scaled_logits:
        logits = ops.scaled(logits)
    if shape.logit_softcap is not None:
        inner = ops.scaled(logits)
        logits = ops.scaled(ops.op((inner,), inner.numel, inner.element, keeps_output=True))
    own_type = ops.traits.loss_in_own_type and not ops.recipe.autocast
    single = logits if own_type else ops.cast(logits, 4)
    logarithms = ops.op((single,), single.numel, single.element, keeps_output=True)
    keepers = ops.keepers()
    kept = sum([owner.size_bytes for owner in keepers if owner is not hidden])
    held = logits.size_bytes if single is not logits else 0
    output = block_bytes(4 * logits.numel) if ops.recipe.autocast else logits.size_bytes
    weights = sum([node.weight_bytes for node in ops.nodes])
    moment, _ = ops.backward_moment(
        keepers, hidden, logarithms, accumulates=accumulates, head_bytes=_product_bytes(ops, form)
    )
    return LossMemory(
        forward_peak_bytes=kept + held + single.size_bytes,
        kept_bytes=kept,
        backward=moment,
        multiplied=ops.multiplied or moment,
        weight_bytes=weights,
        waiting_bytes=weights if form.head_table_trained else 0,
        input_kept=hidden in keepers,
        output_bytes=output if training.loop == "plain" else 0,
    )


def chunked_loss_memory(
    ops: Operations,
    hidden: Tensor,
    form: ModelForm,
    shape: Architecture,
    training: Training,
    *,
    accumulates: bool,
) -> LossMemory:
    """Head and loss on n = 1,024 tokens at a time, each chunk made again in the backward pass.

    `ops` are of n tokens; planner/training/losses.py. Kept is the head's input alone, no logits. Backward, at
    the chunk that comes last: what `loss_memory` says of n tokens, beside the gradients of all other tokens'
    inputs [T - n, h], and the sum of the weight's gradients so far. Under autocast all chunks share one
    16-bit copy of the weight: it lives through the forward pass, its gradients are summed in 16 bits.
    """
    some = Tensor(ops.tokens * form.head.inputs, hidden.element, hidden.needs_grad)
    chunk = loss_memory(ops, some, form, shape, training, accumulates=accumulates)
    others = block_bytes((hidden.numel - some.numel) * hidden.element) if hidden.needs_grad else 0
    product = chunk.weight_bytes
    if ops.recipe.autocast:
        product = _product_bytes(ops, form) if form.head.weight_trained else 0
    summed = product if hidden.numel > some.numel else 0
    copies = [node.outputs[0] for node in ops.nodes if not node.inputs] if ops.copied_bytes else []
    moment = chunk.backward
    again_bytes = ops.forward_peak_bytes(ops.keepers(), recomputed=True)
    if again_bytes > moment.total_bytes:
        moment = Moment(again_bytes, 0, 0)
    moment = Moment(
        moment.kept_bytes, moment.temporaries_bytes + others, moment.gradients_bytes + summed
    )
    cast = Moment(0, others + some.size_bytes + product, chunk.weight_bytes)
    if summed and ops.recipe.autocast and cast.total_bytes > moment.total_bytes:
        moment = cast
    return LossMemory(
        forward_peak_bytes=ops.forward_peak_bytes(dict.fromkeys(copies, 1)),
        kept_bytes=0,
        backward=moment,
        multiplied=moment,  # the first chunk's head is made again
        weight_bytes=chunk.weight_bytes,
        waiting_bytes=chunk.waiting_bytes,
        input_kept=True,
        output_bytes=0,
    )


def _product_bytes(ops: Operations, form: ModelForm) -> int:
    """The gradient of the output weight as the product that makes it: in the compute type under autocast."""
    element = ops.recipe.compute if ops.recipe.autocast else ops.recipe.base
    return block_bytes(form.head.inputs * form.head.outputs * element)
