"""Exact numbers of parameters for each method, and the tensors that are trained.

Letters: `h` hidden size, `m` bottleneck, `r` rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from planner.estimate.recipes import RECIPES
from planner.model import Model, WeightTensor
from planner.report import Parameters
from planner.spec import Adapter, BitFit, FullFineTuning, LoRA, PeftOfSize, Setup
from planner.targets import adapted_weights, adapter_places, bias_tensors

__all__ = ["TrainedTensor", "adapter_module_places", "parameters", "trained_tensors"]


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


def parameters(setup: Setup) -> Parameters:
    """Parameters in total (base and added, as peft counts), trained and added; tied weights once.

    Equal to `sum(p.numel())` of transformers' class with peft's adapter on it.
    """
    model, method = setup.model, setup.method
    if isinstance(method, PeftOfSize):
        added = method.trainable_params
        return Parameters(total=model.parameters + added, trainable=added, added=added)
    if model.is_bare:
        return Parameters(total=model.parameters, trainable=model.parameters)
    tensors = trained_tensors(setup)
    trainable = sum(t.numel * t.count for t in tensors)
    added = sum(t.numel * t.count for t in tensors if t.added)
    return Parameters(total=model.parameters + added, trainable=trainable, added=added)


def trained_tensors(setup: Setup) -> tuple[TrainedTensor, ...]:
    """Every trained tensor, in the order of the model's parameters; () for a bare parameter count.

    A method known by its size alone (PeftOfSize) is one tensor of that size.
    """
    recipe = RECIPES[setup.training.precision]
    method = setup.method
    if isinstance(method, PeftOfSize):
        shape = (method.trainable_params,)
        return (TrainedTensor(name="peft", shape=shape, element_bytes=recipe.adapter, added=True),)
    if isinstance(method, FullFineTuning):
        base = [t for t in setup.model.tensors if not t.tied_to]
        return tuple(_of_the_base(base, recipe.base))
    if isinstance(method, BitFit):
        return tuple(_of_the_base(bias_tensors(setup.model), recipe.base))
    if isinstance(method, LoRA):
        return tuple(_lora(setup.model, method, recipe.base, recipe.adapter))
    return tuple(_bottlenecks(setup.model, method, recipe.adapter))


def _of_the_base(tensors: Iterable[WeightTensor], element_bytes: int) -> Iterator[TrainedTensor]:
    for t in tensors:
        yield TrainedTensor(
            name=t.name, shape=t.shape, element_bytes=element_bytes, added=False, layers=t.layers
        )


def _lora(model: Model, method: LoRA, base_bytes: int, adapter_bytes: int) -> Iterator[TrainedTensor]:
    """A is [r, in], B is [out, r]: r (in + out) for each adapted weight (Hu et al. 2021, section 4.1).

    An embedding has A [r, rows] and B [width, r]: peft/tuners/lora/layer.py, `update_layer`.
    """
    rank = method.lora_rank
    weights = adapted_weights(model, method.target_modules)
    for t in weights:
        kind = "lora_embedding" if t.kind == "embedding" else "lora"
        for leaf, shape in (("A", (rank, t.in_features)), ("B", (t.out_features, rank))):
            yield TrainedTensor(
                name=f"{t.module}.{kind}_{leaf}",
                shape=shape,
                element_bytes=adapter_bytes,
                added=True,
                layers=t.layers,
            )
    yield from _of_the_base(_lora_biases(model, method, weights), base_bytes)


def _lora_biases(model: Model, method: LoRA, weights: tuple[WeightTensor, ...]) -> list[WeightTensor]:
    """Biases trained beside LoRA: peft/tuners/tuners_utils.py, `_mark_only_adapters_as_trainable`.

    `all`: every parameter with "bias" in its name; `lora_only`: those of the adapted modules.
    """
    if method.lora_bias == "all":
        return [t for t in model.tensors if "bias" in t.name and not t.tied_to]
    if method.lora_bias == "none":
        return []
    adapted = {t.module: t.layers for t in weights}
    return [
        replace(t, layers=adapted[t.module])
        for t in model.tensors
        if t.leaf == "bias" and t.module in adapted
    ]


def adapter_module_places(model: Model, method: Adapter) -> tuple[tuple[str, ...], ...]:
    """Names of the modules that get an adapter behind them: (after attention, after the MLP)."""
    shape = model.architecture
    if shape is None:
        return ((), ())
    houlsby = method.adapter_kind == "houlsby"
    return (
        adapter_places(model, shape.attention_output) if houlsby else (),
        adapter_places(model, shape.mlp_output),
    )


def _bottlenecks(model: Model, method: Adapter, element_bytes: int) -> Iterator[TrainedTensor]:
    """Down [m, h] and up [h, m] with biases: 2 h m + m + h for each place (Houlsby et al. 2019, 2.1)."""
    assert model.architecture is not None  # refused by Setup
    hidden = model.architecture.hidden_size
    size = method.bottleneck(hidden)
    shapes = {
        "down.weight": (size, hidden),
        "down.bias": (size,),
        "up.weight": (hidden, size),
        "up.bias": (hidden,),
    }
    for places in adapter_module_places(model, method):
        for leaf, shape in shapes.items() if places else ():
            yield TrainedTensor(
                name=f"adapter.{leaf}",
                shape=shape,
                element_bytes=element_bytes,
                added=True,
                layers=tuple(range(len(places))),
            )
