"""The tracer of one rank among many: DTensors are seen through, FSDP2's own work is told from the model's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor

from planner.simulate.trace import Tracer

__all__ = ["ShardedTracer", "hosted"]

aten = torch.ops.aten

_REGION_BEGINS = torch.ops.profiler._record_function_enter_new.default
_REGION_ENDS = torch.ops.profiler._record_function_exit._RecordFunction
_TILE_BYTES = 2048  # TensorShape.cu: 128 threads, 16 bytes each


class ShardedTracer(Tracer):
    """Sees the local tensors that DTensors stand for, and puts what FSDP2 makes for itself into a part.

    FSDP2 names its regions for the profiler ("FSDP::all_gather ..."); what is allocated in one, gathered
    weights and the buffers of collectives, is temporary. DTensor tries shapes on fake tensors, which are on
    no device.
    """

    def __init__(self, *args: Any) -> None:
        """As the tracer's own."""
        super().__init__(*args)
        self._regions: list[str] = []
        self._imagined = 0
        self._held_part = ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation; those on DTensors come again as operations on their local tensors."""
        if self._imagined:
            return func(*args, **(kwargs or {}))
        if DTensor in types:
            return NotImplemented
        if func is _REGION_BEGINS:
            self._regions.append(args[0])
        elif func is _REGION_ENDS and self._regions:
            self._regions.pop()
        elif func in _COPIES:
            self._own_part(func)
            self.ledger.scratch(_COPIES[func](args, kwargs or {}))
            return None
        elif func is aten._to_copy.default and _leaves(args[0], kwargs or {}):
            return hosted(args[0])
        elif func is aten.copy_.default and args[0].device.type == "cpu" and args[1].device.type == "meta":
            return args[0]  # DDP asks the others for the order of its buckets, which is its own
        elif func is aten.add_.Tensor and args[0].device.type == "cpu" and _is_hosted(args[0]):
            return args[0]
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _part(self) -> tuple[str, bool]:
        part, backward = super()._part()
        if self._held_part:
            return self._held_part, backward
        if self._regions and self._regions[-1].startswith("FSDP::"):
            return "temporaries", backward
        return part, backward

    def _own_part(self, func: Any) -> None:
        self.ledger.part, backward = self._part()
        self.ledger.op, self.ledger.place = func, self._node_or_place(backward)

    def holding(self, original: Callable[..., Any], part: str) -> Callable[..., Any]:
        """The function, with all that it allocates put into this part."""

        def held(*args: Any, **kwargs: Any) -> Any:
            before, self._held_part = self._held_part, part
            try:
                return original(*args, **kwargs)
            finally:
                self._held_part = before

        return held

    @contextmanager
    def imagining(self) -> Iterator[None]:
        """While this is entered, a fake mode's operations are not the device's."""
        enter, leave = FakeTensorMode.__enter__, FakeTensorMode.__exit__

        def entered(mode: Any) -> Any:
            self._imagined += 1
            return enter(mode)

        def left(mode: Any, *error: Any) -> Any:
            self._imagined -= 1
            return leave(mode, *error)

        with (
            mock.patch.object(FakeTensorMode, "__enter__", entered),
            mock.patch.object(FakeTensorMode, "__exit__", left),
        ):
            yield


def hosted(tensor: torch.Tensor) -> torch.Tensor:
    """The host's copy of a tensor of the device: its shape and dtype over one number, whatever its size."""
    return torch.empty(1, dtype=tensor.dtype).as_strided(tensor.shape, (0,) * tensor.dim())


def _is_hosted(tensor: torch.Tensor) -> bool:
    return tensor.numel() > 1 and not any(tensor.stride())


def _leaves(tensor: torch.Tensor, options: Mapping[str, Any]) -> bool:
    device = options.get("device")
    return tensor.device.type == "meta" and device is not None and torch.device(device).type == "cpu"


def _chunk_cat(args: Sequence[Any], options: Mapping[str, Any]) -> list[int]:
    """TensorShape.cu, _chunk_cat_out_cuda: int64 tables; without a kernel for the types, padded copies.

    A table has one number for each 2 KiB of a rank's share and six or so for each tensor.
    """
    tensors, ranks, out = args[0], options.get("num_chunks") or args[2], options.get("out")
    if out is None:
        out = args[3]
    given, asked = tensors[0].dtype, out.dtype
    if given != asked and (given, asked) != (torch.bfloat16, torch.float32):
        padded = [_rounded(t.shape[0], ranks) * math.prod(t.shape[1:]) * t.element_size() for t in tensors]
        whole = [t.numel() * t.element_size() for t in tensors]
        return [size for size, was in zip(padded, whole, strict=True) if size != was]
    shares = [_rounded(t.shape[0], ranks) // ranks * math.prod(t.shape[1:]) for t in tensors]
    blocks = sum(-(-share * out.element_size() // _TILE_BYTES) for share in shares)
    return [8 * (blocks + 6 * len(tensors) + 2)]


def _split_copy(args: Sequence[Any], options: Mapping[str, Any]) -> list[int]:
    """TensorShape.cu, split_with_sizes_copy_out_cuda: tables of int64, one number for each block.

    The blocks are as many as fill the card twice: of an A100, 108 processors of 2,048 threads.
    """
    gathered, sizes = args[0], args[1]
    ranks, width = gathered.shape[0], gathered.element_size()
    shares = [size * width for size in sizes]
    most = 108 * 2048 // 128 * 2
    rounds = -(-sum(-(-share // _TILE_BYTES) for share in shares) * ranks // most)
    at_once = min(math.ceil(math.sqrt(rounds)), ranks)
    tile = _TILE_BYTES * -(-rounds // at_once)
    blocks = sum(-(-share // tile) for share in shares)
    return [8 * (blocks + 4 * len(shares) + 1)]


def _rounded(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


_COPIES: dict[Any, Callable[[Sequence[Any], Mapping[str, Any]], list[int]]] = {
    torch.ops.fsdp.chunk_cat.default: _chunk_cat,
    torch.ops.fsdp.split_with_sizes_copy.default: _split_copy,
}
