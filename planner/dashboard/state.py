"""What the page remembers between two runs of its script, all of it in `st.session_state`.

An input's value lives under the field's own name, which is also its key in the URL; everything else
starts with an underscore.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import streamlit as st

from planner.dashboard.fields import method_fields, sharding_fields, spelled, training_fields
from planner.dashboard.links import DEFAULTS, PINS, TASKS, default_of, link_problems
from planner.spec import METHODS, Setup

__all__ = [
    "CONFIG_TEXT",
    "apply",
    "asked",
    "binding",
    "checked_link",
    "checkpointing_changed",
    "config_text",
    "dismiss_warnings",
    "forget_config",
    "keep",
    "last_good",
    "link_warnings",
    "linked",
    "number_changed",
    "pin",
    "pins",
    "remember_good",
    "reset",
    "restore",
    "show_pins_in_address",
    "unpin",
    "use_config",
]

CONFIG_TEXT = "_config_text"  # a pasted or uploaded config.json; not part of the link
_KEPT, _WARNINGS, _CHECKED, _GOOD, _UNBOUND = "_kept", "_warnings", "_checked", "_good", "_unbound"
_PINNED = "_pinned"


def checked_link() -> None:
    """On a session's first run, read the link, note what is wrong with it and take that out of the address.

    An input whose value in the link is wrong is not bound to the address in that run: streamlit would
    take any text for an input that accepts new options.
    """
    st.session_state[_UNBOUND] = ()
    if st.session_state.get(_CHECKED):
        return
    st.session_state[_CHECKED] = True
    given = {key: st.query_params.get_all(key) for key in st.query_params}
    problems = link_problems(given)
    for key in problems:
        del st.query_params[key]
    st.session_state[_WARNINGS] = list(problems.values())
    st.session_state[_UNBOUND] = tuple(problems)
    st.session_state[_PINNED] = [given[key][-1] for key in PINS if key in given and key not in problems]


def binding(name: str) -> Literal["query-params"] | None:
    """How an input is bound to the address in this run."""
    return None if name in st.session_state[_UNBOUND] else "query-params"


def link_warnings() -> list[str]:
    """What was wrong with the link that opened this session."""
    return list(st.session_state.get(_WARNINGS, []))


def dismiss_warnings() -> None:
    """Forget the link's warnings: the visitor has changed something since."""
    st.session_state[_WARNINGS] = []


def asked() -> dict[str, Any]:
    """The inputs as flat keys, as `Setup.from_dict` takes them, in the order of the sidebar."""
    method = st.session_state["method"]
    names = [
        "model",
        "method",
        *(field.name for field in (*method_fields(method), *training_fields())),
        "gpu",
    ]
    shared = {f.name: st.session_state.get(f.name, f.default) or None for f in sharding_fields()}
    if any(shared[f.name] != f.default for f in sharding_fields()):  # one GPU says nothing of it
        names += shared
    return {name: shared.get(name, st.session_state[name]) for name in names if name in st.session_state}


def linked() -> dict[str, Any]:
    """What a link says beside the inputs: the number of tasks and the pinned setups."""
    kept = st.session_state.get(_KEPT, {})
    tasks = st.session_state.get(TASKS, kept.get(TASKS))
    return {TASKS: tasks} | dict(zip(PINS, pins(), strict=False))


def pins() -> tuple[str, ...]:
    """The pinned setups, as links spell them."""
    return tuple(st.session_state.get(_PINNED, ()))


def pin(text: str) -> None:
    """Pin a setup, at most three, none twice: a button's callback."""
    found = list(dict.fromkeys([*pins(), text]))
    st.session_state[_PINNED] = found[: len(PINS)]


def unpin(text: str) -> None:
    """Take a pin away: a button's callback."""
    st.session_state[_PINNED] = [one for one in pins() if one != text]


def show_pins_in_address() -> None:
    """Write the pins into the page's address where they are not there yet."""
    wanted = dict(zip(PINS, pins(), strict=False))
    for key in PINS:
        if key in wanted and st.query_params.get(key) != wanted[key]:
            st.query_params[key] = wanted[key]
        elif key not in wanted and key in st.query_params:
            del st.query_params[key]


def number_changed() -> None:
    """Several GPUs get a sharding, one loses it: a callback of their number's input."""
    several = int(st.session_state["num_gpus"] or 1) > 1
    if several and st.session_state.get("sharding", "none") == "none":
        st.session_state["sharding"] = "fsdp"
    elif not several:
        for field in sharding_fields():
            if field.name != "num_gpus" and field.name in st.session_state:
                st.session_state[field.name] = field.default
    dismiss_warnings()


def checkpointing_changed() -> None:
    """Without checkpoints there is none to choose: a callback of their input."""
    if not st.session_state["activation_checkpointing"]:
        for field in training_fields():
            if field.name.startswith("checkpoint_") and field.name in st.session_state:
                st.session_state[field.name] = field.default
    dismiss_warnings()


def apply(changes: Mapping[str, Any]) -> None:
    """Set inputs from code: a callback of the Apply buttons and of the grid."""
    for key, value in changes.items():
        st.session_state[key] = spelled(value) if isinstance(value, tuple | list) else value
    dismiss_warnings()


def reset() -> None:
    """Put every input back to its default: the callback of Reset."""
    st.session_state[CONFIG_TEXT] = ""
    st.session_state[_KEPT] = {}
    apply({key: value for key, value in _defaults().items() if key in st.session_state})


def keep(name: str) -> None:
    """Remember an input's value while another method hides the input."""
    st.session_state.setdefault(_KEPT, {})[name] = st.session_state[name]


def restore(name: str) -> None:
    """Bring back the value an input had before it was hidden."""
    kept = st.session_state.get(_KEPT, {})
    if name not in st.session_state and name in kept:
        st.session_state[name] = kept[name]


def config_text() -> str:
    """The pasted or uploaded config.json, or an empty text."""
    return str(st.session_state.get(CONFIG_TEXT, ""))


def use_config(text: str) -> None:
    """Plan the model of this config.json from now on."""
    st.session_state[CONFIG_TEXT] = text
    dismiss_warnings()


def forget_config() -> None:
    """Go back to the model of the catalogue."""
    st.session_state[CONFIG_TEXT] = ""


def last_good() -> Setup | None:
    """The last setup that made sense in this session."""
    found = st.session_state.get(_GOOD)
    return found if isinstance(found, Setup) else None


def remember_good(setup: Setup) -> None:
    """Keep a setup that made sense, to be shown while the next one does not."""
    st.session_state[_GOOD] = setup


def _defaults() -> dict[str, Any]:
    methods = (field for name in METHODS for field in method_fields(name))
    fields = [*training_fields(), *sharding_fields(), *methods]
    return {**{field.name: default_of(field) for field in fields}, **DEFAULTS}
