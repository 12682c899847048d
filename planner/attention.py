"""Which attention a model's code, its heads and the card take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from planner.batching import PREFIX_METHODS, PROMPT_METHODS, has_masks, row_shape, takes_lengths, unpads
from planner.errors import SetupError
from planner.methods import Method, PeftConfig, QLoRA
from planner.model import AttentionShape, Model

if TYPE_CHECKING:
    from planner.catalog.gpus import Gpu
    from planner.spec import Training

__all__ = [
    "FLASH_HEAD_LIMIT",
    "HALF_ONLY",
    "Attention",
    "check_attention",
    "check_kernel",
    "cudnn_head_limit",
    "flash_backward_fails",
]

Attention = Literal["sdpa", "flash", "efficient", "cudnn", "eager"]

HALF_ONLY = ("flash", "cudnn")  # torch: flash and cuDNN attention take fp16 and bf16 only
# aten/src/ATen/native/transformers/cuda/sdp_utils.cpp
FLASH_HEAD_LIMIT = 256  # check_head_dim_size_flash
_AMPERE = (8, 0)  # the oldest with flash, cuDNN and bfloat16
_ANY = (9, 0)  # takes whatever any card does
# by model_type, transformers 5.23: code that makes a mask where torch could do without ...
_ALWAYS_MASKED = ("falcon", "glm_moe_dsa", "layoutlm", "t5gemma2")
_BIASED = ("mt5", "t5", "umt5")  # ... position biases that are parameters
_COMPUTED_BIASES = ("doge", "inkling_text")  # ... and biases computed from the tokens, with a gradient


def check_attention(model: Model, training: Training, *, trains_all: bool) -> None:
    """Refuse an attention that transformers or the kernel does not have for this model. Raises SetupError.

    `trains_all`: full fine-tuning, which trains the position biases that T5 passes as a mask; checkpointing
    asks for the gradient of one. sdp_utils.cpp: flash takes no mask, cuDNN none that needs a gradient.
    """
    kernel, shape = training.attention, model.attention
    if kernel in ("sdpa", "eager") or shape is None:
        return
    if not shape.fused:
        raise SetupError(
            f"transformers runs {model.id} with eager attention only, attention {kernel} is not there; "
            "choose eager."
        )
    computed = _is_one_of(model, _COMPUTED_BIASES)
    trained = computed or trains_all or training.activation_checkpointing
    others = "choose sdpa, efficient or eager"
    biased = computed or _is_one_of(model, _BIASED)
    if biased and (kernel == "flash" or (kernel == "cudnn" and trained)):
        kind = "biases" if computed else "position biases"
        raise SetupError(f"attention {kernel} takes no {kind} as {model.id} has them here; {others}.")
    unequal = [pair for pair in shape.head_dims if pair[0] != pair[1]]
    if kernel in HALF_ONLY and unequal:
        raise SetupError(
            f"attention {kernel} takes values as wide as queries and keys, {model.id} has queries of "
            f"{unequal[0][0]} and values of {unequal[0][1]}; {others}."
        )
    widest = max(_widths(shape), default=0)
    if kernel == "flash" and widest > FLASH_HEAD_LIMIT:
        raise SetupError(
            f"attention flash takes heads of up to {FLASH_HEAD_LIMIT}, {model.id} has {widest}; {others}."
        )


def check_kernel(
    model: Model, method: Method, training: Training, gpu: Gpu | None, *, guessed: bool = False
) -> None:
    """Refuse a kernel that is asked for by name and does not take this step on the card. Raises SetupError.

    torch would say so in the first forward pass. Where the card is not known, only what no card takes is
    refused, or, `guessed`, what one of capability 8.0 does not take.
    """
    kernel = training.attention
    if kernel in ("sdpa", "eager") or model.is_bare:
        return
    capability = (gpu.capability if gpu else None) or (_AMPERE if guessed else _ANY)
    card = gpu.name if gpu and gpu.capability else "a card of capability 8.0" if guessed else "any card"
    single = training.precision == "fp32" or (isinstance(method, QLoRA) and "mixed" not in training.precision)
    brain = training.precision.startswith("bf16") and not single
    too_old = capability < _AMPERE and brain
    between = "" if kernel == "efficient" or too_old else ", efficient"
    others = f"choose attention sdpa{between} or eager"
    if too_old or (capability < _AMPERE and kernel in HALF_ONLY):
        need = f"attention {kernel} needs capability 8.0" + ("" if kernel in HALF_ONLY else " for bfloat16")
        raise SetupError(f"{need}, {card} has {capability[0]}.{capability[1]}; {others}.")
    shape = model.attention
    if shape is None:
        return
    for width in _widths(shape):
        if heads := _heads_it_takes(kernel, width, shape.dropout, capability, half=not single):
            raise SetupError(
                f"attention {kernel} takes heads of {heads} on {card}, {model.id} has {width}; {others}."
            )
    if kernel == "flash" and (why := _mask(model, method, training)):
        raise SetupError(f"attention flash takes no mask, and {model.id} has one here: {why}; {others}.")
    known = model.architecture
    if known and known.family == "falcon" and known.num_key_value_heads == 1 and kernel == "efficient":
        raise SetupError(
            f"attention {kernel} takes as many key heads as heads, {model.id} has a single one and does not "
            f"repeat it; {others}."
        )


def cudnn_head_limit(capability: tuple[int, int]) -> int:
    """The widest head that cuDNN's attention takes: check_cudnn_tensor_shapes."""
    return 256 if capability == (9, 0) else 128


def flash_backward_fails(capability: tuple[int, int], width: int, dropout: float) -> bool:
    """check_requires_grad_and_head_dim_gt192_constraints_on_sm86_89_or_120."""
    small = (8, 6) <= capability <= (8, 9) or capability in ((12, 0), (12, 1))
    return small and (192 < width <= 224 or (width > 224 and dropout > 0))


def _is_one_of(model: Model, types: tuple[str, ...]) -> bool:
    """Whether the model, or the part of it that takes text, has one of these model types."""
    config = model.config
    text = config.get("text_config")
    return config.get("model_type") in types or (isinstance(text, dict) and text.get("model_type") in types)


def _widths(shape: AttentionShape) -> list[int]:
    """Every width that heads have, the widest first."""
    return sorted({width for pair in shape.head_dims for width in pair}, reverse=True)


def _heads_it_takes(
    kernel: str, width: int, dropout: float, capability: tuple[int, int], *, half: bool
) -> str:
    """In words, where a head of `width` is none of them; "" where it is."""
    if kernel == "cudnn":
        limit = cudnn_head_limit(capability)
        return f"a multiple of 8 up to {limit}" if width % 8 or width > limit else ""
    if kernel == "flash":
        taken = "up to 192" if dropout > 0 else "up to 192 and from 225 on"
        return taken if flash_backward_fails(capability, width, dropout) else ""
    multiple = 4 if capability >= _AMPERE else 1  # minimum_gemm_alignment
    if half and capability >= (7, 0):
        multiple = 8
    return f"a multiple of {multiple}" if width % multiple else ""


def _mask(model: Model, method: Method, training: Training) -> str:
    """Why attention gets a mask, "" where it gets none."""
    if takes_lengths(training) or unpads(training):
        return ""
    if has_masks(training):
        return f"batching {training.batching}"
    if _is_one_of(model, _ALWAYS_MASKED):
        return "its code always makes one"
    values = method.values if isinstance(method, PeftConfig) else {}
    kind = str(values.get("peft_type", "")).upper()
    if kind in PREFIX_METHODS:
        return f"{kind} puts keys before the queries"
    prompt = values.get("num_virtual_tokens") if kind in PROMPT_METHODS else 0
    length = row_shape(training)[1] + (prompt if isinstance(prompt, int) else 0)
    window = model.attention.window if model.attention else None
    if window is not None and length >= window:
        return f"{length:,} tokens reach its sliding window of {window:,}"
    return ""
