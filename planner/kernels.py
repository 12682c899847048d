"""Which attention a model's code, its heads and the card take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from planner.batching import PREFIX_METHODS, PROMPT_METHODS, has_masks, row_shape, takes_lengths, unpads
from planner.errors import SetupError
from planner.methods import Method, PeftConfig, QLoRA
from planner.model import Architecture, Model

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
_ALWAYS_MASKED = ("falcon",)  # its code makes a mask where torch could do without


def check_attention(model: Model, training: Training, *, trains_all: bool) -> None:
    """Refuse an attention that transformers or the kernel does not have for this model. Raises SetupError.

    `trains_all`: full fine-tuning, which trains the position biases that T5 passes as a mask; checkpointing
    asks for the gradient of one. sdp_utils.cpp: flash takes no mask, cuDNN none that needs a gradient.
    """
    known = model.architecture
    if known and not known.sdpa and training.attention not in ("sdpa", "eager"):
        raise SetupError(
            f"transformers runs {model.id} with eager attention only, attention {training.attention} is not "
            "there; choose eager."
        )
    biased = known is not None and known.positions == "relative"
    trained = trains_all or training.activation_checkpointing
    if biased and (training.attention == "flash" or (training.attention == "cudnn" and trained)):
        raise SetupError(
            f"attention {training.attention} takes no position biases as {model.id} has them here; choose "
            "sdpa, efficient or eager."
        )
    if known and training.attention == "flash" and known.head_dim > FLASH_HEAD_LIMIT:
        raise SetupError(
            f"attention flash takes heads of up to {FLASH_HEAD_LIMIT}, {model.id} has {known.head_dim}; "
            "choose sdpa, efficient or eager."
        )


def check_kernel(
    model: Model, method: Method, training: Training, gpu: Gpu | None, *, guessed: bool = False
) -> None:
    """Refuse a kernel that is asked for by name and does not take this step on the card. Raises SetupError.

    torch would say so in the first forward pass. Of a model whose architecture is not known only the card is
    asked. Where the card is not known, only what no card takes is refused, or, `guessed`, what one of
    capability 8.0 does not take.
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
    known = model.architecture
    if known is None:
        return
    heads = _heads_it_takes(kernel, known, capability, half=not single)
    if heads:
        raise SetupError(
            f"attention {kernel} takes heads of {heads} on {card}, {model.id} has {known.head_dim}; {others}."
        )
    if kernel == "flash" and (why := _mask(known, method, training)):
        raise SetupError(f"attention flash takes no mask, and {model.id} has one here: {why}; {others}.")
    if known.family == "falcon" and known.num_key_value_heads == 1 and kernel == "efficient":
        raise SetupError(
            f"attention {kernel} takes as many key heads as heads, {model.id} has a single one and does not "
            f"repeat it; {others}."
        )


def cudnn_head_limit(capability: tuple[int, int]) -> int:
    """The widest head that cuDNN's attention takes: check_cudnn_tensor_shapes."""
    return 256 if capability == (9, 0) else 128


def flash_backward_fails(capability: tuple[int, int], shape: Architecture) -> bool:
    """check_requires_grad_and_head_dim_gt192_constraints_on_sm86_89_or_120."""
    small = (8, 6) <= capability <= (8, 9) or capability in ((12, 0), (12, 1))
    width = shape.head_dim
    return small and (192 < width <= 224 or (width > 224 and shape.attention_dropout > 0))


def _heads_it_takes(kernel: str, known: Architecture, capability: tuple[int, int], *, half: bool) -> str:
    """In words, where the model's heads are none of them; "" where they are."""
    width = known.head_dim
    if kernel == "cudnn":
        limit = cudnn_head_limit(capability)
        return f"a multiple of 8 up to {limit}" if width % 8 or width > limit else ""
    if kernel == "flash":
        taken = "up to 192" if known.attention_dropout > 0 else "up to 192 and from 225 on"
        return taken if flash_backward_fails(capability, known) else ""
    multiple = 4 if capability >= _AMPERE else 1  # minimum_gemm_alignment
    if half and capability >= (7, 0):
        multiple = 8
    return f"a multiple of {multiple}" if width % multiple else ""


def _mask(known: Architecture, method: Method, training: Training) -> str:
    """Why attention gets a mask, "" where it gets none."""
    if takes_lengths(training) or unpads(training):
        return ""
    if has_masks(training):
        return f"batching {training.batching}"
    if known.family in _ALWAYS_MASKED:
        return "its code always makes one"
    values = method.values if isinstance(method, PeftConfig) else {}
    kind = str(values.get("peft_type", "")).upper()
    if kind in PREFIX_METHODS:
        return f"{kind} puts keys before the queries"
    prompt = values.get("num_virtual_tokens") if kind in PROMPT_METHODS else 0
    length = row_shape(training)[1] + (prompt if isinstance(prompt, int) else 0)
    if known.sliding_layers and known.sliding_window is not None and length >= known.sliding_window:
        return f"{length:,} tokens reach its sliding window of {known.sliding_window:,}"
    return ""
