"""Which modules of a model a PEFT method changes, decided on names and shapes alone.

Matching follows peft's rule for a list of names (`peft/tuners/tuners_utils.py`,
`check_target_module_exists`): a module matches when its full name equals the target or ends with
`.target`.
"""

from __future__ import annotations

from planner.errors import SetupError, nearest
from planner.model import Model, WeightTensor

__all__ = ["PRESETS", "adapted_weights", "adapter_places", "bias_tensors", "module_matches"]

PRESETS = ("attention", "all-linear")


def module_matches(module: str, target: str) -> bool:
    """Whether peft would adapt `module` (a full dotted name) for the name `target`."""
    return module == target or module.endswith("." + target)


def adapted_weights(model: Model, target_modules: tuple[str, ...]) -> tuple[WeightTensor, ...]:
    """Weights that LoRA adapts: Linear, Conv1D and embedding weights whose module matches.

    `("attention",)` is every linear layer of attention, `("all-linear",)` every linear layer but the
    output head (as peft's "all-linear"). Raises SetupError where a name matches nothing.
    """
    heads = [t for t in model.linear_weights if t.role == "head"]
    if target_modules == ("all-linear",):
        return tuple(t for t in model.linear_weights if t not in heads)
    if target_modules == ("attention",):
        return tuple(t for t in model.linear_weights if t.role == "attention")
    candidates = [
        t for t in model.tensors if t.kind in ("linear", "conv1d", "embedding") and t.leaf == "weight"
    ]
    for target in target_modules:
        if not any(_entry_matches(t, target) for t in candidates):
            names = {t.module.rpartition(".")[2] for t in candidates} | set(PRESETS)
            raise SetupError(
                f"target_modules: {model.id} has no linear layer named {target!r}; {nearest(target, names)}"
            )
    return tuple(
        narrowed
        for t in candidates
        if (narrowed := _narrowed(t, target_modules)) is not None
    )


def bias_tensors(model: Model) -> tuple[WeightTensor, ...]:
    """Every bias term: the tensors whose name ends in `bias`, tied ones left out (BitFit's set)."""
    return tuple(t for t in model.tensors if t.leaf == "bias" and not t.tied_to)


def adapter_places(model: Model, suffix: str) -> tuple[str, ...]:
    """Full names of the modules whose name ends with `suffix`, one for each layer."""
    found = {
        module.replace("*", str(layer))
        for t in model.tensors
        for module in _prefixes(t.module)
        if "*" in module and module_matches(module, suffix)
        for layer in t.layers
    }
    return tuple(sorted(found))


def _prefixes(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _entry_matches(tensor: WeightTensor, target: str) -> bool:
    return _narrowed(tensor, (target,)) is not None


def _narrowed(tensor: WeightTensor, targets: tuple[str, ...]) -> WeightTensor | None:
    """The entry cut to the layers that match; names such as `layers.3.self_attn.q_proj` match one."""
    if any(module_matches(tensor.module, target) for target in targets):
        return tensor
    layers = tuple(
        layer
        for layer in tensor.layers
        if any(module_matches(tensor.module.replace("*", str(layer)), target) for target in targets)
    )
    if not layers:
        return None
    return WeightTensor(
        name=tensor.name, shape=tensor.shape, role=tensor.role, kind=tensor.kind,
        layers=layers, tied_to=tensor.tied_to,
    )
