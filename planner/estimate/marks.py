"""What a method does to which tensor of which layer: trained, adapted, quantized, merged."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod

from planner.catalog.outputs import OUTPUTS, takes_adapter
from planner.estimate.parameters import trained_tensors
from planner.estimate.peft_form import Change, peft_form
from planner.estimate.quantized import quantized_tensors
from planner.estimate.recipes import recipe_of
from planner.model import Architecture, WeightTensor
from planner.spec import Adapter, LoRA, PeftConfig, QLoRA, Setup
from planner.targets import LoRATarget, adapted_weights, lora_targets

__all__ = ["Marks", "marks_of"]


@dataclass(slots=True)
class Marks:
    """What the method does to which layer of which tensor: layers, or () where there is no layer."""

    trained: dict[str, tuple[int, ...]]
    adapted: dict[str, list[Change]] = field(default_factory=dict)
    copies: bool = False  # whether modules are trained as copies, which unties them
    kind: str = ""
    bottleneck: Adapter | None = None
    outputs: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    hidden_size: int = 0
    biased: set[str] = field(default_factory=set)
    quantized: dict[str, tuple[int, ...]] = field(default_factory=dict)
    merged: dict[str, tuple[tuple[int, ...], tuple[int, int]]] = field(default_factory=dict)
    wide_bytes: int | None = None

    def is_trained(self, name: str, layer: int | None) -> bool:
        """Whether this layer's tensor is trained."""
        return _covers(self.trained.get(name), layer)

    def storage(self, tensor: WeightTensor) -> str:
        """Name of the tensor that holds its numbers."""
        return tensor.name if self.copies else tensor.tied_to or tensor.name

    def is_quantized(self, name: str, layer: int | None) -> bool:
        """Whether this layer's tensor is held quantized."""
        return _covers(self.quantized.get(name), layer)

    def change_of(self, weight: WeightTensor, layer: int | None) -> Change:
        """What the method puts beside this layer's weight; an empty change where nothing."""
        for change in self.adapted.get(weight.module, ()):
            if _covers(change.weight.layers, layer):
                return change
        return Change(weight=weight)

    def added_to(self, name: str, layer: int) -> tuple[int, int]:
        """Numbers in LoRA's A and B where peft adds their product to the parameter itself, else none."""
        layers, numels = self.merged.get(name, (None, (0, 0)))
        return numels if _covers(layers, layer) else (0, 0)

    def bottleneck_behind(self, module: str) -> int:
        """Width of the adapter behind a module, 0 where there is none."""
        if self.bottleneck is None or not takes_adapter(module, self.kind, *self.outputs):
            return 0
        return self.bottleneck.bottleneck(self.hidden_size)


def _covers(layers: tuple[int, ...] | None, layer: int | None) -> bool:
    return layers is not None and (layer is None or not layers or layer in layers)


def marks_of(setup: Setup, shape: Architecture) -> Marks:
    """The marks of the setup's method on its model's tensors."""
    model, method = setup.model, setup.method
    marks = Marks(
        trained={t.name: t.layers for t in trained_tensors(setup) if not t.added},
        biased={t.module for t in model.tensors if t.leaf == "bias"},
        hidden_size=shape.hidden_size,
        wide_bytes=recipe_of(setup).wide,
    )
    changes: Iterable[Change] = ()
    if isinstance(method, PeftConfig):
        form = peft_form(model, method)
        assert form is not None  # the caller asks for methods with formulas only
        changes = form.changes
        _merge(marks, form.merged, form.rank)
        marks.copies = bool(form.saved)
        marks.trained |= {t.name: t.layers for t in form.saved}
    elif isinstance(method, LoRA):
        rank, dropout = method.lora_rank, method.lora_dropout
        weights = adapted_weights(model, method.target_modules)
        changes = [Change(weight=t, rank=rank, dropout=dropout) for t in weights]
        _merge(marks, lora_targets(model, method.target_modules), rank)
        if isinstance(method, QLoRA):
            marks.quantized = {t.name: t.layers for t in quantized_tensors(model)}
    elif isinstance(method, Adapter):
        marks.bottleneck, marks.kind = method, method.adapter_kind
        marks.outputs = OUTPUTS.get(shape.family, ((shape.attention_output,), (shape.mlp_output,)))
    for change in changes:
        marks.adapted.setdefault(change.weight.module, []).append(change)
    return marks


def _merge(marks: Marks, targets: Iterable[LoRATarget], rank: int) -> None:
    for target in targets:
        if target.by_parameter:
            a, b = target.shapes(rank)
            marks.merged[target.weight.name] = (target.weight.layers, (prod(a), prod(b)))
