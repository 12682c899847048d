"""peft's methods that ask for the values of tensors, answered by what they mean.

WaveFT (peft/tuners/waveft/layer.py) drops the places beyond a padded weight, of which there are none.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from planner.simulate.trace import Tracer

__all__ = ["peft_forms"]

_WAVEFT = "peft.tuners.waveft.layer"


@contextmanager
def peft_forms(tracer: Tracer) -> Iterator[None]:
    """Tell the tracer what holds, for the time of the context, where peft has been imported."""
    if _WAVEFT not in sys.modules:
        yield
        return
    from peft.tuners.waveft.layer import WaveFTLayer

    form = _with_masks_that_hold(tracer, WaveFTLayer.get_delta_weight)
    with mock.patch.object(WaveFTLayer, "get_delta_weight", form):
        yield


def _with_masks_that_hold(tracer: Tracer, original: Callable[..., Any]) -> Callable[..., Any]:
    def held(*args: Any, **kwargs: Any) -> Any:
        before, tracer.masks_hold = tracer.masks_hold, True
        try:
            return original(*args, **kwargs)
        finally:
            tracer.masks_hold = before

    return held
