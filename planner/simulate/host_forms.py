"""What autograd keeps in the host's memory, without a device: counted, never allocated.

Source: torch/autograd/graph.py, `save_on_cpu`: a saved tensor is copied to the host, and a copy of that comes
back when the backward pass asks for it.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.autograd import graph

__all__ = ["host_forms"]


class _OnHost:
    """A tensor on the host, by its shape."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.size, self.dtype = tensor.size(), tensor.dtype


@contextmanager
def host_forms(count: Callable[[int], None]) -> Iterator[None]:
    """Replace `save_on_cpu` for the time of the context; `count` gets bytes that come to the host or go."""

    class Counted(graph.saved_tensors_hooks):
        """`save_on_cpu` for tensors on `meta`; others stay where they are."""

        def __init__(self, pin_memory: bool = False, device_type: str = "cuda") -> None:
            super().__init__(_packed, _unpacked)

    def _packed(tensor: torch.Tensor) -> Any:
        if tensor.device.type != "meta":
            return tensor
        held, size_bytes = _OnHost(tensor), tensor.numel() * tensor.element_size()
        count(size_bytes)
        weakref.finalize(held, count, -size_bytes)
        return held

    def _unpacked(held: Any) -> torch.Tensor:
        if isinstance(held, _OnHost):
            return torch.empty(held.size, dtype=held.dtype, device="meta")
        return held  # type: ignore[no-any-return]

    with ExitStack() as stack:
        for name in ("torch.autograd.graph", "transformers.modeling_utils"):  # who holds it by name
            module = sys.modules.get(name)
            if module is not None and hasattr(module, "save_on_cpu"):
                stack.enter_context(mock.patch.object(module, "save_on_cpu", Counted))
        yield
