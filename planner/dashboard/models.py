"""The model that a visitor names: catalogue, hub id, bare count or an own config.json, never a local path."""

from __future__ import annotations

import re

import streamlit as st

from planner import catalog
from planner.errors import ModelError, PlannerError, SetupError
from planner.model import Model

__all__ = ["OWN_CONFIG", "resolved"]

OWN_CONFIG = "your config.json"
# huggingface_hub's own rule for repository ids (`utils/_validators.py`, validate_repo_id): owner and name.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_BARE = "params:"


def resolved(text: str, config_text: str = "") -> Model:
    """The model of an id, `params:7e9` or a config.json's text. Raises ModelError or SetupError.

    Excludes folders and files of the server, which the command line takes.
    """
    if config_text:
        return _answer(OWN_CONFIG, config_text)
    name = text.strip()
    if name.casefold().startswith(_BARE):
        return catalog.bare_model(name)
    try:
        return catalog.model(name)
    except ModelError as unknown:
        if not _HUB_ID.fullmatch(name) or ".." in name or "--" in name:
            raise unknown from None
    return _answer(name, "")


def _answer(name: str, config_text: str) -> Model:
    found = _looked_up(name, config_text)
    if isinstance(found, str):
        raise ModelError(found)
    return found


@st.cache_resource(max_entries=128, ttl=600, show_spinner="Reading the model's config.json")
def _looked_up(name: str, config_text: str) -> Model | str:
    """A model, or the line that says why not: a refusal is remembered too, so that a page stays quick."""
    from planner.catalog.resolve import resolve

    try:
        return resolve(name, config_text=config_text or None)
    except (PlannerError, SetupError) as error:
        return str(error)
