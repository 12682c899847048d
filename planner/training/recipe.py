"""The precision recipe of a setup in torch's terms."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from planner.errors import SetupError
from planner.spec import QLoRA, Setup

__all__ = ["Autocast", "autocast_dtype", "cuda_autocast", "loaded_dtype", "weight_dtype"]

Autocast = Callable[[torch.dtype], AbstractContextManager[Any]]

_WEIGHTS = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "bf16-mixed": torch.float32,
    "fp16-mixed": torch.float32,
}
_AUTOCAST = {"bf16-mixed": torch.bfloat16, "fp16-mixed": torch.float16}


def weight_dtype(precision: str) -> torch.dtype:
    """The dtype in which the base weights are held. Raises SetupError for `textbook`."""
    if precision not in _WEIGHTS:
        raise SetupError(
            f"precision {precision} is a sum worked by hand, no library runs it as one step; "
            "simulate or measure bf16, bf16-mixed or fp32 instead."
        )
    return _WEIGHTS[precision]


def loaded_dtype(setup: Setup) -> torch.dtype:
    """The dtype in which the model is loaded: QLoRA loads in what bitsandbytes computes in, mixed or not."""
    precision = setup.training.precision
    if isinstance(setup.method, QLoRA) and precision in _AUTOCAST:
        return _AUTOCAST[precision]
    return weight_dtype(precision)


def autocast_dtype(precision: str) -> torch.dtype | None:
    """The dtype that autocast computes in, None where the recipe has no autocast."""
    return _AUTOCAST.get(precision)


def cuda_autocast(dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Autocast on a CUDA device."""
    return torch.autocast("cuda", dtype=dtype)


def no_autocast(dtype: torch.dtype) -> AbstractContextManager[Any]:
    """For a rehearsal on the CPU, where the CUDA lists do not apply."""
    return nullcontext()
