"""Which attention the step runs, and which kernel it may use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.integrations import sdpa_attention

from planner.batching import takes_lengths, unpads
from planner.spec import Training
from planner.training.varlen_attention import VARLEN_ATTENTION

__all__ = ["attention_kernels", "implementation"]

_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


def implementation(training: Training) -> str:
    """transformers' name for it; where a model knows no fused attention, eager takes its place."""
    if training.attention == "eager":
        return "eager"
    return VARLEN_ATTENTION if takes_lengths(training) or unpads(training) else "sdpa"


@contextmanager
def attention_kernels(attention: str) -> Iterator[None]:
    """Pin scaled-dot-product attention to one kernel; `sdpa` and `eager` leave torch's choice alone.

    The memory-efficient kernel takes no grouped heads, so keys and values are repeated to all heads, as
    transformers does where a mask is passed.
    """
    if attention not in _BACKENDS:
        yield
        return
    grouped = sdpa_attention.use_gqa_in_sdpa
    if attention == "efficient":
        sdpa_attention.use_gqa_in_sdpa = lambda *_args, **_kwargs: False
    try:
        with sdpa_kernel(_BACKENDS[attention]):
            yield
    finally:
        sdpa_attention.use_gqa_in_sdpa = grouped
