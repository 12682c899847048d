"""What FSDP2 allocates for one unit: shards, gathered weights, gradients and the buffers of its collectives.

Source: torch 2.13, distributed/fsdp/_fully_shard/_fsdp_collectives.py and _fsdp_param_group.py.
Held against the simulation of the same code; no device has run it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from planner.estimate.rounding import block_bytes, packed_bytes
from planner.estimate.shards import Piece, chunk_numel

__all__ = ["UnitMemory", "unit_memory"]

_REDUCED_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitMemory:
    """Bytes of one unit on one rank.

    `gathered`: the whole weights; `buffer`: the all-gather's output, as large again; `copied`: the shards in
    the gathered type, while the buffer is filled. `unsharded_gradients` are autograd's, `accumulated` what
    waits of them for the last micro batch, `reduce_input` and `reduce_output` the reduce-scatter's,
    `gradients` what the rank keeps of it. `last_gradient`: the unit's last one (`last_accumulated` where
    some waited), which a loop's variable in `foreach_reduce` holds until it returns. `waiting_reduced`:
    HSDP holds the reduced shard in the reduction's type to the end of the backward pass.
    """

    gathered: int = 0
    buffer: int = 0
    copied: int = 0
    unsharded_gradients: int = 0
    accumulated: int = 0
    reduce_input: int = 0
    reduce_output: int = 0
    last_gradient: int = 0
    last_accumulated: int = 0
    gradients: int = 0
    waiting_reduced: int = 0

    @property
    def arriving_bytes(self) -> int:
        """The most while the unit is gathered: the buffer with the cast shards, then with whole weights."""
        return self.buffer + max(self.copied, self.gathered)

    def reducing_bytes(self, *, accumulated: bool) -> int:
        """What the reduction holds beside what stays of it when its output has been cast."""
        stays = self.gradients + self.waiting_reduced
        last = self.last_accumulated if accumulated else self.last_gradient
        return self.reduce_input + self.reduce_output + last - stays


def unit_memory(
    unit: Sequence[Piece],
    ranks: int,
    *,
    reduce_dtype: str | None,
    offloaded: bool = False,
    replicated: bool = False,
    together: int = 1,
) -> UnitMemory:
    """The bytes of a unit whose copy is split over `ranks`. `reduce_dtype` None: the gradients' own.

    `offloaded`: shards live in the host's memory; `replicated`: HSDP; `together`: how many such units are
    gathered at once, which share the allocator's segments.
    """
    if not unit:
        return UnitMemory()
    padded = [(piece, chunk_numel(piece.shape, ranks)) for piece in unit]
    trained = [(piece, numel) for piece, numel in padded if piece.trained]
    shard = sum(numel * piece.gathered_element_bytes for piece, numel in padded)
    casts = any(piece.element_bytes != piece.gathered_element_bytes for piece in unit)
    reduced = sum(
        numel * (_REDUCED_BYTES[reduce_dtype] if reduce_dtype else piece.gathered_element_bytes)
        for piece, numel in trained
    )
    kept = sum(numel * piece.element_bytes for piece, numel in trained)
    recast = kept != reduced
    gathered = [ranks * numel * piece.gathered_element_bytes for piece, numel in padded]
    whole = [piece.numel * piece.gathered_element_bytes for piece, _ in trained]
    later = whole
    if reduce_dtype and any(_REDUCED_BYTES[reduce_dtype] != p.gathered_element_bytes for p, _ in trained):
        later = [piece.numel * _REDUCED_BYTES[reduce_dtype] for piece, _ in trained]
    return UnitMemory(
        gathered=packed_bytes(gathered * together) // together,
        buffer=block_bytes(ranks * shard),
        copied=_copied(padded, shard, casts=casts, offloaded=offloaded),
        unsharded_gradients=packed_bytes(whole),
        accumulated=packed_bytes(later),
        reduce_input=block_bytes(ranks * reduced),
        reduce_output=block_bytes(reduced) + (block_bytes(kept) if recast else 0),
        last_gradient=block_bytes(whole[-1]) if whole else 0,
        last_accumulated=block_bytes(later[-1]) if later else 0,
        gradients=0 if offloaded else block_bytes(kept),
        waiting_reduced=block_bytes(reduced) if replicated and recast else 0,
    )


def _copied(padded: Iterable[tuple[Piece, int]], shard_bytes: int, *, casts: bool, offloaded: bool) -> int:
    """Shards that are not gathered as they lie: cast to the gathered type, or brought from the host."""
    if offloaded:  # tensor by tensor; each is cast once it is there
        largest = max((numel * piece.element_bytes for piece, numel in padded), default=0) if casts else 0
        return block_bytes(shard_bytes) + block_bytes(largest)
    return block_bytes(shard_bytes) if casts else 0
