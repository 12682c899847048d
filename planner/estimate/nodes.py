"""What a tape is made of: tensors without values, operations on them, and moments of a backward pass."""

from __future__ import annotations

from planner.estimate.resident import block_bytes

__all__ = ["Moment", "Node", "Tensor", "kept_factors"]


class Tensor:
    """A tensor without values. A view has its base as `owner` and no bytes of its own."""

    __slots__ = ("element", "needs_grad", "numel", "owner", "size_bytes")

    def __init__(self, numel: int, element: int, needs_grad: bool, owner: Tensor | None = None) -> None:
        """`element` is the bytes of one element, `numel` how many there are."""
        self.numel = numel
        self.element = element
        self.needs_grad = needs_grad
        self.size_bytes = block_bytes(numel * element)
        self.owner: Tensor = owner or self


def kept_factors(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """What a product of the two keeps: each where the other needs a gradient (derivatives.yaml, mm, mul)."""
    return tuple([kept for kept, other in ((x, y), (y, x)) if other.needs_grad])


class Node:
    """One operation: what goes in and out, what autograd keeps, what its backward needs beside it."""

    __slots__ = (
        "aliases",
        "freed_bytes",
        "inputs",
        "keeps_late",
        "kept",
        "outputs",
        "pinned",
        "reads_weight",
        "replaces",
        "scratch_bytes",
        "weight_bytes",
        "work_bytes",
    )

    def __init__(
        self,
        inputs: tuple[Tensor, ...],
        outputs: tuple[Tensor, ...],
        kept: tuple[Tensor, ...] = (),
        aliases: bool = False,
        scratch_bytes: int = 0,
        weight_bytes: int = 0,
        work_bytes: int = 0,
        reads_weight: bool = False,
        pinned: tuple[Tensor, ...] = (),
        freed_bytes: int = 0,
        keeps_late: bool = False,
        replaces: bool = False,
    ) -> None:
        """`aliases`: the inputs' gradients are the output's own; all others as in `Tape.op`."""
        self.inputs = inputs
        self.outputs = outputs
        self.kept = kept
        self.aliases = aliases
        self.scratch_bytes = scratch_bytes
        self.weight_bytes = weight_bytes
        self.work_bytes = work_bytes
        self.reads_weight = reads_weight
        self.pinned = pinned
        self.freed_bytes = freed_bytes
        self.keeps_late = keeps_late
        self.replaces = replaces


class Moment:
    """Bytes alive at one moment of a backward pass: kept tensors, gradients of weights, all others."""

    __slots__ = ("gradients_bytes", "kept_bytes", "temporaries_bytes", "total_bytes")

    def __init__(self, kept_bytes: int, temporaries_bytes: int, gradients_bytes: int) -> None:
        """`total_bytes` is their sum."""
        self.kept_bytes = kept_bytes
        self.temporaries_bytes = temporaries_bytes
        self.gradients_bytes = gradients_bytes
        self.total_bytes = kept_bytes + temporaries_bytes + gradients_bytes
