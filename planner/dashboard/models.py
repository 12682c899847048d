"""The model that a visitor names: catalogue, hub id, bare count or an own config.json, never a local path."""

from __future__ import annotations

import streamlit as st

from planner import catalog
from planner.catalog.resolve import resolve
from planner.errors import ModelError, PlannerError
from planner.model import Model

__all__ = ["OWN_CONFIG", "resolved"]

OWN_CONFIG = "your model"


def resolved(text: str, config_text: str = "") -> Model:
    """The model of an id, `params:7e9` or a config.json's text. Raises ModelError or SetupError.

    Excludes folders and files of the server, which the command line takes.
    """
    if config_text:
        found = _looked_up(OWN_CONFIG, config_text)
    elif text in catalog.models():
        return catalog.model(text)
    else:
        found = _looked_up(text, None)
    if isinstance(found, str):
        raise ModelError(found)
    return found


@st.cache_resource(max_entries=128, ttl=600, show_spinner="Reading the model's config.json")
def _looked_up(name: str, config_text: str | None) -> Model | str:
    """A model, or the line that says why not: a refusal is remembered too, so that a page stays quick."""
    try:
        return resolve(name, config_text=config_text, local_files=False)
    except PlannerError as error:
        return str(error)
