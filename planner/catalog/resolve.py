"""What the user typed or pasted -> Model: the one way in for the shell, Python and the page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from planner.catalog import UnknownFamily, bare_model, model, model_from_config, models
from planner.catalog.config_file import local_config, looks_like_a_path, parsed_config, shown
from planner.catalog.hub import hub_config, is_hub_id
from planner.catalog.inventory import inventoried_model
from planner.errors import ModelError, nearest
from planner.model import Model

__all__ = ["resolve"]

_BARE = "params:"


def resolve(text: str, *, config_text: str | None = None, local_files: bool = True) -> Model:
    """The model of a catalogue id, `params:7e9`, a path, or a Hugging Face id, tried in this order.

    A path starts with ./ ../ / ~ or ends in .json; `local_files=False` refuses them (a page that others
    reach). `config_text` is a config.json's content: `text` then only names it. Raises ModelError, in one
    line, with the nearest names of the catalogue where nothing is found.
    """
    name = text.strip()
    if config_text is not None:
        label = name or "config.json"
        return _from_config(parsed_config(config_text, label=label), label, "the given config.json")
    if not name:
        raise ModelError("no model given; write a Hugging Face id, the path of a config.json, or params:7e9.")
    if name.casefold().startswith(_BARE):
        return bare_model(name)
    if looks_like_a_path(name):
        if not local_files:
            raise ModelError(
                f"{shown(name)}: local files cannot be opened here; paste the config.json instead."
            )
        return _from_config(local_config(name), name, "a local config.json")
    if _in_catalogue(name):
        return model(name)
    if not is_hub_id(name):
        raise ModelError(
            f"{shown(name)!r} is not a model: neither in the catalogue, nor a Hugging Face id "
            f"(namespace/name), a path (./...), or params:7e9.{_near(name)}"
        )
    return _from_hub(name)


def _in_catalogue(name: str) -> bool:
    """Whether `name` is a catalogue id or the part after its slash; case does not matter."""
    wanted = name.casefold()
    return any(wanted in (full.casefold(), full.rpartition("/")[2].casefold()) for full in models())


def _from_hub(model_id: str) -> Model:
    try:
        found = hub_config(model_id)
    except ModelError as error:  # missing, or not reachable: a name of the catalogue may have been meant
        raise type(error)(f"{error}{_near(model_id)}") from None
    config = parsed_config(found.text, label=model_id)
    return _from_config(config, model_id, found.source)


def _from_config(config: Mapping[str, Any], model_id: str, source: str) -> Model:
    """By closed formulas where there are some, by building the class where not.

    `auto_map` (code on the hub) is never followed, so it is hidden from the formulas: an architecture that
    transformers has itself needs none of it, and for any other the inventory refuses it by name.
    """
    own = {key: value for key, value in config.items() if key != "auto_map"}
    if not isinstance(own.get("model_type"), str):
        own = dict(config)
    try:
        return model_from_config(own, id=shown(model_id), source=source)
    except UnknownFamily:
        json.dumps(config)  # plain JSON, or model_from_config had refused it
        return inventoried_model(config, id=shown(model_id), source=source)


def _near(name: str) -> str:
    """The nearest names of the catalogue as a further sentence; nothing where none is near."""
    names = [full if "/" in name else full.rpartition("/")[2] for full in models()]
    found = nearest(name, names)
    return f" D{found[1:]}" if found.startswith("did you mean") else ""
