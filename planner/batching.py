"""How a micro batch holds its samples: all of one length, padded to one, or packed into one row.

Read off transformers 5.23: data/data_collator.py (what collators return), masking_utils.py (which masks are
made of it), models/*/modeling_*.py (which models tell packed samples apart).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from planner.checks import choice
from planner.errors import SetupError
from planner.methods import Method, PeftConfig
from planner.model import Model

if TYPE_CHECKING:
    from planner.catalog.gpus import Gpu
    from planner.spec import Training

__all__ = [
    "PREFIX_METHODS",
    "PROMPT_METHODS",
    "Batching",
    "asks_masks",
    "check_batch",
    "check_batching",
    "has_flash",
    "has_masks",
    "row_shape",
    "sample_lengths",
    "takes_lengths",
    "unpads",
]

Batching = Literal["full", "padded", "packed"]

# These models hand positions to the function that makes their mask, which so knows where a sample begins.
_APART_BY_POSITIONS = (
    *("gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "granite", "llama", "mistral", "mixtral"),
    *("olmo", "olmo2", "phi", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3", "stablelm", "starcoder2"),
)
_APART_BY_LENGTHS = ("opt",)  # hands on the lengths alone; BLOOM, Falcon and gpt-oss hand on neither
_WITHOUT_LENGTHS = ("stablelm",)  # hands them to no layer's attention
_ENCODERS = ("bert", "roberta")
_FLASH_CAPABILITY = (8, 0)  # flash_api.cpp, mha_varlen_fwd: Ampere or newer
_FLASH_HEAD_MULTIPLE = 8  # flash_api.cpp: only dense attention pads heads to it
# peft 0.21, PromptLearningConfig: PeftModelForCausalLM.forward drops or shifts the positions of a batch.
PREFIX_METHODS = ("CARTRIDGE", "PREFIX_TUNING")  # put keys and values into the cache
PROMPT_METHODS = (
    *("CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING"),
    *("P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING"),
)


def row_shape(training: Training) -> tuple[int, int]:
    """Rows and their tokens: [b, s], packed [1, b s]."""
    b, s = training.micro_batch_size, training.seq_len
    return (1, b * s) if training.batching == "packed" else (b, s)


def sample_lengths(training: Training) -> tuple[int, ...]:
    """Tokens of each sample before it is padded: the last has half of `seq_len`, those before it more.

    Memory does not depend on them, as a batch with padding anywhere is padded everywhere; but where attention
    takes the padding out, and there one token of it is all there is: the most that a padded batch needs.
    """
    b, s = training.micro_batch_size, training.seq_len
    if training.batching != "padded":
        return (s,) * b
    if unpads(training):
        return (*(s,) * (b - 1), s - 1)
    return tuple(s - s * (i + 1) // (2 * b) for i in range(b))


def takes_lengths(training: Training) -> bool:
    """Whether attention is told the samples' lengths and needs no mask: flash attention on a packed row."""
    return training.batching == "packed" and training.attention == "flash"


def unpads(training: Training) -> bool:
    """Whether attention takes the padding out before its kernel and puts it back: flash on padded samples."""
    return training.batching == "padded" and training.attention == "flash" and training.seq_len > 1


def has_masks(training: Training) -> bool:
    """Whether attention gets a mask [s, s]: for padding, or for several samples in a row."""
    if training.batching == "padded":  # of one token none is left to be padding
        return training.seq_len > 1 and not unpads(training)
    several = training.batching == "packed" and training.micro_batch_size > 1
    return several and not takes_lengths(training)


def asks_masks(training: Training) -> bool:
    """Whether a batch's values say what attention gets: a mask, or samples without their padding."""
    return has_masks(training) or unpads(training)


def check_batch(training: Training) -> None:
    """Refuse another name. Raises SetupError."""
    choice("batching", training.batching, get_args(Batching))


def check_batching(model: Model, method: Method, training: Training) -> None:
    """Refuse packing where samples would see each other, or no kernel takes them. Raises SetupError."""
    if model.is_bare:
        return
    if unpads(training):
        _check_unpadding(model, method)
    if training.batching != "packed":
        return
    instead = "choose batching padded or full."
    if model.task != "causal-lm":
        raise SetupError(f"batching packed is for causal language models, and {model.id} is none; {instead}")
    family = model.config.get("model_type")
    if family in _APART_BY_LENGTHS and not takes_lengths(training):
        raise SetupError(
            f"{model.id} tells packed samples apart by their lengths alone, which attention "
            f"{training.attention} does not take; choose attention flash, or batching padded or full."
        )
    if family not in (*_APART_BY_POSITIONS, *_APART_BY_LENGTHS):
        raise SetupError(
            f"batching packed needs a model whose code is known to keep packed samples apart, and {model.id} "
            f"({family}) is none; {instead}"
        )
    if isinstance(method, PeftConfig):
        _check_peft(method, instead)
    if takes_lengths(training):
        if family in _WITHOUT_LENGTHS:
            raise SetupError(
                f"{model.id} tells packed samples apart by their positions alone, and attention flash takes "
                "their lengths; choose attention sdpa, efficient or eager."
            )
        _check_heads(model)


def _check_unpadding(model: Model, method: Method) -> None:
    """Refuse flash attention on padded samples where it is not known to be. Raises SetupError."""
    instead = "choose attention sdpa, efficient or eager."
    if model.config.get("model_type") not in (*_APART_BY_POSITIONS, *_APART_BY_LENGTHS, *_ENCODERS):
        raise SetupError(
            f"attention flash on padded samples needs a model whose code is known to take the padding out, "
            f"and {model.id} ({model.config.get('model_type')}) is none; {instead}"
        )
    kind = str(method.values["peft_type"]).upper() if isinstance(method, PeftConfig) else ""
    if kind in PREFIX_METHODS:
        raise SetupError(
            f"attention flash on padded samples takes as many keys as queries, and peft's {kind} puts keys "
            f"before them; {instead}"
        )
    _check_heads(model)


def has_flash(gpu: Gpu | None) -> bool:
    """Whether the GPU runs the kernels; one that is not named is taken as Ampere."""
    return gpu is None or gpu.capability is None or gpu.capability >= _FLASH_CAPABILITY


def _check_peft(method: PeftConfig, instead: str) -> None:
    values = method.values
    kind = str(values["peft_type"]).upper()
    if kind in PROMPT_METHODS:
        raise SetupError(f"peft's {kind} puts vectors before a row and drops its positions; {instead}")
    if values.get("alora_invocation_tokens"):
        raise SetupError(f"an activated LoRA acts from one place of a row on, not of each sample; {instead}")


def _check_heads(model: Model) -> None:
    known = model.architecture
    if known is not None and known.head_dim % _FLASH_HEAD_MULTIPLE:
        raise SetupError(
            f"attention flash by lengths takes heads of a multiple of {_FLASH_HEAD_MULTIPLE}, {model.id} has "
            f"{known.head_dim}; choose attention sdpa, efficient or eager."
        )
