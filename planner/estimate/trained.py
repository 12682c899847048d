"""A tensor that is trained."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from planner.estimate.recipes import Recipe
from planner.model import WeightTensor

__all__ = ["TrainedTensor", "of_the_base"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedTensor:
    """`count` trained tensors of one shape; `added` where the method brought them along.

    `name` is the base model's parameter, or the module an added tensor sits on and its own name.
    `element_bytes` is a weight's and its gradient's. `layers` as in WeightTensor.
    """

    name: str
    shape: tuple[int, ...]
    element_bytes: int
    added: bool
    layers: tuple[int, ...] = ()

    @property
    def numel(self) -> int:
        """Elements of one tensor."""
        return math.prod(self.shape)

    @property
    def count(self) -> int:
        """How many tensors this entry stands for."""
        return len(self.layers) or 1


def of_the_base(tensors: Iterable[WeightTensor], recipe: Recipe) -> Iterator[TrainedTensor]:
    """The model's own tensors, trained as they are."""
    for t in tensors:
        yield TrainedTensor(
            name=t.name, shape=t.shape, element_bytes=recipe.weight_bytes(t), added=False, layers=t.layers
        )
