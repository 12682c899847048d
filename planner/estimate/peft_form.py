"""What an adapter_config.json does to a model, for the methods of peft that have formulas.

Matching of names is `planner.peft_targets`'; of ranks it follows peft 0.21, utils/other.py
(get_pattern_key). What is not read here is not guessed: `peft_form` is None, and `simulate` runs peft itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from planner.estimate import peft_defaults
from planner.methods import LoRABias, PeftConfig
from planner.model import Model, WeightTensor
from planner.peft_targets import file_matches
from planner.targets import OLD_EXPERT_NAMES, LoRATarget, module_matches

__all__ = ["Change", "PeftForm", "peft_form"]

Kind = Literal["lora", "ia3", "ln_tuning", "prompt_tuning", "prefix_tuning"]
_KINDS: dict[str, Kind] = {
    "LORA": "lora",
    "IA3": "ia3",
    "LN_TUNING": "ln_tuning",
    "PROMPT_TUNING": "prompt_tuning",
    "PREFIX_TUNING": "prefix_tuning",
}
# Said of the run or of a file, or of values alone: no number of bytes depends on it.
_NO_MATTER = frozenset(
    {
        *("peft_type", "task_type", "inference_mode", "auto_mapping", "base_model_name_or_path", "revision"),
        *("peft_version", "fan_in_fan_out", "use_rslora", "lora_alpha", "alpha_pattern", "megatron_core"),
        *("qalora_group_size", "init_ia3_weights", "prompt_tuning_init", "prompt_tuning_init_text"),
        *("tokenizer_name_or_path", "tokenizer_kwargs", "num_transformer_submodules", "ensure_weight_tying"),
    }
)
_READ: dict[Kind, frozenset[str]] = {
    "lora": frozenset(
        {
            *("r", "target_modules", "exclude_modules", "lora_dropout", "bias", "use_dora", "rank_pattern"),
            *("layers_to_transform", "layers_pattern", "modules_to_save", "init_lora_weights"),
            "target_parameters",
        }
    ),
    "ia3": frozenset({"target_modules", "exclude_modules", "feedforward_modules", "modules_to_save"}),
    "ln_tuning": frozenset({"target_modules", "exclude_modules", "modules_to_save"}),
    "prompt_tuning": frozenset({"num_virtual_tokens"}),
    "prefix_tuning": frozenset({"num_virtual_tokens"}),
}
_STARTS = (None, True, False, "gaussian", "orthogonal", "olora")  # init_lora_weights: values alone


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """A weight that a method works on, cut to the layers where it does so in this way.

    `rank` 0: no LoRA. `scaled` "inputs" or "outputs": IA3's vector multiplies the layer's input or output.
    """

    weight: WeightTensor
    rank: int = 0
    dropout: float = 0.0
    dora: bool = False
    scaled: Literal["", "inputs", "outputs"] = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class PeftForm:
    """`saved`: tensors of which a copy is trained. `virtual_tokens` stand before those of a sample.

    `merged`: parameters to which LoRA of `rank` adds the product of its matrices, whole.
    """

    kind: Kind
    changes: tuple[Change, ...] = ()
    saved: tuple[WeightTensor, ...] = ()
    bias: LoRABias = "none"
    virtual_tokens: int = 0
    merged: tuple[LoRATarget, ...] = ()
    rank: int = 0


def peft_form(model: Model, method: PeftConfig) -> PeftForm | None:
    """The form of a method on a model, kept with the model; None where there is none."""
    cache = model.__dict__.setdefault("_peft_forms", {})
    if method not in cache:
        cache[method] = _peft_form(model, method.values)
    return cache[method]  # type: ignore[no-any-return]


def _peft_form(model: Model, values: dict[str, Any]) -> PeftForm | None:
    kind = _KINDS.get(str(values["peft_type"]).upper())
    if kind is None or model.architecture is None:
        return None
    if any(value for key, value in values.items() if key not in _NO_MATTER and key not in _READ[kind]):
        return None
    try:
        if kind in ("prompt_tuning", "prefix_tuning"):
            if model.task != "causal-lm" or not _takes_prompts(model, kind):
                return None
            tokens = values["num_virtual_tokens"]
            return PeftForm(kind=kind, virtual_tokens=tokens) if _is_count(tokens) else None
        return _FORMS[kind](model, values)
    except (TypeError, ValueError, KeyError, AttributeError, re.error):
        return None  # peft says what is wrong with it


# A cache or key heads of their own: peft_model.py, get_prompt.
_NO_PREFIX = ("bloom", "falcon", "gemma2", "gemma3_text")


def _takes_prompts(model: Model, kind: Kind) -> bool:
    """Whether prompts fit what the layers take; peft cannot join them to OPT-350m's narrow embeddings."""
    shape = model.architecture
    assert shape is not None
    if kind == "prefix_tuning":
        return shape.family not in _NO_PREFIX
    return all(t.out_features == shape.hidden_size for t in model.tensors if t.role == "embedding")


def _lora(model: Model, values: Mapping[str, Any]) -> PeftForm | None:
    rank, bias = values.get("r", 8), values.get("bias", "none")
    if values.get("init_lora_weights") not in _STARTS or bias not in ("none", "all", "lora_only"):
        return None
    dora, dropout = bool(values.get("use_dora")), float(values.get("lora_dropout") or 0.0)
    named = values.get("target_parameters") or ()
    merged = _parameters(model, named)
    if named and (not merged or dora or dropout or values.get("rank_pattern")):
        return None
    alone = bool(named) and values.get("target_modules") is None
    wanted = [] if alone else _wanted(model, values, peft_defaults.LORA, ("linear", "conv1d", "embedding"))
    saved = _saved(model, values)
    if not (wanted or alone) or saved is None or not _is_count(rank):
        return None
    if dora and any(weight.kind == "embedding" for weight in wanted):
        return None
    patterns: dict[str, int] = values.get("rank_pattern") or {}
    changes = []
    for weight in wanted:
        by_rank: dict[int, list[int]] = {}
        for layer, name in _modules(weight):
            key = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", name)), None)
            by_rank.setdefault(rank if key is None else patterns[key], []).append(layer)
        for own, layers in by_rank.items():
            cut = replace(weight, layers=tuple(layers)) if weight.layers else weight
            changes.append(Change(weight=cut, rank=own, dropout=dropout, dora=dora))
    return PeftForm(
        kind="lora", changes=tuple(changes), saved=saved, bias=bias, merged=merged, rank=rank if merged else 0
    )


def _parameters(model: Model, named: Collection[str]) -> tuple[LoRATarget, ...]:
    """What `target_parameters` means of gpt-oss: its experts' weights; () where a name means anything else.

    Matched by the end of the full name (BaseTuner._inject_parameters); the default target_modules, which peft
    has for other families with experts, are not looked up.
    """
    if _family(model) != "gpt_oss":
        return ()
    found = []
    for tensor in model.tensors:
        names = list(zip(tensor.layers or (0,), tensor.names(), strict=True))
        layers = [layer for layer, name in names if any(module_matches(name, target) for target in named)]
        if layers and len(tensor.shape) != 3:
            return ()
        if layers:
            cut = replace(tensor, layers=tuple(layers))
            found.append(LoRATarget(weight=cut, by_parameter=True, transposed=True))
    return tuple(found)


def _ia3(model: Model, values: Mapping[str, Any]) -> PeftForm | None:
    wanted = _wanted(model, values, peft_defaults.IA3, ("linear", "conv1d"))
    saved = _saved(model, values)
    forward = values.get("feedforward_modules")
    if forward is None:
        forward = peft_defaults.FEEDFORWARD.get(_family(model))
    if not wanted or saved is None or forward is None:
        return None
    changes = []
    for weight in wanted:
        by_side: dict[bool, list[int]] = {}
        for layer, name in _modules(weight):
            if isinstance(forward, str):
                inward = re.fullmatch(forward, name) is not None
            else:
                inward = any(name.endswith(suffix) for suffix in forward)
            by_side.setdefault(inward, []).append(layer)
        for inward, layers in by_side.items():
            cut = replace(weight, layers=tuple(layers)) if weight.layers else weight
            changes.append(Change(weight=cut, scaled="inputs" if inward else "outputs"))
    return PeftForm(kind="ia3", changes=tuple(changes), saved=saved)


def _ln_tuning(model: Model, values: Mapping[str, Any]) -> PeftForm | None:
    """Copies of norms are trained in their place."""
    wanted = _wanted(model, values, peft_defaults.LN_TUNING, ("norm",))
    saved = _saved(model, values)
    if not wanted or saved is None:
        return None
    norms = {(t.module, t.layers): t for t in wanted}
    biases = [t for t in model.tensors if t.kind == "norm" and t.leaf == "bias"]
    copied = list(norms.values())
    for weight in norms.values():
        copied += [replace(b, layers=weight.layers) for b in biases if b.module == weight.module]
    return PeftForm(kind="ln_tuning", saved=(*copied, *saved))


_FORMS: dict[str, Callable[[Model, Mapping[str, Any]], PeftForm | None]] = {
    "lora": _lora,
    "ia3": _ia3,
    "ln_tuning": _ln_tuning,
}


def _wanted(
    model: Model,
    values: Mapping[str, Any],
    defaults: Mapping[str, tuple[str, ...]],
    kinds: tuple[str, ...],
) -> list[WeightTensor]:
    """The weights that `target_modules` means; [] where there are none, or one has no formula."""
    targets = values.get("target_modules")
    fused = _family(model) in OLD_EXPERT_NAMES and "embedding" in kinds  # LoRA
    if targets is None and fused:
        return []  # peft refuses it
    if targets is None:
        targets = defaults.get(_family(model), ())
    old = (*OLD_EXPERT_NAMES.get(_family(model), ()), "gate")
    if fused and (isinstance(targets, str) or set(targets) & set(old)):
        return []  # peft adapts fused experts here
    matches = partial(file_matches, values=values, targets=targets)
    if isinstance(targets, str) and targets.lower() == "all-linear":
        head = [t for t in model.linear_weights if t.role == "head"][-1:]
        linears = [t for t in model.linear_weights if t not in head]
        return _cut(linears, partial(file_matches, values=values, targets=None))
    found = _cut((t for t in model.tensors if t.leaf == "weight"), matches)
    return [] if any(t.kind not in kinds for t in found) else found


def _cut(weights: Iterable[WeightTensor], matches: Callable[[str], bool]) -> list[WeightTensor]:
    """Each weight in the layers whose module matches."""
    found = []
    for weight in weights:
        layers = [layer for layer, name in _modules(weight) if matches(name)]
        if layers:
            found.append(replace(weight, layers=tuple(layers)) if weight.layers else weight)
    return found


def _saved(model: Model, values: Mapping[str, Any]) -> tuple[WeightTensor, ...] | None:
    """Tensors of the modules in `modules_to_save`, by the end of the name: utils/other.py, _set_trainable."""
    found = []
    for name in values.get("modules_to_save") or ():
        for tensor in model.tensors:
            parts = tensor.module.split(".")
            if any(".".join(parts[:end]).endswith(name) for end in range(1, len(parts))):
                return None  # a module with others in it
            if tensor.module.endswith(name):
                found.append(replace(tensor, tied_to=None))
    return tuple(found)


def _modules(weight: WeightTensor) -> list[tuple[int, str]]:
    """The layer and the full name of each module that the entry stands for."""
    if not weight.layers:
        return [(0, weight.module)]
    return [(layer, weight.module.replace("*", str(layer))) for layer in weight.layers]


def _family(model: Model) -> str:
    return model.architecture.family if model.architecture else ""


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
