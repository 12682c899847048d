"""Models as data: the catalogue, and config.json -> Model. Imports the standard library only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from planner.catalog.families import UnknownFamily, family_model
from planner.errors import ModelError, nearest
from planner.model import Model, Task
from planner.units import parse_count

__all__ = ["UnknownFamily", "bare_model", "catalogue_entry", "model", "model_from_config", "models"]

_BARE = "params:"


def models() -> tuple[str, ...]:
    """The ids of the catalogue, in its order: by family, then by size."""
    return tuple(_entries())


def catalogue_entry(model_id: str) -> Mapping[str, Any]:
    """The entry as it stands in models.json: config, task, parameters, source. Raises ModelError."""
    return _entries()[_catalogue_id(model_id)]


@lru_cache(maxsize=512)
def model(id: str) -> Model:
    """The catalogue's model: `meta-llama/Llama-3.2-3B`, or the unambiguous part after the slash.

    Case does not matter. Raises ModelError with the nearest names.
    """
    found = _catalogue_id(id)
    entry = _entries()[found]
    return model_from_config(entry["config"], id=found, source=entry["source"], task=entry["task"])


def model_from_config(config: Mapping[str, Any], *, id: str, source: str, task: Task | None = None) -> Model:
    """A Model from the dictionary of a config.json, by closed formulas.

    `id` names it in messages, `source` says where the config came from; `task` None: the one the
    family is pretrained for. Raises UnknownFamily where the architecture has no closed formula, and
    ModelError where the config is malformed or needs remote code.
    """
    if not isinstance(config, Mapping):
        raise ModelError(f"{id}: config.json must hold an object, got {type(config).__name__}.")
    try:
        canonical = json.dumps(config, sort_keys=True, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise ModelError(f"{id}: config.json is not plain JSON ({error}).") from None
    return _model(canonical, id, source, task)


@lru_cache(maxsize=128)
def bare_model(text: str) -> Model:
    """A bare parameter count, `"params:7e9"`: no tensors, no architecture. Raises SetupError."""
    if not text.casefold().startswith(_BARE):
        raise ModelError(
            f"{text!r} is not a bare parameter count; write params: and a number, such as params:7e9."
        )
    return Model(
        id=text, bare_parameters=parse_count(text[len(_BARE) :]), source="given as a parameter count"
    )


@lru_cache(maxsize=512)
def _model(canonical: str, model_id: str, source: str, task: Task | None) -> Model:
    family, found_task = family_model(json.loads(canonical), model_id=model_id, task=task)
    return Model(
        id=model_id,
        task=found_task,
        config_json=canonical,
        tensors=family.tensors,
        architecture=family.architecture,
        max_positions=family.max_positions,
        source=source,
    )


@lru_cache(maxsize=1)
def _entries() -> dict[str, dict[str, Any]]:
    text = (Path(__file__).parent / "models.json").read_text(encoding="utf-8")
    entries: dict[str, dict[str, Any]] = json.loads(text)["models"]
    return entries


@lru_cache(maxsize=1)
def _names() -> dict[str, list[str]]:
    """Casefolded full and short names to the ids they can mean."""
    names: dict[str, list[str]] = {}
    for full in _entries():
        for name in {full.casefold(), full.rpartition("/")[2].casefold()}:
            names.setdefault(name, []).append(full)
    return names


def _catalogue_id(given: str) -> str:
    ids = _names().get(given.casefold(), [])
    if len(ids) == 1:
        return ids[0]
    if ids:
        raise ModelError(f"{given!r} is ambiguous: {', '.join(ids)}; write the full name.")
    raise ModelError(f"model {given!r} is not in the catalogue; {nearest(given, _nearest_names(given))}")


def _nearest_names(given: str) -> list[str]:
    return [full if "/" in given else full.rpartition("/")[2] for full in _entries()]
