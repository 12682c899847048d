"""Catalogue models with fewer layers: the same widths and code, and a simulation that takes a moment."""

from __future__ import annotations

from planner import catalog
from planner.model import Model

__all__ = ["shortened"]

_LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers")
_BY_LAYER = ("layer_types", "no_rope_layers")


def shortened(model_id: str, layers: int = 3) -> Model:
    """The catalogue's model cut to `layers` layers, by its own config.json."""
    entry = catalog.catalogue_entry(model_id)
    config = dict(entry["config"])
    for key in _LAYER_KEYS:
        if config.get(key) is not None:
            config[key] = layers
    for key in _BY_LAYER:
        if config.get(key) is not None:
            config[key] = config[key][:layers]
    return catalog.model_from_config(
        config, id=f"{model_id} ({layers} layers)", source=entry["source"], task=entry["task"]
    )
