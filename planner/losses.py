"""The loop around a step, and how it makes the loss of a causal language model."""

from __future__ import annotations

from typing import Literal, get_args

from planner.checks import choice
from planner.errors import SetupError
from planner.model import Model

__all__ = ["LOSS_CHUNK_TOKENS", "NOT_COVERED", "Loop", "Loss", "check_loss", "check_step"]

Loop = Literal["plain", "trainer"]
Loss = Literal["full", "chunked"]

LOSS_CHUNK_TOKENS = 1024  # tokens whose logits are there at once under loss chunked: planner.training.losses

NOT_COVERED = {  # a setting that somebody may ask for, and why there is none
    "torch_compile": "torch_compile is not covered: the compiler decides by version and device which tensors "
    "it keeps, fuses or computes again, and a step run operation by operation does not show it; leave it out."
}

# Nothing stands between these models' output layer and their loss: transformers 5.23, models/*/modeling_*.py.
_PLAIN_HEADS = (
    *("bloom", "gemma", "gemma3_text", "gpt2", "gpt_neox", "llama", "mistral", "mixtral", "olmo", "olmo2"),
    *("opt", "phi", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3", "stablelm", "starcoder2"),
)


def check_step(loop: str, loss: str) -> None:
    """Refuse a loop or a loss of another name. Raises SetupError."""
    choice("loop", loop, get_args(Loop))
    choice("loss", loss, get_args(Loss))


def check_loss(loss: str, model: Model, *, shared: bool) -> None:
    """Refuse a chunked loss where it would be another loss, or is not known. Raises SetupError."""
    if loss == "full" or model.is_bare:
        return
    known = model.architecture
    if known is None or known.family not in _PLAIN_HEADS or known.logit_softcap is not None:
        raise SetupError(
            f"loss {loss} is there for causal language models whose logits go into the loss as they are, and "
            f"{model.id} is none that is known; choose loss full."
        )
    if shared:
        raise SetupError(f"loss {loss} is covered on one GPU only; choose loss full or leave --num-gpus out.")
