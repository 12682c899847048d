"""config.json as it comes from a file, a paste or the network: limited, parsed, never trusted."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

from planner.errors import ModelError

__all__ = ["MOST_CONFIG_BYTES", "local_config", "looks_like_a_path", "parsed_config"]

MOST_CONFIG_BYTES = 1 << 20  # the largest config.json among the catalogue's sources has some 30 kB
_MOST_DEPTH = 32  # transformers' own configs nest at most 6 levels deep
_SHOWN = 80  # characters of a name in a message
_PATH_STARTS = ("./", "../", "/", "~", ".\\", "..\\")


def looks_like_a_path(text: str) -> bool:
    """Whether `text` can only mean a file or folder: ./x, ../x, /x, ~/x, C:\\x, or x.json.

    A model's id never does, so an id cannot open a local file by accident.
    """
    drive = len(text) > 2 and text[0].isalpha() and text[1] == ":" and text[2] in "\\/"
    return text in (".", "..") or text.startswith(_PATH_STARTS) or text.endswith(".json") or drive


def parsed_config(content: str | bytes, *, label: str) -> dict[str, Any]:
    """The object of a config.json. `label` names it in messages.

    Raises ModelError, in one line, for more than 1 MiB, text that is not UTF-8 or not JSON, NaN and
    infinite numbers, a key given twice with different values, deep nesting, and anything but an object.
    """
    label = shown(label)
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    if len(data) > MOST_CONFIG_BYTES:
        raise ModelError(f"{label}: config.json is larger than 1 MiB; give the config.json of a model.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ModelError(f"{label}: config.json is not UTF-8 text.") from None
    try:
        config = json.loads(
            text, parse_constant=_refused_constant, parse_float=_finite, object_pairs_hook=_object
        )
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ModelError(f"{label}: config.json is not valid JSON ({error.msg}, {where}).") from None
    except RecursionError:
        raise ModelError(f"{label}: config.json nests deeper than {_MOST_DEPTH} levels.") from None
    except ValueError as error:
        raise ModelError(f"{label}: config.json is not valid JSON ({error}).") from None
    if not isinstance(config, dict):
        kind = {list: "a list", str: "a string", type(None): "null"}.get(type(config), "a number or boolean")
        raise ModelError(f"{label}: config.json must hold an object, got {kind}.")
    if _deeper_than(config, _MOST_DEPTH):
        raise ModelError(f"{label}: config.json nests deeper than {_MOST_DEPTH} levels.")
    return config


def local_config(path_text: str) -> dict[str, Any]:
    """The config.json at a path, or in a folder. Same limits as `parsed_config`. Raises ModelError."""
    label = shown(path_text)
    try:
        path = Path(path_text).expanduser()
        if path.is_dir():
            path = path / "config.json"
            if not path.exists():
                raise ModelError(f"{label}: the folder has no config.json; give a folder that has one.")
        return parsed_config(_limited_bytes(path), label=path_text)
    except FileNotFoundError:
        raise ModelError(f"{label}: no such file or folder.") from None
    except PermissionError:
        raise ModelError(f"{label}: permission denied; give a config.json that can be read.") from None
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: no home directory for ~
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{label}: cannot be read as a file ({type(error).__name__}).") from None


def shown(text: str) -> str:
    """A name as it may stand in a one-line message: printable, not too long."""
    clean = "".join(character if character.isprintable() else "?" for character in text)
    return clean if len(clean) <= _SHOWN else clean[: _SHOWN - 3] + "..."


def _limited_bytes(path: Path) -> bytes:
    """At most one byte more than is allowed, of a regular file only (no pipe, no device)."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ModelError(f"{shown(str(path.name))}: not a regular file; give a config.json.")
        return file.read(MOST_CONFIG_BYTES + 1)


def _refused_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{shown(text)} is out of range")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found and found[key] != value:
            raise ValueError(f"key {shown(key)!r} is given twice with different values")
        found[key] = value
    return found


def _deeper_than(config: dict[str, Any], most: int) -> bool:
    level: list[Any] = [config]
    for _ in range(most):
        inner: list[Any] = []
        for value in level:
            values = value.values() if isinstance(value, dict) else value
            inner += [item for item in values if isinstance(item, (dict, list))]
        if not inner:
            return False
        level = inner
    return True
