"""Which tensors of a model a PEFT method changes, decided on names and shapes alone.

Matching follows peft's rule for a list of names (`peft/tuners/tuners_utils.py`,
`check_target_module_exists`): a module matches when its full name equals the target or ends with
`.target`. In some mixtures of experts peft turns names into parameters: see `lora_targets`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from planner.errors import SetupError, nearest
from planner.model import Model, WeightTensor

__all__ = [
    "OLD_EXPERT_NAMES",
    "PRESETS",
    "LoRATarget",
    "adapted_weights",
    "adapter_places",
    "adapts_experts",
    "bias_tensors",
    "lora_targets",
    "module_matches",
]

PRESETS = ("attention", "all-linear")
_PRESETS = tuple((name,) for name in PRESETS)

_ROUTER = "gate"
# peft refuses these: peft/tuners/tuners_utils.py, `_check_lora_target_modules_mamba`.
_MAMBA = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})
_NOT_IN_MAMBA = "out_proj"
# Model types whose experts were linear layers in transformers 4 and are fused parameters in 5, with the old
# names of an expert's gate, up and down: peft 0.21, utils/transformers_weight_conversion.py, over
# transformers 5.23, conversion_mapping.py. qwen2_moe itself is not among them. A test reads both.
OLD_EXPERT_NAMES: dict[str, tuple[str, str, str]] = {
    model_type: old
    for old, types in (
        (("w1", "w3", "w2"), "mixtral minimax minimax_m2"),
        (
            ("gate_proj", "up_proj", "down_proj"),
            "qwen3_moe qwen3_next qwen3_omni_moe qwen3_omni_moe_thinker qwen3_omni_moe_text olmoe flex_olmo "
            "deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe glm4_moe_lite glm4v_moe glm_moe_dsa ernie4_5_moe "
            "dots1 afmoe beam cohere2_moe exaone_moe hunyuan_v1_moe longcat_flash mellum solar_open",
        ),
    )
    for model_type in types.split()
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LoRATarget:
    """A weight that LoRA adapts. `fused` is how many matrices of an expert lie in one tensor for peft.

    `by_parameter`: peft wraps the parameter and not a module (fused experts `[experts, out, in]`, a router).
    `transposed`: experts are `[experts, in, out]`.
    """

    weight: WeightTensor
    by_parameter: bool = False
    fused: int = 1
    transposed: bool = False

    def shapes(self, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of A `[r, in]` and B `[out, r]`, of an embedding `[r, rows]` and `[width, r]`.

        Fused experts have r rows for each matrix of each expert. Source: peft 0.21, tuners/lora/layer.py,
        `update_layer` of LoraLayer, Embedding and ParamWrapper.
        """
        shape = self.weight.shape
        if len(shape) == 3:
            experts, outputs, inputs = (shape[0], shape[2], shape[1]) if self.transposed else shape
            rank *= experts * self.fused
        else:
            inputs, outputs = self.weight.in_features, self.weight.out_features
        return (rank, inputs), (outputs, rank)


def module_matches(module: str, target: str) -> bool:
    """Whether peft would adapt `module` (a full dotted name) for the name `target`."""
    return module == target or module.endswith("." + target)


def lora_targets(model: Model, target_modules: tuple[str, ...]) -> tuple[LoRATarget, ...]:
    """All that LoRA adapts: Linear, Conv1D and embedding weights, and what peft makes of experts' names.

    `("attention",)` is every linear layer of attention; `("all-linear",)` every linear layer but the
    output embedding, as peft's. Where peft knows a model's experts by their old names, these (and
    "all-linear") mean the fused experts and the router of every layer, and no dense layer of that name.
    Raises SetupError where a name matches nothing, or only a part of a fused tensor.
    """
    old = OLD_EXPERT_NAMES.get(_model_type(model))
    if old is None:
        weights = _modules(model, target_modules)
        if _model_type(model) in _MAMBA and any(module_matches(t.module, _NOT_IN_MAMBA) for t in weights):
            raise SetupError(
                f"target_modules: peft adapts no {_NOT_IN_MAMBA} in a Mamba model such as {model.id}; name "
                "other modules, such as in_proj."
            )
        return tuple(LoRATarget(weight=t) for t in weights)
    names = _names(model, target_modules, old)
    asked = {old_name for name in names for old_name in (*old, _ROUTER) if module_matches(name, old_name)}
    gate, up, _ = old
    if len(given := asked & {gate, up}) == 1:
        raise SetupError(
            f"target_modules {','.join(target_modules)} means {given.pop()} alone, but peft takes {gate} and "
            f"{up} of {model.id} for one tensor of its experts; name both or neither."
        )
    kept = tuple(n for n in names if not any(module_matches(n, old_name) for old_name in (*old, _ROUTER)))
    found = [LoRATarget(weight=t) for t in _modules(model, kept)] if kept else []
    found += _fused(model, old, asked, required=target_modules not in _PRESETS)
    order = {t.name: index for index, t in enumerate(model.tensors)}
    return tuple(sorted(found, key=lambda target: order[target.weight.name]))


def adapted_weights(model: Model, target_modules: tuple[str, ...]) -> tuple[WeightTensor, ...]:
    """The Linear, Conv1D and embedding weights among `lora_targets`, without experts and routers."""
    return tuple(t.weight for t in lora_targets(model, target_modules) if not t.by_parameter)


def adapts_experts(model: Model, target_modules: tuple[str, ...]) -> bool:
    """Whether peft adapts fused experts or a router here: activations without formulas; no LoRA dropout."""
    return any(t.by_parameter for t in lora_targets(model, target_modules))


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


def _model_type(model: Model) -> str:
    return model.architecture.family if model.architecture else str(model.config.get("model_type", ""))


def _modules(model: Model, target_modules: tuple[str, ...]) -> tuple[WeightTensor, ...]:
    """The weights of the modules that a preset or names mean, as in a model without fused experts."""
    if target_modules == ("all-linear",):
        return tuple(_hidden_linears(model))
    if target_modules == ("attention",):
        return tuple(t for t in model.linear_weights if t.role == "attention")
    candidates = [
        t for t in model.tensors if t.kind in ("linear", "conv1d", "embedding") and t.leaf == "weight"
    ]
    for target in target_modules:
        if not any(_narrowed(t, (target,)) for t in candidates):
            names = {t.module.rpartition(".")[2] for t in candidates} | set(PRESETS)
            names |= set(OLD_EXPERT_NAMES.get(_model_type(model), ()))
            raise SetupError(
                f"target_modules: {model.id} has no linear layer named {target!r}; {nearest(target, names)}"
            )
    return tuple(found for t in candidates if (found := _narrowed(t, target_modules)) is not None)


def _hidden_linears(model: Model) -> Iterator[WeightTensor]:
    """Every linear weight but the output embedding's: the last of the head (BERT's has a layer before it)."""
    head = [t for t in model.linear_weights if t.role == "head"][-1:]
    return (t for t in model.linear_weights if t not in head)


def _names(model: Model, target_modules: tuple[str, ...], old: Iterable[str]) -> tuple[str, ...]:
    """The names that peft resolves a preset to before it looks for experts, `*` for the layer's index."""
    if target_modules == ("all-linear",):
        leaves = dict.fromkeys(t.module.rpartition(".")[2] for t in _hidden_linears(model))
        return tuple(leaves | dict.fromkeys((*old, _ROUTER)))
    if target_modules == ("attention",):
        return tuple(t.module for t in _modules(model, target_modules))
    return target_modules


def _fused(
    model: Model, old: tuple[str, str, str], asked: set[str], *, required: bool
) -> Iterator[LoRATarget]:
    """The parameters that peft 0.21 takes for the old names: `_convert_peft_config_moe`."""
    gate, _, down = old
    meanings = ((gate, ".gate_up_proj", 2), (down, ".down_proj", 1), (_ROUTER, ".gate.weight", 1))
    for name, suffix, fused in meanings:
        matching = [t for t in model.tensors if name in asked and t.name.endswith(suffix)]
        if required and name in asked and not matching:
            raise SetupError(
                f"target_modules: peft takes {name!r} in a {_model_type(model)} for its experts or their "
                f"router, and {model.id} has none; leave it out."
            )
        for tensor in matching:
            yield LoRATarget(weight=tensor, by_parameter=True, fused=fused)


def _prefixes(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _narrowed(tensor: WeightTensor, targets: tuple[str, ...]) -> WeightTensor | None:
    """The entry cut to the layers that match; names such as `layers.3.self_attn.q_proj` match one."""
    if any(module_matches(tensor.module, target) for target in targets):
        return tensor
    layers = tuple(
        layer
        for layer in tensor.layers
        if any(module_matches(tensor.module.replace("*", str(layer)), target) for target in targets)
    )
    return replace(tensor, layers=layers) if layers else None
