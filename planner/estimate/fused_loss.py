"""Liger's fused linear cross-entropy: head, loss and both gradients in the forward pass.

Letters: T = b s tokens, `n` of them at a time, `h` hidden, `v` vocabulary. Source: liger_kernel 0.8.5,
ops/fused_linear_cross_entropy.py, written out in planner/training/liger.py.
"""

from __future__ import annotations

from planner.estimate.forms import ModelForm
from planner.estimate.loss import LossMemory
from planner.estimate.nodes import Moment, Tensor
from planner.estimate.operations import Operations
from planner.estimate.resident import block_bytes
from planner.losses import adapted_head, liger_chunk_tokens
from planner.spec import Setup, Training

__all__ = ["fused_loss_memory"]

_DEFAULT_CAPABILITY = (8, 0)  # as in estimate/attention.py, where no GPU is named


def fused_loss_memory(ops: Operations, hidden: Tensor, form: ModelForm, setup: Setup) -> LossMemory:
    """The gradient of the head's input [T, h] is kept, that of its weight [v, h] where it is trained.

    The logits of n tokens are made in the hidden states' type and become their gradient in place. Raises
    SetupError where a method has put something around the head.
    """
    head = form.head
    if head.rank or head.dora or head.scaled:
        raise adapted_head(setup.model.id)
    tokens = hidden.numel // head.inputs
    of_rows = block_bytes(hidden.numel * hidden.element)
    trained = head.weight_trained and hidden.needs_grad
    of_weight = block_bytes(head.inputs * head.outputs * ops.recipe.base) if trained else 0
    beside = _beside_bytes(setup.training, tokens)
    chunk = _Chunk(ops, hidden, form, setup)
    chunk_bytes = chunk.cast_bytes() if ops.recipe.autocast else chunk.own_bytes()
    return LossMemory(
        forward_peak_bytes=of_rows + beside + chunk_bytes,
        kept_bytes=of_rows,
        backward=Moment(0, 0, of_weight),
        multiplied=Moment(0, 0, 0),  # the backward pass has no product before the layers'
        weight_bytes=of_weight,
        waiting_bytes=of_weight if form.head_table_trained else 0,
        input_kept=False,
        output_bytes=0,
        early_bytes=of_weight,
    )


def _beside_bytes(training: Training, tokens: int) -> int:
    """Labels padded by one for each sample, cut to the next tokens (a copy where there are several samples),
    which of them are asked for, and the loss of each in fp32."""
    batch = training.micro_batch_size
    shifted = block_bytes(8 * tokens) if batch > 1 else 0
    return block_bytes(8 * (tokens + batch)) + shifted + block_bytes(tokens) + block_bytes(4 * tokens)


class _Chunk:
    """What is alive beside the gradients while n tokens have logits."""

    def __init__(self, ops: Operations, hidden: Tensor, form: ModelForm, setup: Setup) -> None:
        head, recipe = form.head, ops.recipe
        tokens = hidden.numel // head.inputs
        element = recipe.compute if recipe.autocast else hidden.element
        capability = (setup.gpu.capability if setup.gpu else None) or _DEFAULT_CAPABILITY
        size = liger_chunk_tokens(tokens, head.outputs, head.inputs)
        self.trained = head.weight_trained and hidden.needs_grad
        self.logits = block_bytes(size * head.outputs * element)
        self.rows = block_bytes(size * head.inputs * element)
        self.rows_cast = hidden.element != element
        self.weight = block_bytes(head.inputs * head.outputs * element)
        second = min(size, tokens - size)
        self.second_rows = block_bytes(second * head.inputs * element)
        self.second_logits = block_bytes(second * head.outputs * element)
        self.in_place = element == 2 and capability >= (8, 0)
        # what is added to the gradient where it is not summed in place: the product and its fp32 copy
        self.product = self.weight + (block_bytes(head.inputs * head.outputs * 4) if element != 4 else 0)

    def own_bytes(self) -> int:
        """Without casts: one tensor for the logits of every chunk, products written in place."""
        return self.logits + (self.product if self.trained and not self.in_place else 0)

    def cast_bytes(self) -> int:
        """Under autocast: n tokens and the weight cast for the logits, the weight for the tokens' gradient.

        The weight's second copy is cached to the end of the forward pass where it is trained; the first is of
        a view, which is not.
        """
        rows = self.rows if self.rows_cast else 0
        first = rows + self.weight + self.logits
        of_rows = self.logits + self.weight + self.rows
        if not self.trained:
            return max(first, of_rows)
        summed = rows if self.in_place else max(rows + self.weight, self.product)
        next_rows = self.second_rows if self.rows_cast else 0
        second = 2 * self.weight + next_rows + self.second_logits if self.second_logits else 0
        return max(first, of_rows, self.logits + self.weight + summed, second)
