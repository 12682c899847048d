"""A setup as a link and as a command, and a link read back: plain text, no streamlit.

The keys are the fields' names. A link made here spells every value out and carries `v=1`. Beside the setup
it holds `tasks`, and up to three pinned setups: `pin_1=model:gpt2~method:lora~gpu:t4~lora_rank:16`.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlencode

from planner import catalog
from planner.catalog.gpus import gpu
from planner.checks import whole
from planner.dashboard.fields import Field, method_fields, parsed, sharding_fields, spelled, training_fields
from planner.errors import SetupError, nearest
from planner.spec import METHODS, FullFineTuning, PeftOfSize, Setup, Sharding, Training

__all__ = [
    "DEFAULTS",
    "MOST_TASKS",
    "PINS",
    "TASKS",
    "VERSION",
    "command",
    "default_of",
    "link",
    "link_problems",
    "method_options",
    "pin_text",
    "pin_values",
]

VERSION = "1"
TASKS, MOST_TASKS = "tasks", 100_000  # of the disk space: the page's own input, no field of a setup
PINS = ("pin_1", "pin_2", "pin_3")
DEFAULTS = {"model": "meta-llama/Llama-3.1-8B", "method": "lora", "gpu": "rtx-4090"}
_OWN_KEYS = {**DEFAULTS, "trainable_params": 4_000_000, "target_modules": "attention"}
_LONGEST_TEXT = 200  # characters of a link's value; a model's id has at most 96 on the hub
_LONGEST_PIN = 800  # a pin holds every value that is not the page's default
_BETWEEN = "~"  # the values of a pin; unreserved in addresses (RFC 3986), and in no name of a model or layer
_CLOSE = 0.75  # a key this similar to one of ours is a slip, others belong to somebody else


def default_of(field: Field) -> Any:
    """The page's default of a field: the specification's own, unless the page needs one."""
    return _OWN_KEYS.get(field.name, field.default)


def method_options(*, bare: bool) -> list[str]:
    """The methods to choose from; of a bare parameter count only those that need no layers."""
    if bare:
        return [FullFineTuning.name, PeftOfSize.name]
    return [name for name, cls in METHODS.items() if cls is not PeftOfSize]


def link(base_url: str, flat: Mapping[str, Any]) -> str:
    """The address that shows this setup, every value spelled out; empty values are left out."""
    values = {"v": VERSION} | {key: spelled(value) for key, value in flat.items() if value is not None}
    address = base_url.partition("?")[0].partition("#")[0]
    return f"{address}?{urlencode(values, quote_via=quote, safe='/,:~')}"


def command(flat: Mapping[str, Any], *, verb: str = "estimate") -> str:
    """The command line that answers the same question in a shell."""
    words = ["python", "-m", "planner", verb]
    for key, value in flat.items():
        if value is None or value is False:
            continue
        words.append("--" + key.replace("_", "-"))
        if value is not True:
            words.append(spelled(value))
    return shlex.join(words)


def pin_text(flat: Mapping[str, Any]) -> str:
    """A setup as one value of a link: model, method and gpu, then what is not the page's default."""
    method = str(flat["method"])
    defaults = {f.name: default_of(f) for f in _own_fields(method)}
    chosen = {key: flat[key] for key in DEFAULTS if flat.get(key) is not None}
    chosen |= {key: flat[key] for key in defaults if key in flat and flat[key] != defaults[key]}
    return _BETWEEN.join(f"{key}:{'' if value is None else spelled(value)}" for key, value in chosen.items())


def pin_values(text: str) -> dict[str, Any]:
    """The flat values of a pin, defaults filled in. Raises SetupError, in one line, where it is none."""
    if len(text) > _LONGEST_PIN:
        raise SetupError(f"a pinned setup is too long: at most {_LONGEST_PIN} characters.")
    given = dict(part.partition(":")[::2] for part in text.split(_BETWEEN))
    if not given.get("model") or not given.get("method"):
        raise SetupError("a pinned setup needs a model and a method, as in model:gpt2~method:lora.")
    _check("method", given["method"], {})
    _check_method(given["method"], given["model"])
    fields = {f.name: f for f in _own_fields(given["method"])}
    for key, value in given.items():
        if key not in fields and key not in DEFAULTS:
            raise SetupError(f"a pinned setup has no setting {key[:40]!r}; {nearest(key[:40], fields)}")
        _check(key, value, fields)
    values = {name: default_of(field) for name, field in fields.items()}
    values |= {key: parsed(fields[key], value) for key, value in given.items() if key in fields}
    return {key: given[key] for key in DEFAULTS if key in given} | values


def link_problems(given: Mapping[str, list[str]]) -> dict[str, str]:
    """What a link says that cannot be: key -> one line. Such keys keep their defaults."""
    problems: dict[str, str] = {}
    method = (given.get("method") or [DEFAULTS["method"]])[-1]
    own = {field.name: field for field in _own_fields(method)}
    for key, texts in given.items():
        text = texts[-1] if texts else ""
        try:
            if key in PINS:
                pin_values(text)
                continue
            if len(text) > _LONGEST_TEXT:
                raise SetupError(f"{key} is too long: at most {_LONGEST_TEXT} characters.")
            _check(key, text, own)
            if key == "method":
                _check_method(text, (given.get("model") or [""])[-1])
        except SetupError as error:
            problems[key] = str(error)
    return problems


def _check(key: str, text: str, own: Mapping[str, Field]) -> None:
    if key == "v":
        if text != VERSION:
            raise SetupError(f"the link is of version {text!r}, this page reads version {VERSION}.")
    elif key == "method":
        if text not in METHODS:
            raise SetupError(f"unknown method {text!r}; {nearest(text, METHODS)}")
    elif key == "gpu":
        gpu(text)
    elif key == TASKS:
        if not text.isdecimal() or not 1 <= int(text) <= MOST_TASKS:
            raise SetupError(f"{TASKS} must be a whole number from 1 to {MOST_TASKS:,}.")
    elif key in own:
        _check_value(own[key], text)
    elif key not in _every_key():
        close = difflib.get_close_matches(key, _every_key(), n=1, cutoff=_CLOSE)
        if close:
            raise SetupError(f"unknown setting {key!r}; did you mean {close[0]}?")


def _check_method(method: str, model: str) -> None:
    bare = model.casefold().startswith("params:")
    if bare and method not in method_options(bare=True):
        raise SetupError(
            f"method {method} needs the model's layers, and {model} is only a number of parameters."
        )


def _check_value(field: Field, text: str) -> None:
    """One value by the rules of the specification, in a setup where nothing else can be wrong."""
    value = parsed(field, text)
    if value is None or field.kind == "names":
        return
    if field in sharding_fields():
        if field.kind == "whole":
            whole(field.name, value)
        elif field.kind == "text":
            Sharding(num_gpus=2, sharding="fsdp", **{field.name: value})
        return
    if field in training_fields():
        chosen = Training(activation_checkpointing=True)  # which others choose among
        Setup(model=catalog.bare_model("params:1e9"), training=chosen).replace(**{field.name: value})
        return
    owner = next(cls for name, cls in METHODS.items() if field in method_fields(name))
    needed = {
        f.name: default_of(f) for f in method_fields(owner.name) if f.default is None and not f.optional
    }
    owner(**{**needed, field.name: value})


def _every_key() -> set[str]:
    names = {field.name for method in METHODS for field in _own_fields(method)}
    return {"v", "model", "method", "gpu", TASKS, *PINS} | names


def _own_fields(method: str) -> tuple[Field, ...]:
    """Every field of a setup of this method, model and GPU apart."""
    return (*method_fields(method), *training_fields(), *sharding_fields())
