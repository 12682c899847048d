"""Where a setup is simulated: one device alone, or one rank among several."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from planner.errors import SetupError
from planner.sharding import Sharding
from planner.simulate.simulation import Simulation

__all__ = ["rank_notes", "simulated_place"]


def simulated_place(
    sharding: Sharding, rank: int | None, **options: Any
) -> tuple[Simulation, AbstractContextManager[None]]:
    """A simulation, and the context in which its run is built and taken. `rank` None: 0, the largest.

    Raises SetupError for a rank that is not there.
    """
    if not sharding.is_distributed:
        if rank is not None:
            raise SetupError(f"rank {rank} is one of several, and this setup has one GPU; leave it out.")
        return Simulation(**options), nullcontext()
    from planner.simulate.sharded import sharded_device  # torch.distributed.fsdp takes a second to import
    from planner.simulate.sharded_trace import ShardedTracer

    chosen = _rank(sharding, rank)
    simulation = Simulation(tracer=ShardedTracer, **options)
    tracer = simulation.tracer
    assert isinstance(tracer, ShardedTracer)
    return simulation, sharded_device(sharding, chosen, tracer)


def rank_notes(sharding: Sharding, rank: int | None) -> tuple[str, ...]:
    """What a reader of one rank's report must know; nothing where there is one GPU."""
    if not sharding.is_distributed:
        return ()
    return (
        f"Rank {rank or 0} of {sharding.num_gpus:,}. Ranks differ by the padding of their shards alone; "
        "NCCL's buffers lie outside torch's allocator and are not in these numbers.",
    )


def _rank(sharding: Sharding, rank: int | None) -> int:
    if rank is None:
        return 0
    if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank < sharding.num_gpus:
        raise SetupError(
            f"rank must be a whole number from 0 to {sharding.num_gpus - 1} (num_gpus - 1), got {rank!r}."
        )
    return rank
