"""Short words for weight tensors; what every family is written in."""

from __future__ import annotations

from planner.model import Kind, Role, WeightTensor

__all__ = ["conv1d", "embedding", "head", "linear", "norm", "parameter"]

Layers = tuple[int, ...]


def linear(
    name: str, outputs: int, inputs: int, role: Role, *, layers: Layers = (), bias: bool = False
) -> list[WeightTensor]:
    """torch.nn.Linear: weight `[outputs, inputs]` and, where asked for, bias `[outputs]`."""
    return _with_bias(name, (outputs, inputs), outputs, role, "linear", layers, bias)


def conv1d(name: str, outputs: int, inputs: int, role: Role, *, layers: Layers = ()) -> list[WeightTensor]:
    """transformers' Conv1D (GPT-2): weight `[inputs, outputs]`, bias `[outputs]`."""
    return _with_bias(name, (inputs, outputs), outputs, role, "conv1d", layers, True)


def norm(
    name: str, width: int, *, layers: Layers = (), leaves: tuple[str, ...] = ("weight",), role: Role = "norm"
) -> list[WeightTensor]:
    """A normalization over `width`: RMSNorm has a weight, LayerNorm (`leaves`) a bias too."""
    return [
        WeightTensor(name=f"{name}.{leaf}", shape=(width,), role=role, kind="norm", layers=layers)
        for leaf in leaves
    ]


def embedding(
    name: str, rows: int, width: int, role: Role = "embedding", *, layers: Layers = ()
) -> list[WeightTensor]:
    """torch.nn.Embedding: weight `[rows, width]`."""
    return [
        WeightTensor(name=f"{name}.weight", shape=(rows, width), role=role, kind="embedding", layers=layers)
    ]


def parameter(name: str, shape: tuple[int, ...], role: Role, *, layers: Layers = ()) -> list[WeightTensor]:
    """A bare nn.Parameter, `name` being the whole name."""
    return [WeightTensor(name=name, shape=shape, role=role, kind="parameter", layers=layers)]


def head(name: str, vocab: int, width: int, *, tied_to: str | None, bias: bool = False) -> list[WeightTensor]:
    """The output layer `[vocab, width]`, its weight shared with the embedding where `tied_to` names it."""
    tensors = [
        WeightTensor(name=f"{name}.weight", shape=(vocab, width), role="head", kind="linear", tied_to=tied_to)
    ]
    if bias:
        tensors.append(WeightTensor(name=f"{name}.bias", shape=(vocab,), role="head", kind="linear"))
    return tensors


def _with_bias(
    name: str, shape: tuple[int, int], outputs: int, role: Role, kind: Kind, layers: Layers, bias: bool
) -> list[WeightTensor]:
    tensors = [WeightTensor(name=f"{name}.weight", shape=shape, role=role, kind=kind, layers=layers)]
    if bias:
        tensors.append(
            WeightTensor(name=f"{name}.bias", shape=(outputs,), role=role, kind=kind, layers=layers)
        )
    return tensors
