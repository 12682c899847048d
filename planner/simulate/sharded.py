"""One rank of many, simulated in one process: a group that does not talk, streams that have their own pools.

torch's own fake process group stands in for NCCL: collectives return at once. FSDP2 asks
`torch.<device type>` for streams and events; under the name `meta` it finds the simulated device's, whose
blocks come from the allocator's pool of the stream that asks. Left out: NCCL's own buffers, which torch's
allocator does not see.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group
from torch.nn.parallel import distributed as replication

from planner.sharding import Sharding
from planner.simulate.ledger import Ledger
from planner.simulate.sharded_trace import ShardedTracer, hosted
from planner.training.group import imagined_group

__all__ = ["sharded_device"]


@contextmanager
def sharded_device(sharding: Sharding, rank: int, tracer: ShardedTracer) -> Iterator[None]:
    """A group of `num_gpus` in which this process is `rank`; freed and streamed storages reach the ledger."""
    with ExitStack() as stack:
        stack.enter_context(imagined_group(sharding.num_gpus, rank))
        for patch in (*_patches(tracer.ledger), *_named_parts(tracer)):
            stack.enter_context(patch)
        stack.enter_context(tracer.imagining())
        yield


def _patches(ledger: Ledger) -> Iterator[Any]:
    streams = _streams(ledger)
    yield mock.patch.object(torch, "meta", streams, create=True)
    yield mock.patch.object(torch.accelerator, "current_stream", streams.current_stream)
    yield mock.patch.object(torch.UntypedStorage, "resize_", _resize(ledger))
    group = _fsdp_param_group.FSDPParamGroup
    for question in ("_validate_no_meta_params", "_validate_cpu_offload_params"):
        yield mock.patch.object(group, question)
    yield mock.patch.object(_fsdp_param, "_chunk_with_empty", _Chunks)
    parameter = _fsdp_param.FSDPParam
    yield mock.patch.object(parameter, "_init_sharded_param", _offloading(parameter._init_sharded_param))
    # both ask values of the others, which are equal here
    yield mock.patch.object(replication, "_verify_param_shape_across_processes")


def _named_parts(tracer: ShardedTracer) -> Iterator[Any]:
    """DDP's buckets hold gradients; so does what FSDP2 keeps whole while micro batches are accumulated."""
    replica = replication.DistributedDataParallel
    for name in ("_ddp_init_helper", "_pre_forward"):
        yield mock.patch.object(replica, name, tracer.holding(getattr(replica, name), "gradients"))
    equalize = "_sync_module_states"
    equalizing = tracer.holding(getattr(replication, equalize), "temporaries")
    yield mock.patch.object(replication, equalize, equalizing)
    parameter = _fsdp_param.FSDPParam
    keep = parameter.to_accumulated_grad_if_needed

    def kept(of: Any) -> None:
        keep(of)
        for gradient in (of.unsharded_accumulated_grad, of._unsharded_param.grad):
            if gradient is not None:
                tracer.ledger.retag(gradient, "gradients")

    yield mock.patch.object(parameter, "to_accumulated_grad_if_needed", kept)


def _resize(ledger: Ledger) -> Callable[[torch.UntypedStorage, int], Any]:
    original: Callable[..., Any] = torch.UntypedStorage.resize_

    def resize(storage: torch.UntypedStorage, size: int) -> Any:
        resized = original(storage, size)
        ledger.resized(storage)
        return resized

    return resize


def _offloading(original: Callable[..., None]) -> Callable[..., None]:
    """FSDP2 offloads no `meta` shards; here they become the host's, which the ledger does not count."""

    def init_sharded_param(parameter: Any, *args: Any, **options: Any) -> None:
        original(parameter, *args, **options)
        if not parameter.offload_to_cpu:
            return
        shard = parameter.sharded_param._local_tensor
        parameter._sharded_param_data = hosted(parameter._sharded_param_data)
        flat = parameter._sharded_param_data[: shard.numel()]
        kept = torch.as_strided(flat, shard.shape, (0,) * shard.dim())
        trained = parameter.sharded_param.requires_grad
        parameter.sharded_param = nn.Parameter(parameter.to_sharded_dtensor(kept), requires_grad=trained)
        parameter._setattr_on_modules(parameter.sharded_param)

    return init_sharded_param


class _Chunks:
    """`torch.chunk(tensor, count, dim)` of which only what is asked for is made: ranks may be thousands."""

    def __init__(self, tensor: torch.Tensor, count: int, dim: int) -> None:
        self._tensor, self._dim = tensor, dim
        self._length = -(-tensor.size(dim) // count)

    def __getitem__(self, index: int) -> torch.Tensor:
        size = self._tensor.size(self._dim)
        start = index * self._length
        if start >= size:
            return self._tensor.new_empty(0)
        return self._tensor.narrow(self._dim, start, min(self._length, size - start))


class _Stream:
    def __init__(self, number: int) -> None:
        self.number = number

    def wait_stream(self, _other: Any) -> None:
        """Nothing runs, so nothing waits."""

    def wait_event(self, _event: Any) -> None:
        """The same."""

    def record_event(self, _event: Any = None) -> _Event:
        return _Event()


class _Event:
    def record(self, _stream: Any = None) -> _Event:
        return self

    def synchronize(self) -> None:
        """Nothing runs, so nothing waits."""

    def wait(self, _stream: Any = None) -> None:
        """The same."""


def _streams(ledger: Ledger) -> SimpleNamespace:
    """What FSDP2 and DeviceMesh ask of `torch.cuda`."""
    numbers = itertools.count(1)
    default = _Stream(0)
    current = [default]

    @contextmanager
    def entered(stream: _Stream) -> Iterator[None]:
        current.append(stream)
        ledger.stream = stream.number
        try:
            yield
        finally:
            current.pop()
            ledger.stream = current[-1].number

    return SimpleNamespace(
        Stream=lambda *_args, **_options: _Stream(next(numbers)),
        Event=lambda *_args, **_options: _Event(),
        stream=entered,
        current_stream=lambda *_device: current[-1],
        default_stream=lambda *_device: default,
        current_device=lambda: None,
        device_count=lambda: 1,
        set_device=lambda _device: None,
        is_initialized=lambda: True,
        is_available=lambda: True,
    )
