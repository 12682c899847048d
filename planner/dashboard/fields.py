"""The inputs, read off `planner.spec`: every field of a method or of the training is one."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from planner.errors import SetupError
from planner.spec import METHODS, Sharding, Training

__all__ = ["Field", "Kind", "method_fields", "parsed", "sharding_fields", "spelled", "training_fields"]

Kind = Literal["choice", "flag", "whole", "number", "names", "text"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """One input: its name (also URL key and flag), what it holds, and its default.

    `choices` of a `choice`; `optional` where it may be empty (None).
    """

    name: str
    kind: Kind
    default: Any
    choices: tuple[str, ...] = ()
    optional: bool = False


@cache
def training_fields() -> tuple[Field, ...]:
    """The fields of `Training`, in its order."""
    return _fields(Training)


@cache
def sharding_fields() -> tuple[Field, ...]:
    """The fields of `Sharding`, in its order."""
    return _fields(Sharding)


@cache
def method_fields(method: str) -> tuple[Field, ...]:
    """The fields of one method, in its order; () for an unknown name."""
    return _fields(METHODS[method]) if method in METHODS else ()


def parsed(field: Field, text: str) -> Any:
    """The value of a field from a link. Raises SetupError, in one line, where the text is none."""
    if not text.strip() and field.optional:
        return None
    if field.kind == "choice":
        if text not in field.choices:
            raise SetupError(f"{field.name} must be one of {', '.join(field.choices)}, got {_shown(text)}.")
        return text
    if field.kind == "flag":
        if text.casefold() not in ("true", "false"):
            raise SetupError(f"{field.name} must be true or false, got {_shown(text)}.")
        return text.casefold() == "true"
    if field.kind in ("names", "text"):
        return text
    return _number(field, text)


def spelled(value: Any) -> str:
    """A value as a link or a command line spells it: `true`, `0.05`, `q_proj,v_proj`."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return ",".join(value)
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return str(value)


def _number(field: Field, text: str) -> int | float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise SetupError(f"{field.name} must be a number, got {_shown(text)}.")
    if field.kind == "number":
        return value
    if not value.is_integer():
        raise SetupError(f"{field.name} must be a whole number, got {_shown(text)}.")
    return int(value)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "...")


def _fields(cls: type) -> tuple[Field, ...]:
    hints = get_type_hints(cls)
    return tuple(_field(item, hints[item.name]) for item in dataclasses.fields(cls))


def _field(item: dataclasses.Field[Any], hint: Any) -> Field:
    optional = get_origin(hint) in (UnionType, Union) and NoneType in get_args(hint)
    if optional:
        hint = next(option for option in get_args(hint) if option is not NoneType)
    default = None if item.default is dataclasses.MISSING else item.default
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    kinds: dict[Any, Kind] = {bool: "flag", int: "whole", float: "number", str: "text"}
    kind: Kind = "choice" if choices else kinds.get(hint, "names")
    return Field(name=item.name, kind=kind, default=default, choices=choices, optional=optional)
