"""What transformers asks of a batch's masks and positions, answered for samples that are padded or packed.

A mask is made where one token is left out or one position starts again (masking_utils.py), which only values
tell. In a plain batch none is, so that the tracer's own answer, all hold, is right there. Where attention
takes the padding out, all but one token stay (planner.batching, `sample_lengths`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from planner.simulate.trace import Tracer

__all__ = ["MASK_QUESTIONS", "mask_forms"]

MASK_QUESTIONS = (
    "_ignore_causal_mask_sdpa",  # whether no token is padding, so that `is_causal` says it all
    "_ignore_bidirectional_mask_sdpa",  # the same for an encoder
    "find_packed_sequence_indices",  # whether all positions follow one another
    "flash_attention_mask",  # whether no token is padding, so that none has to be taken out
)


@contextmanager
def mask_forms(tracer: Tracer) -> Iterator[None]:
    """For the time of the context some token is padding, or some sample begins within a row."""
    from transformers import masking_utils, modeling_flash_attention_utils  # a step of one's own does without

    def form(original: Callable[..., Any]) -> Callable[..., Any]:
        def asked(*args: Any, **kwargs: Any) -> Any:
            tracer.all_hold = False
            try:
                return original(*args, **kwargs)
            finally:
                tracer.all_hold = True

        return asked

    places_of = modeling_flash_attention_utils._get_unpad_data

    def counted(mask: Any) -> Any:
        tracer.chosen, tracer.count = mask.numel() - 1, mask.shape[1]
        try:
            return places_of(mask)
        finally:
            tracer.chosen, tracer.count = None, 1

    with ExitStack() as stack:
        patch = mock.patch.object(modeling_flash_attention_utils, "_get_unpad_data", counted)
        stack.enter_context(patch)
        for name in MASK_QUESTIONS:
            stack.enter_context(mock.patch.object(masking_utils, name, form(getattr(masking_utils, name))))
        yield
