"""What one rank holds of each tensor: FSDP2's chunks along dimension 0, padded, and the units they belong to.

Letters: N ranks that share a copy, `n` elements. Source: torch 2.13, distributed/fsdp/_fully_shard,
_fsdp_param.py (`_init_sharded_param`: every rank allocates the largest chunk) and _fsdp_common.py
(`_chunk_with_empty`); units as accelerate 1.15 cuts them (utils/fsdp_utils.py, `fsdp2_prepare_model`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from planner.estimate.parameters import trained_tensors
from planner.estimate.recipes import RECIPES, recipe_of
from planner.model import Model
from planner.spec import FullFineTuning, LoRA, Setup

__all__ = ["Piece", "Units", "chunk_numel", "local_numel", "pieces", "units"]

_HEAD, _EMBEDDING, _NORM, _ROOT = "head", "embedding", "norm", "root"


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """One parameter tensor that several ranks share.

    `element_bytes` is a shard's element, `gathered_element_bytes` that of the whole weight as the step
    uses it, which is also its gradient's. `layer` is None outside the layers, where `place` says what it
    belongs to.
    """

    shape: tuple[int, ...]
    element_bytes: int
    gathered_element_bytes: int
    trained: bool
    added: bool
    layer: int | None = None
    place: str = _ROOT

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class Units:
    """Pieces by the unit that gathers them: `embedding` alone where it is untied, each layer, `tail`, `root`.

    The tail is the final norm and the head, and the embedding where it is tied; it and the root stay gathered
    from the forward pass to their gradients.
    """

    embedding: tuple[Piece, ...]
    layers: tuple[tuple[Piece, ...], ...]
    tail: tuple[Piece, ...]
    root: tuple[Piece, ...]
    tied: bool

    def all(self) -> Iterator[tuple[Piece, ...]]:
        """Every unit that has a parameter."""
        yield from (unit for unit in (self.root, self.embedding, *self.layers, self.tail) if unit)


def chunk_numel(shape: tuple[int, ...], ranks: int) -> int:
    """Elements of the largest chunk of dimension 0, ceil(rows / N) rows: what every rank allocates."""
    return -(-shape[0] // ranks) * math.prod(shape[1:])


def local_numel(shape: tuple[int, ...], ranks: int, rank: int) -> int:
    """Elements of the rank's own chunk, without padding: its part of gradients and optimizer states."""
    rows = -(-shape[0] // ranks)
    return max(0, min(rows, shape[0] - rank * rows)) * math.prod(shape[1:])


def pieces(setup: Setup) -> tuple[Piece, ...]:
    """Every parameter as its shards are held and gathered, base and added, tied weights once.

    Kept with the model.
    """
    cache = setup.model.__dict__.setdefault("_pieces", {})
    key = _key(setup)
    if key not in cache:
        cache[key] = _pieces(setup)
    return cache[key]  # type: ignore[no-any-return]


def _key(setup: Setup) -> tuple[object, ...]:
    """What the pieces depend on: not how many ranks there are, but whether weights are gathered."""
    return setup.method, setup.training.precision, setup.sharding.shard_ranks > 1


def _pieces(setup: Setup) -> tuple[Piece, ...]:
    held, used = RECIPES[setup.training.precision], recipe_of(setup)
    model, trained = setup.model, trained_tensors(setup)
    whole = isinstance(setup.method, FullFineTuning)
    chosen = {(t.name, layer) for t in trained if not t.added for layer in t.layers or (None,)}
    places = _places(model, wrapped=isinstance(setup.method, LoRA))
    found = []
    for tensor in model.tensors:
        if tensor.tied_to:
            continue
        for layer in tensor.layers or (None,):
            found.append(
                Piece(
                    shape=tensor.shape,
                    element_bytes=held.weight_bytes(tensor),
                    gathered_element_bytes=used.weight_bytes(tensor),
                    trained=whole or (tensor.name, layer) in chosen,
                    added=False,
                    layer=layer,
                    place=places.get(tensor.name, _ROOT),
                )
            )
    for new in trained:
        for layer in (new.layers or (None,)) if new.added else ():
            found.append(
                Piece(
                    shape=new.shape,
                    element_bytes=held.adapter,
                    gathered_element_bytes=used.adapter,
                    trained=True,
                    added=True,
                    layer=layer,
                    place=places.get(new.name.rpartition(".")[0], _ROOT),
                )
            )
    return tuple(found)


def units(setup: Setup) -> Units:
    """The pieces of the setup in accelerate's units; equal layers are one object, all of them numbered 0."""
    cache = setup.model.__dict__.setdefault("_units", {})
    key = _key(setup)
    if key not in cache:
        cache[key] = _units(setup)
    return cache[key]  # type: ignore[no-any-return]


def _units(setup: Setup) -> Units:
    found = pieces(setup)
    layers = max((piece.layer for piece in found if piece.layer is not None), default=-1) + 1
    by_layer: list[list[Piece]] = [[] for _ in range(layers)]
    for piece in found:
        if piece.layer is not None:
            by_layer[piece.layer].append(replace(piece, layer=0))
    outer = [piece for piece in found if piece.layer is None]
    tied = any(tensor.tied_to and tensor.role == "head" for tensor in setup.model.tensors)
    alike: dict[tuple[Piece, ...], tuple[Piece, ...]] = {}
    return Units(
        embedding=() if tied else _of(outer, (_EMBEDDING,)),
        layers=tuple(alike.setdefault(layer, layer) for layer in map(tuple, by_layer)),
        tail=(*_of(outer, (_NORM,)), *_of(outer, (_HEAD, _EMBEDDING) if tied else (_HEAD,))),
        root=_of(outer, (_ROOT,)),
        tied=tied,
    )


def _of(outer: Iterable[Piece], places: tuple[str, ...]) -> tuple[Piece, ...]:
    return tuple(piece for piece in outer if piece.place in places)


def _places(model: Model, *, wrapped: bool) -> dict[str, str]:
    """Parameters and modules outside the layers that have a unit: token embedding, head, final norm.

    The final norm is looked for among the children of the base model. Under the name `model` peft's wrapper
    (`wrapped`) has something else: `LoraModel.model` is the whole.
    """
    outer = [t for t in model.tensors if not t.layers]
    places: dict[str, str] = {}
    heads = [t for t in outer if t.role == "head" and t.kind == "linear" and t.leaf == "weight"]
    for tensor in outer:
        if heads and tensor.module == heads[-1].module:
            places |= {tensor.module: _HEAD, tensor.name: _HEAD, tensor.tied_to or tensor.name: _HEAD}
    embeddings = [t for t in outer if t.kind == "embedding" and t.role == "embedding"]
    if embeddings:
        places |= {embeddings[0].module: _EMBEDDING, embeddings[0].name: _EMBEDDING}
    norms = [t.module for t in outer if t.role == "norm" and t.module.count(".") == 1]
    for tensor in outer:
        hidden = wrapped and tensor.module.startswith("model.")
        if norms and tensor.module == norms[-1] and not hidden:
            places[tensor.name] = _NORM
    return places
