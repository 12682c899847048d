"""Exact numbers of parameters for each method, and the tensors that are trained.

Letters: `h` hidden size, `m` bottleneck, `r` rank, `l` layers, `k` key-value heads, `d` head width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from planner.catalog.outputs import OUTPUTS, takes_adapter
from planner.estimate.peft_form import PeftForm, peft_form
from planner.estimate.recipes import Recipe, recipe_of
from planner.estimate.trained import TrainedTensor, of_the_base
from planner.model import Model, WeightTensor
from planner.report import Parameters
from planner.spec import Adapter, BitFit, FullFineTuning, LoRA, PeftConfig, PeftOfSize, Setup
from planner.targets import bias_tensors, lora_targets, module_matches

__all__ = ["TrainedTensor", "adapter_counts", "parameters", "trained_tensors"]


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

    A method known by its size alone (PeftOfSize) is one tensor of that size; a PeftConfig without a form
    has no tensors here.
    """
    recipe = recipe_of(setup)
    method = setup.method
    if isinstance(method, PeftOfSize):
        shape = (method.trainable_params,)
        return (TrainedTensor(name="peft", shape=shape, element_bytes=recipe.adapter, added=True),)
    if isinstance(method, FullFineTuning):
        base = [t for t in setup.model.tensors if not t.tied_to]
        return tuple(of_the_base(base, recipe))
    if isinstance(method, BitFit):
        return tuple(of_the_base(bias_tensors(setup.model), recipe))
    if isinstance(method, LoRA):
        return tuple(_lora(setup.model, method, recipe))
    if isinstance(method, PeftConfig):
        form = peft_form(setup.model, method)
        return tuple(_of_peft(setup.model, form, recipe)) if form else ()
    return tuple(_bottlenecks(setup.model, method, recipe.adapter))


def _lora(model: Model, method: LoRA, recipe: Recipe) -> Iterator[TrainedTensor]:
    """A is [r, in], B is [out, r]: r (in + out) for each adapted weight (Hu et al. 2021, section 4.1)."""
    targets = lora_targets(model, method.target_modules)
    for target in targets:
        weight = target.weight
        place = weight.name if target.by_parameter else weight.module
        kind = "lora_embedding" if weight.kind == "embedding" else "lora"
        for leaf, shape in zip("AB", target.shapes(method.lora_rank), strict=True):
            yield TrainedTensor(
                name=f"{place}.{kind}_{leaf}",
                shape=shape,
                element_bytes=recipe.adapter,
                added=True,
                layers=weight.layers,
            )
    weights = [target.weight for target in targets]
    yield from of_the_base(_lora_biases(model, method.lora_bias, weights), recipe)


def _lora_biases(model: Model, bias: str, weights: Iterable[WeightTensor]) -> list[WeightTensor]:
    """Biases trained beside LoRA: peft/tuners/tuners_utils.py, `_mark_only_adapters_as_trainable`.

    `all`: every parameter whose last name part is "bias"; `lora_only`: those of the adapted modules.
    """
    if bias == "all":
        return list(bias_tensors(model))
    if bias == "none":
        return []
    adapted: dict[str, set[int]] = {}
    for weight in weights:
        adapted.setdefault(weight.module, set()).update(weight.layers)
    found = []
    for t in model.tensors:
        layers = tuple(layer for layer in t.layers if layer in adapted.get(t.module, ()))
        if t.leaf == "bias" and t.module in adapted and (layers or not t.layers):
            found.append(replace(t, layers=layers))
    return found


def _of_peft(model: Model, form: PeftForm, recipe: Recipe) -> Iterator[TrainedTensor]:
    """LoRA's A, B and DoRA's magnitude [out] (lora/layer.py, dora.py), IA3's vectors (ia3/layer.py), prompts
    [n, h] (prompt_tuning/model.py), the prefix [n, 2 l k d] (prefix_tuning/model.py), and copies of modules.
    """
    shape = model.architecture
    assert shape is not None  # else there is no form
    added: list[tuple[WeightTensor | None, str, tuple[int, ...]]] = []
    for change in form.changes:
        weight = change.weight
        inputs, outputs = weight.in_features, weight.out_features
        if change.scaled:
            wide = (1, inputs) if change.scaled == "inputs" else (outputs, 1)
            added.append((weight, "ia3_l", wide))
            continue
        kind = "lora_embedding_" if weight.kind == "embedding" else "lora_"
        added.append((weight, kind + "A", (change.rank, inputs)))
        added.append((weight, kind + "B", (outputs, change.rank)))
        if change.dora:
            added.append((weight, "lora_magnitude_vector", (outputs,)))
    for target in form.merged:
        for leaf, factor in zip("AB", target.shapes(form.rank), strict=True):
            added.append((target.weight, f"{target.weight.leaf}.lora_{leaf}", factor))
    if form.kind == "prompt_tuning":
        added.append((None, "embedding", (form.virtual_tokens, shape.hidden_size)))
    elif form.kind == "prefix_tuning":
        width = 2 * shape.num_layers * shape.num_key_value_heads * shape.head_dim
        added.append((None, "embedding", (form.virtual_tokens, width)))
    for weight_, leaf, size in added:
        name = f"{weight_.module}.{leaf}" if weight_ else f"prompt_encoder.{leaf}"
        layers = weight_.layers if weight_ else ()
        yield TrainedTensor(name=name, shape=size, element_bytes=recipe.adapter, added=True, layers=layers)
    for copied in of_the_base(form.saved, recipe):
        yield replace(copied, added=True)
    adapted = [change.weight for change in form.changes]
    yield from of_the_base(_lora_biases(model, form.bias, adapted), recipe)


def adapter_counts(model: Model, method: Adapter) -> tuple[int, int]:
    """How many adapters the model gets after attention and after the MLP."""
    shape = model.architecture
    if shape is None:
        return 0, 0
    attention, mlp = OUTPUTS.get(shape.family, ((shape.attention_output,), (shape.mlp_output,)))
    counts = [0, 0]
    for module in _modules(model):
        if takes_adapter(module, method.adapter_kind, attention, mlp):
            of_mlp = not any(module_matches(module, suffix) for suffix in attention)
            counts[of_mlp] += 1
    return counts[0], counts[1]


def _modules(model: Model) -> set[str]:
    """Full names of all modules that hold parameters, themselves or in a module below."""
    found: set[str] = set()
    for tensor in model.tensors:
        for name in tensor.names():
            module = name.rpartition(".")[0]
            while module and module not in found:
                found.add(module)
                module = module.rpartition(".")[0]
    return found


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
    for count in adapter_counts(model, method):
        for leaf, shape in shapes.items() if count else ():
            yield TrainedTensor(
                name=f"adapter.{leaf}",
                shape=shape,
                element_bytes=element_bytes,
                added=True,
                layers=tuple(range(count)),
            )
