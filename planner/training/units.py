"""The units in which FSDP2 gathers a model, cut as accelerate cuts them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from planner.errors import SetupError

__all__ = ["Units", "units_of"]


@dataclass(frozen=True, kw_only=True)
class Units:
    """Modules that are gathered together: each of `blocks` alone, `embedding` alone, `tail` as one.

    What belongs to none of them is the root's, which is gathered first and kept to the end of the step.
    """

    blocks: tuple[nn.Module, ...]
    embedding: nn.Module | None
    tail: tuple[nn.Module, ...]

    def in_order(self) -> Iterator[nn.Module]:
        """The module that stands for each unit, in the order of the forward pass, the root left out."""
        if self.embedding is not None:
            yield self.embedding
        yield from self.blocks
        if self.embedding is not None and self.tail:
            yield self.tail[0]


def units_of(net: nn.Module, shard_unit: str | None = None) -> Units:
    """The units of a transformers or peft model; `shard_unit` names the block's class.

    Source: accelerate 1.15, utils/fsdp_utils.py, `fsdp2_prepare_model`: the classes of `_no_split_modules`,
    an untied input embedding, and the final norm with the head. Tied embeddings go to the tail.
    Raises SetupError where no module has the class.
    """
    model: Any = net
    names = [shard_unit] if shard_unit else list(getattr(model, "_no_split_modules", None) or ())
    blocks = tuple(m for m in _bottom_up(net) if type(m).__name__ in names and m is not net)
    if shard_unit and not blocks:
        known = {type(module).__name__ for module in net.modules() if len(list(module.children())) > 1}
        raise SetupError(
            f"shard_unit {shard_unit} is no module class of this model; it has {', '.join(sorted(known))}."
        )
    embedding = _asked(model, "get_input_embeddings")
    head = _asked(model, "get_output_embeddings")
    weights = getattr(embedding, "weight", None), getattr(head, "weight", None)
    tied = weights[0] is not None and weights[0] is weights[1]
    candidates = (_final_norm(model), embedding, head) if tied else (_final_norm(model), head)
    tail = tuple(module for module in candidates if module is not None and module not in blocks)
    inside = {part for block in blocks for part in block.modules()}
    if shard_unit and any(module in inside for module in (*tail, embedding)):
        raise SetupError(
            f"shard_unit {shard_unit} holds the embeddings, the final norm or the head, which have units of "
            "their own; name the class of a layer, or of a part of one."
        )
    return Units(blocks=blocks, embedding=None if tied else embedding, tail=tail)


def _asked(model: Any, question: str) -> nn.Module | None:
    found = getattr(model, question, lambda: None)()
    return found if isinstance(found, nn.Module) else None


def _final_norm(model: Any) -> nn.Module | None:
    """The last norm among the direct children of the base model; none under peft, whose wrapper hides it."""
    prefix = getattr(model, "base_model_prefix", "")
    base = getattr(model, prefix, None) if prefix else model
    if not isinstance(base, nn.Module):
        return None
    norms = [child for child in base.children() if "Norm" in type(child).__name__]
    return norms[-1] if norms else None


def _bottom_up(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield from _bottom_up(child)
    yield module
