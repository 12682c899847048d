"""Reading config.json: every value is checked where it enters, in the user's words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from planner.errors import ModelError

__all__ = ["MAX_LAYERS", "MAX_SIZE", "Fields", "UnknownFamily"]

MAX_SIZE = 10_000_000  # no published model has a dimension, vocabulary or position count near this
MAX_LAYERS = 10_000


class UnknownFamily(ModelError):
    """An architecture without closed formulas; it can still be inventoried by building it."""


class Fields:
    """A config.json whose values are asked for by name, with transformers' default.

    Several names mean the same thing (transformers' `attribute_map`); two that disagree are refused.
    A value of null counts as absent. Raises ModelError, one line each.
    """

    def __init__(self, config: Mapping[str, Any], model_id: str) -> None:
        self.config = config
        self.model_id = model_id

    def error(self, complaint: str) -> ModelError:
        """The one-line error for this model's config.json."""
        return ModelError(f"{self.model_id}: {complaint}")

    def unknown(self, reason: str) -> UnknownFamily:
        """The error for an option of a known family that has no closed formula here."""
        return UnknownFamily(
            f"{self.model_id}: {reason}, which has no closed formula; counting it needs transformers."
        )

    def value(self, *names: str) -> Any:
        """The first of `names` that is present and not null; None without one."""
        found = [(name, self.config[name]) for name in names if self.config.get(name) is not None]
        for name, value in found[1:]:
            if value != found[0][1]:
                raise self.error(
                    f"config.json says {found[0][0]} = {_shown(found[0][1])} and {name} = {_shown(value)}; "
                    "they must agree."
                )
        return found[0][1] if found else None

    def size(self, *names: str, default: int | None = None, most: int = MAX_SIZE, least: int = 1) -> int:
        """A whole number from `least` to `most`; required when there is no `default`."""
        value = self.value(*names)
        if value is None:
            if default is None:
                raise self.error(f"config.json has no {names[0]}; a {self.family} config needs it.")
            return default
        if isinstance(value, float) and math.isfinite(value) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.error(
                f"{names[0]} must be a whole number from {least} to {most:,}, "
                f"got {_shown(value)} in config.json."
            )
        return value

    def optional_size(self, *names: str) -> int | None:
        """A whole number, or None where absent or null."""
        return None if self.value(*names) is None else self.size(*names)

    def layer_count(self, *names: str) -> int:
        """The number of layers, at most 10,000."""
        return self.size(*names, most=MAX_LAYERS)

    def share(self, *names: str, default: float = 0.0) -> float:
        """A number from 0 to 1, such as a dropout probability."""
        value = self.value(*names)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise self.error(f"{names[0]} must be a number from 0 to 1, got {_shown(value)} in config.json.")
        return float(value)

    def positive(self, *names: str, default: float | None = None) -> float | None:
        """A finite number above 0, or `default` where the key is absent; null is None."""
        if names[0] in self.config and self.config[names[0]] is None:
            return None
        value = self.value(*names)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.error(f"{names[0]} must be a number above 0, got {_shown(value)} in config.json.")
        return float(value)

    def flag(self, *names: str, default: bool = False) -> bool:
        """True or false."""
        value = self.value(*names)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(f"{names[0]} must be true or false, got {_shown(value)} in config.json.")
        return value

    def text(self, *names: str, default: str) -> str:
        """A non-empty string."""
        value = self.value(*names)
        if value is None:
            return default
        if not isinstance(value, str) or not value:
            raise self.error(f"{names[0]} must be a name, got {_shown(value)} in config.json.")
        return value

    def layer_list(self, name: str, layers: int) -> tuple[int, ...]:
        """Indices of layers, each below `layers`; empty where absent."""
        value = self.value(name)
        if value is None:
            return ()
        if not isinstance(value, list | tuple) or not all(
            isinstance(item, int) and not isinstance(item, bool) for item in value
        ):
            raise self.error(f"{name} must be a list of layer indices, got {_shown(value)} in config.json.")
        return tuple(sorted({item for item in value if 0 <= item < layers}))

    def sliding_layers(self, layers: int) -> tuple[int, ...] | None:
        """The layers that `layer_types` marks as sliding; None where the key is absent."""
        kinds = self.value("layer_types")
        if kinds is None:
            return None
        if not isinstance(kinds, list | tuple) or len(kinds) != layers:
            raise self.error(
                f"layer_types must be a list of {layers} names, one for each layer, in config.json."
            )
        return tuple(layer for layer, kind in enumerate(kinds) if kind == "sliding_attention")

    def rotary_share(self, *names: str, default: float) -> float:
        """Share of each head that rotary positions turn: `rope_parameters` first, as transformers 5."""
        for key in ("rope_parameters", "rope_scaling"):
            rope = self.config.get(key)
            if isinstance(rope, Mapping) and rope.get("partial_rotary_factor") is not None:
                return Fields(rope, self.model_id).share("partial_rotary_factor")
        return self.share(*names, default=default)

    @property
    def family(self) -> str:
        """The config's model_type."""
        return str(self.config.get("model_type"))


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
