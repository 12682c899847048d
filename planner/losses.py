"""The loop around a step, and how it makes the loss of a causal language model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from planner.checks import choice
from planner.errors import SetupError
from planner.liger import LIGER_VERSION, Kernels, check_kernels
from planner.methods import LoRA, Method, PeftConfig
from planner.model import Model
from planner.peft_targets import file_adapts_head
from planner.targets import lora_targets

if TYPE_CHECKING:
    from planner.spec import Training

__all__ = [
    "LOSS_CHUNK_TOKENS",
    "NOT_COVERED",
    "Loop",
    "Loss",
    "adapted_head",
    "check_loss",
    "check_step",
    "liger_chunk_tokens",
]

Loop = Literal["plain", "trainer"]
Loss = Literal["full", "chunked", "liger"]

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
# Model types whose forward pass liger_kernel 0.8.5 exchanges for one with its fused loss
# (transformers/monkey_patch.py); those of text alone and without a factor on their logits.
_LIGER_TYPES = (
    *("deepseek_v2", "deepseek_v3", "exaone4", "gemma", "gemma2", "gemma3_text", "glm4", "gpt_oss"),
    *("hunyuan_v1_dense", "hunyuan_v1_moe", "llama", "ministral", "mistral", "mixtral", "nemotron"),
    *("olmo2", "olmo3", "phi3", "qwen2", "qwen3", "qwen3_moe", "qwen3_next", "smollm3"),
)


def check_step(training: Training) -> None:
    """Refuse a loop, a loss or kernels of another name. Raises SetupError."""
    choice("loop", training.loop, get_args(Loop))
    choice("loss", training.loss, get_args(Loss))
    choice("kernels", training.kernels, get_args(Kernels))


def check_loss(training: Training, model: Model, method: Method, *, shared: bool) -> None:
    """Refuse a loss in pieces where it would be another loss, or is not known, and kernels without one.

    Raises SetupError.
    """
    check_kernels(training.kernels, model, method, shared=shared)
    loss = training.loss
    if loss == "full" or model.is_bare:
        return
    if loss == "liger":
        kind = model.config.get("model_type")
        if model.task != "causal-lm" or kind not in _LIGER_TYPES:
            raise SetupError(
                f"loss liger is there for the models that liger_kernel {LIGER_VERSION} has it for, and "
                f"{model.id} ({kind}) is none of them; choose loss full"
                f"{' or chunked' if _plain_head(model) else ''}."
            )
        if _adapts_head(model, method):
            raise adapted_head(model.id)
    elif not _plain_head(model):
        raise SetupError(
            f"loss {loss} is there for causal language models whose logits go into the loss as they are, and "
            f"{model.id} is none that is known; choose loss full."
        )
    if shared:
        raise SetupError(f"loss {loss} is covered on one GPU only; choose loss full or leave --num-gpus out.")


def _adapts_head(model: Model, method: Method) -> bool:
    """Whether a method puts something around the output layer.

    A copy in modules_to_save is not meant: the loss itself trains it.
    """
    if isinstance(method, LoRA):
        return any(t.weight.role == "head" for t in lora_targets(model, method.target_modules))
    return isinstance(method, PeftConfig) and file_adapts_head(model, method.values)


def _plain_head(model: Model) -> bool:
    known = model.architecture
    return known is not None and known.family in _PLAIN_HEADS and known.logit_softcap is None


def adapted_head(model: str) -> SetupError:
    """Why a method must leave the output layer alone under loss liger, which reads that layer's own weight.

    liger_kernel 0.8.5, transformers/model/llama.py: `lm_head.weight`, of peft's layers the frozen one.
    """
    return SetupError(
        f"loss liger reads the weight of the output layer of {model} and passes over what a method puts "
        "there, so that it would never be trained; leave that layer out, or choose loss full or chunked."
    )


def liger_chunk_tokens(tokens: int, vocabulary: int, hidden: int) -> int:
    """How many of T tokens have logits at a time: the power of two from T / (v / h) on, T at most.

    So that logits of one chunk are about as large as all hidden states. Source: liger_kernel 0.8.5,
    ops/fused_linear_cross_entropy.py.
    """
    pieces = -(-vocabulary // hidden)
    share = -(-tokens // pieces)
    return min(1 << (share - 1).bit_length(), tokens)
