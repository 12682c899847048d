"""Which attention a model's code and its heads take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from planner.errors import SetupError
from planner.model import Model

if TYPE_CHECKING:
    from planner.spec import Training

__all__ = ["HALF_ONLY", "Attention", "check_attention"]

Attention = Literal["sdpa", "flash", "efficient", "cudnn", "eager"]

HALF_ONLY = ("flash", "cudnn")  # torch: flash and cuDNN attention take fp16 and bf16 only
_FLASH_HEAD_LIMIT = 256  # aten/.../cuda/sdp_utils.cpp: check_head_dim_size_flash


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
    if known and training.attention == "flash" and known.head_dim > _FLASH_HEAD_LIMIT:
        raise SetupError(
            f"attention flash takes heads of up to {_FLASH_HEAD_LIMIT}, {model.id} has {known.head_dim}; "
            "choose sdpa, efficient or eager."
        )
