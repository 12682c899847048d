"""The process group of a run: real ranks, or one rank among imagined ones (torch's own fake group)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from planner.errors import PlannerError

__all__ = ["imagined_group", "is_imagined", "real_group"]

_IMAGINED = "fake"  # torch.testing._internal.distributed.fake_pg registers this backend


@contextmanager
def imagined_group(ranks: int, rank: int) -> Iterator[None]:
    """Be `rank` of `ranks` in one process: collectives return at once and carry nothing.

    Raises PlannerError where a group stands already.
    """
    if dist.is_initialized():
        raise PlannerError("a process group stands in this process; take a rank in one of its own.")
    dist.init_process_group(_IMAGINED, store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def real_group(backend: str) -> Iterator[None]:
    """The group that a launcher's environment describes: `nccl` or `gloo`."""
    dist.init_process_group(backend)
    try:
        yield
    finally:
        dist.destroy_process_group()


def is_imagined() -> bool:
    """Whether the group of this process does not talk."""
    return bool(dist.get_backend() == _IMAGINED)
