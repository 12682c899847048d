"""Counts and shapes of what each method trains, over the whole catalogue, against peft and the training step.

LoRA: peft's own model on the `meta` device; adapters and BitFit: the modules that the step trains. Full size,
every layer, and every trained tensor's shape; entries whose tensors are all equal (a base model and its chat
version) are held once.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator

import peft
import pytest
import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_DEFAULTS
from torch import nn
from transformers.pytorch_utils import Conv1D

from planner import catalog
from planner.errors import SetupError
from planner.estimate.parameters import parameters, trained_tensors
from planner.model import Model
from planner.spec import Adapter, BitFit, LoRA, Method, Setup
from planner.training.attach import attached
from planner.training.build import skeleton

RANK, ALPHA = 4, 8.0
ATTENTION, ALL_LINEAR = LoRA(lora_rank=RANK), LoRA(lora_rank=RANK, target_modules=("all-linear",))
HOULSBY = Adapter(adapter_kind="houlsby", adapter_size=16)
PFEIFFER = Adapter(adapter_kind="pfeiffer", adapter_reduction_factor=16)


@pytest.fixture(autouse=True)
def no_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """On `meta` there is nothing to initialize; skipping it saves time."""
    monkeypatch.setattr(nn.Linear, "reset_parameters", lambda self: None)


def distinct() -> list[str]:
    """Names of catalogue entries, one for each list of tensors."""
    first: dict[object, str] = {}
    for name in catalog.models():
        model = catalog.model(name)
        first.setdefault((model.task, model.architecture.family, model.tensors), name)
    return list(first.values())


def layers(name: str) -> int:
    return catalog.model(name).architecture.num_layers


DISTINCT = distinct()
FAMILIES = {  # the shallowest entry of each
    catalog.model(name).architecture.family: name
    for name in sorted(DISTINCT, key=layers, reverse=True)
}
# Deeper entries whose family has one of at most this depth: LoRA on every linear layer only, and Houlsby's
# adapters only. These touch what the other targets and Pfeiffer's touch, and cost the most time.
DEEP = 32


def is_deep(name: str) -> bool:
    return layers(name) > DEEP and name not in FAMILIES.values()


def bare(model: Model) -> nn.Module:
    return skeleton(model, dtype=torch.bfloat16)


def with_peft(net: nn.Module, targets: str | list[str], bias: str = "none") -> nn.Module:
    """What a user of peft gets for these targets."""
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=targets,
        bias=bias,
        init_lora_weights=False,
    )
    with warnings.catch_warnings():  # fan_in_fan_out of Conv1D, tied embeddings, names of another version
        warnings.simplefilter("ignore")
        return peft.get_peft_model(net, config, low_cpu_mem_usage=True)


def attention_layers(net: nn.Module) -> list[str]:
    """Linear layers of attention, found by the classes of the modules around them."""
    blocks = [(name, block) for name, block in net.named_modules() if "Attention" in type(block).__name__]
    return [
        f"{name}.{inner}"
        for name, block in blocks
        for inner, layer in block.named_modules()
        if isinstance(layer, nn.Linear | Conv1D)
    ]


def assert_same(model: Model, method: Method, net: nn.Module) -> None:
    setup = Setup(model=model, method=method)
    shapes: Counter[tuple[int, ...]] = Counter()
    for tensor in trained_tensors(setup):
        shapes[tensor.shape] += tensor.count
    trained = [p for p in net.parameters() if p.requires_grad]
    assert shapes == Counter(tuple(p.shape) for p in trained), (model.id, method)
    counted = parameters(setup)
    total, trainable = sum(p.numel() for p in net.parameters()), sum(p.numel() for p in trained)
    assert (counted.total, counted.trainable) == (total, trainable), (model.id, method)
    assert counted.added == total - model.parameters, (model.id, method)


@pytest.mark.parametrize("name", DISTINCT)
def test_lora_is_pefts(name: str) -> None:
    model = catalog.model(name)
    assert_same(model, ALL_LINEAR, with_peft(bare(model), "all-linear"))
    if is_deep(name):
        return
    net = bare(model)
    assert_same(model, ATTENTION, with_peft(net, attention_layers(net)))
    if default := PEFT_DEFAULTS.get(model.config["model_type"]):
        method = LoRA(lora_rank=RANK, target_modules=tuple(default))
        assert_same(model, method, with_peft(bare(model), default))


@pytest.mark.parametrize("name", DISTINCT)
def test_adapters_and_bitfit_are_the_training_steps(name: str) -> None:
    model = catalog.model(name)
    net = bare(model)
    if any(parameter.rpartition(".")[2] == "bias" for parameter, _ in net.named_parameters()):
        assert_same(model, BitFit(), attached(net, model, BitFit()))
    else:
        with pytest.raises(SetupError, match="BitFit trains bias terms"):
            Setup(model=model, method=BitFit())
    assert_same(model, HOULSBY, attached(net, model, HOULSBY))  # BitFit has added nothing
    if not is_deep(name):
        assert_same(model, PFEIFFER, attached(bare(model), model, PFEIFFER))


def more_lora(model: Model) -> Iterator[LoRA]:
    """Every way to say it: biases, the head, tables of embeddings, one layer's module by its full name."""
    yield LoRA(lora_rank=RANK, lora_bias="lora_only")
    yield LoRA(lora_rank=RANK, lora_bias="lora_only", target_modules=("all-linear",))
    if any(t.leaf == "bias" for t in model.tensors):
        yield LoRA(lora_rank=RANK, lora_bias="all")
    tables = [t for t in model.tensors if t.role == "embedding" and t.leaf == "weight" and not t.tied_to]
    head = [t for t in model.linear_weights if t.role == "head"][-1]
    yield LoRA(lora_rank=RANK, target_modules=(tables[0].module.rpartition(".")[2],), lora_bias="lora_only")
    names = (*(t.module for t in tables), head.module)
    yield LoRA(lora_rank=1, target_modules=names)  # 1: BERT has a table of 2 rows
    deep = next(t for t in model.linear_weights if t.role == "attention")
    one = deep.module.replace("*", str(deep.layers[-1]))
    yield LoRA(lora_rank=RANK, target_modules=(one,), lora_bias="lora_only")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_to_name_targets_is_attached_as_counted(family: str) -> None:
    model = catalog.model(FAMILIES[family])
    for method in more_lora(model):
        assert_same(model, method, attached(bare(model), model, method, low_memory=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_preset_attention_reaches_peft_as_these_layers(family: str) -> None:
    """The step's model has the very tensors, by name, of peft on the layers inside attention."""
    model = catalog.model(FAMILIES[family])
    net = bare(model)
    theirs = with_peft(net, attention_layers(net))
    ours = attached(bare(model), model, ATTENTION, low_memory=True)
    shapes = ({n: tuple(p.shape) for n, p in each.named_parameters()} for each in (ours, theirs))
    assert next(shapes) == next(shapes)


def test_the_whole_catalogue_is_held() -> None:
    assert len(DISTINCT) > 100
    held = {catalog.model(name).tensors for name in DISTINCT}
    assert all(catalog.model(name).tensors in held for name in catalog.models())
    assert len(FAMILIES) >= 27
