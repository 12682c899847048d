"""Liger's fused linear cross-entropy: head, loss and their gradients together, in the forward pass.

On a CUDA device the library itself runs. Elsewhere its steps are written out in torch: the same tensors in
the same order, with kernels in torch's words on the CPU and none on `meta`, where
`planner.simulate.liger_forms` says what a card chooses. Source: liger_kernel 0.8.5,
ops/fused_linear_cross_entropy.py and transformers/model/ (llama.py, gemma2.py, loss_utils.py).
"""

from __future__ import annotations

import importlib.util
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import TrainableTokensWrapper
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from planner.errors import SetupError
from planner.liger import liger_switches
from planner.losses import adapted_head, liger_chunk_tokens
from planner.spec import Training

__all__ = ["fused_loss", "refuse_adapted_head", "require_liger", "with_fused_loss"]


def require_liger(training: Training, device: torch.device) -> None:
    """Refuse a CUDA device where the library is asked for and not installed. Raises SetupError."""
    asked = [name for name in ("loss", "kernels") if getattr(training, name) == "liger"]
    if asked and device.type == "cuda" and importlib.util.find_spec("liger_kernel") is None:
        raise SetupError(
            f"{asked[0]} liger needs liger-kernel on a CUDA device, which is not installed; "
            "install it with: pip install -r requirements-liger.txt"
        )


def refuse_adapted_head(net: Any, model: str) -> None:
    """Refuse an output layer that peft has put something around. Raises SetupError."""
    if isinstance(net.get_output_embeddings(), BaseTunerLayer | TrainableTokensWrapper):
        raise adapted_head(model)


def with_fused_loss(net: nn.Module, device: torch.device) -> nn.Module:
    """The causal language model with a forward pass that gives the fused loss alone, changed in place.

    On CUDA as HF Trainer's use_liger_kernel does it; the other kernels are planner.training.liger_kernels'.
    """
    if device.type == "cuda":
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=net, **liger_switches("torch", "liger"))
        return net
    net.forward = MethodType(_forward, net)
    return net


def _forward(self: Any, labels: torch.Tensor, num_items_in_batch: Any = None, **inputs: Any) -> Any:
    """The decoder, then the fused loss; the output holds no logits."""
    hidden = self.base_model(**inputs).last_hidden_state
    weight = self.get_output_embeddings().weight
    softcap = getattr(self.config, "final_logit_softcapping", None)
    return CausalLMOutput(loss=fused_loss(hidden, weight, labels, num_items_in_batch, softcap))


def fused_loss(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, items: Any, softcap: float | None = None
) -> torch.Tensor:
    """The mean cross-entropy of each next token, or its sum over `items`; the head has no bias.

    `hidden` [b, s, h], `weight` [v, h], `labels` [b, s] with -100 for what is not asked for.
    """
    padded = F.pad(labels, (0, 1), value=-100)
    targets = padded[..., 1:].contiguous()
    rows = hidden.view(-1, hidden.shape[-1])
    apply: Any = _FusedLoss.apply
    loss: torch.Tensor = apply(rows, weight, targets.view(-1), items is None, softcap)
    if items is not None:
        loss = loss / items
    return loss


class _FusedLoss(torch.autograd.Function):
    """Both gradients are made in the forward pass; the backward pass multiplies them by what comes down."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        mean: bool,
        softcap: float | None,
    ) -> torch.Tensor:
        loss, of_rows, of_weight = _loss_and_gradients(rows, weight, targets, mean, softcap)
        ctx.save_for_backward(of_rows.detach(), None if of_weight is None else of_weight.detach())
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        of_rows, of_weight = ctx.saved_tensors
        if not bool((gradient == torch.tensor(1.0, device=gradient.device)).all()):
            for each in (of_rows, of_weight):
                if each is not None:
                    each.mul_(gradient)
        return of_rows, of_weight, None, None, None


def _loss_and_gradients(
    rows: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, mean: bool, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The loss, the gradient of `rows` [T, h], and that of `weight` [v, h] where it is trained.

    The logits of some tokens at a time become their gradient in place.
    """
    tokens, width = rows.shape
    size = liger_chunk_tokens(tokens, weight.shape[0], width)
    of_rows = torch.zeros_like(rows)
    of_weight = torch.zeros_like(weight) if rows.requires_grad and weight.requires_grad else None
    losses = torch.zeros(tokens, dtype=torch.float32, device=rows.device)
    asked = targets != -100
    count = asked.sum().item()
    buffer = None
    if has_buffer(rows, weight):
        buffer = torch.empty((size, weight.shape[0]), dtype=rows.dtype, device=rows.device)
    for start in range(0, tokens, size):
        some, place = rows[start : start + size], of_rows[start : start + size]
        if buffer is not None:
            logits = buffer[: len(some)]
            torch.mm(some, weight.t(), out=logits)
        else:
            logits = some @ weight.t()
        found = losses[start : start + size]
        _cross_entropy_(logits, targets[start : start + size], found, count if mean else 1, softcap)
        if rows.requires_grad and buffer is not None:
            torch.mm(logits, weight, out=place)
        elif rows.requires_grad:
            place.copy_(logits @ weight)
        if of_weight is not None:
            add_product(of_weight, logits, some)
        del logits
    del buffer
    return losses.sum(), of_rows, of_weight


def has_buffer(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether all logits are written into one tensor; only on a card (`_can_use_mm_out`)."""
    return False


def add_product(summed: torch.Tensor, logits: torch.Tensor, rows: torch.Tensor) -> None:
    """summed [v, h] += logits^T rows, as it is done where no card adds into `summed` itself."""
    summed += torch.mm(logits.t(), rows).float()


def _cross_entropy_(
    logits: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor, count: Any, softcap: float | None
) -> None:
    """ops/cross_entropy.py: one kernel writes the losses, and the gradient over the logits; nothing else."""
    if logits.device.type == "meta":
        return
    single = logits.float()
    capped = single if softcap is None else softcap * torch.tanh(single / softcap)
    asked = targets.ne(-100)
    some = targets.masked_fill(~asked, 0).unsqueeze(1)
    found = torch.logsumexp(capped, 1) - capped.gather(1, some).squeeze(1)
    losses.copy_(found.masked_fill(~asked, 0.0) / count)
    gradient = torch.softmax(capped, 1).scatter_add_(1, some, torch.full_like(found, -1.0).unsqueeze(1))
    if softcap is not None:
        gradient *= 1 - (capped / softcap) ** 2
    logits.copy_(gradient.masked_fill(~asked.unsqueeze(1), 0.0) / count)
