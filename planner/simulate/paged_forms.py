"""bitsandbytes' paged memory without a device: counted, never allocated, and not in torch's allocator.

Source: bitsandbytes 0.50, functional.py (get_paged: cudaMallocManaged), optim/optimizer.py
(get_state_buffer: states of 100,000 elements and more).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

__all__ = ["paged_forms"]


@contextmanager
def paged_forms(count: Callable[[int], None]) -> Iterator[None]:
    """Replace bitsandbytes' paged memory for the time of the context; `count` gets each buffer's bytes."""
    if "bitsandbytes" not in sys.modules:
        yield
        return
    from bitsandbytes import functional

    def paged(*shape: int, dtype: torch.dtype = torch.float32, device: Any = None) -> torch.Tensor:
        count(math.prod(shape) * dtype.itemsize)
        buffer: Any = torch.zeros((), dtype=dtype, device="cpu").expand(shape)  # one element holds for all
        buffer.is_paged = True
        return buffer  # type: ignore[no-any-return]

    with ExitStack() as stack:
        for name, form in (("get_paged", paged), ("fill", _nothing), ("prefetch_tensor", _nothing)):
            stack.enter_context(mock.patch.object(functional, name, form))
        yield


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    """Filling and moving pages takes no memory of torch's."""
