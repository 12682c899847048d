"""The sidebar: one input for each field of the specification, bound to the address of the page."""

from __future__ import annotations

from typing import Any

import streamlit as st

from planner import catalog
from planner.catalog.gpus import gpus
from planner.dashboard import state
from planner.dashboard.fields import Field, method_fields, sharding_fields, training_fields
from planner.dashboard.links import DEFAULTS, command, default_of, link, method_options
from planner.dashboard.models import resolved
from planner.dashboard.words import FIELD_HELP, METHOD_CAPTIONS, field_label, method_title
from planner.errors import PlannerError
from planner.model import Model
from planner.spec import PeftOfSize
from planner.targets import PRESETS
from planner.units import MIB

__all__ = ["sidebar"]

_FIRST = ("seq_len", "micro_batch_size", "activation_checkpointing")  # what everybody changes
_ON_CHANGE = {
    "num_gpus": state.number_changed,
    "activation_checkpointing": state.checkpointing_changed,
}
_STEPS = {"seq_len": 128, "lora_dropout": 0.05, "clip_grad_norm": 0.1}
_USUAL_TARGETS = ("q_proj,v_proj", "q_proj,k_proj,v_proj,o_proj", "query_key_value", "c_attn", "q,v")
_CONFIG_BYTES = 2 * MIB  # planner.catalog refuses more than 1 MiB with a line of its own


def sidebar() -> None:
    """Draw every input. Values are read back with `state.asked()`."""
    state.checked_link()
    with st.sidebar:
        model = _model()
        method = _method(model)
        fields = {field.name: field for field in training_fields()}
        for name in _FIRST:
            _input(fields[name], model)
        _gpu()
        own = method_fields(method)
        if own:
            with st.expander(
                f"Settings of {method_title(method)}", icon=":material/tune:", key="_method_settings"
            ):
                for field in own:
                    _input(field, model)
        with st.expander("Precision, optimizer and more", icon=":material/settings:", key="_more_settings"):
            for name, field in fields.items():
                if name not in _FIRST:
                    _input(field, model)
        with st.expander("Number of GPUs and sharding", icon=":material/hub:", key="_sharding_settings"):
            for field in sharding_fields():
                _input(field, model)
        _actions()


def _model() -> Model | None:
    """The model's input; None where it is unknown (the page says why)."""
    config = state.config_text()
    ids = catalog.models()
    st.selectbox(
        field_label("model"),
        ids,
        index=ids.index(DEFAULTS["model"]),
        key="model",
        bind=state.binding("model"),
        help=FIELD_HELP["model"],
        accept_new_options=True,
        filter_mode="contains",
        disabled=bool(config),
        on_change=state.dismiss_warnings,
    )
    _config_json()
    try:
        return resolved(st.session_state["model"], config)
    except PlannerError:
        return None


def _config_json() -> None:
    """A config.json of one's own instead of a catalogue entry: pasted or uploaded."""
    if state.config_text():
        st.caption(":material/description: Your own config.json is planned. It is not part of the link.")
        st.button(
            "Back to the catalogue", icon=":material/undo:", on_click=state.forget_config, width="stretch"
        )
        return
    with st.popover("Use my own config.json", icon=":material/upload_file:", width="stretch"):
        uploaded = st.file_uploader("Upload a config.json", type=["json"], key="_upload", max_upload_size=1)
        pasted = st.text_area(
            "Or paste its text", key="_pasted", height=160, placeholder='{"model_type": "llama", ...}'
        )
        st.caption("Only the numbers of the architecture are read.")
        text = uploaded.read(_CONFIG_BYTES).decode("utf-8", "replace") if uploaded else pasted[:_CONFIG_BYTES]
        st.button(
            "Plan this model",
            key="_use_config",
            disabled=not text.strip(),
            on_click=state.use_config,
            args=(text,),
        )


def _method(model: Model | None) -> str:
    bare = model is not None and model.is_bare
    options = method_options(bare=bare)
    if PeftOfSize.name in (st.session_state.get("method"), st.query_params.get("method")):
        options = [*dict.fromkeys([*options, PeftOfSize.name])]
    default = DEFAULTS["method"] if DEFAULTS["method"] in options else PeftOfSize.name
    if st.session_state.get("method", default) not in options:
        st.session_state["method"] = default
    chosen = st.pills(
        field_label("method"),
        options,
        default=default,
        key="method",
        bind=state.binding("method"),
        required=True,
        on_change=state.dismiss_warnings,
    )
    name = str(chosen or default)
    st.caption(METHOD_CAPTIONS.get(name, ""))
    return name


def _gpu() -> None:
    names = [item.name for item in gpus()]
    st.selectbox(
        field_label("gpu"),
        names,
        index=names.index(DEFAULTS["gpu"]),
        key="gpu",
        bind=state.binding("gpu"),
        help=FIELD_HELP["gpu"],
        accept_new_options=True,
        filter_mode="contains",
        on_change=state.dismiss_warnings,
    )


def _input(field: Field, model: Model | None) -> None:
    """The widget of one field, by what it holds."""
    state.restore(field.name)
    label, default = field_label(field.name), default_of(field)
    common: dict[str, Any] = {
        "key": field.name,
        "bind": state.binding(field.name),
        "help": FIELD_HELP.get(field.name),
        "on_change": _ON_CHANGE.get(field.name, state.dismiss_warnings),
    }
    if field.kind == "flag":
        st.toggle(label, value=default, **common)
    elif field.kind == "choice":
        index = None if default is None else field.choices.index(default)
        st.selectbox(label, field.choices, index=index, **common)
    elif field.kind == "names":
        options = _target_options(model)
        st.selectbox(label, options, index=options.index(default), accept_new_options=True, **common)
    elif field.kind == "text":
        st.text_input(label, value=default, max_chars=100, **common)
    elif field.kind == "whole":
        st.number_input(
            label, value=default, min_value=1, max_value=10**9, step=int(_STEPS.get(field.name, 1)), **common
        )
    else:
        step = _STEPS.get(field.name, 1.0)
        value = None if default is None else float(default)
        st.number_input(label, value=value, min_value=0.0, step=step, format="%g", **common)
    state.keep(field.name)


def _target_options(model: Model | None) -> list[str]:
    """The presets, the usual lists of names that this model has, then each of its linear layers' names."""
    names = [] if model is None else sorted({w.module.rpartition(".")[2] for w in model.linear_weights})
    usual = [text for text in _USUAL_TARGETS if set(text.split(",")) <= set(names)]
    return list(dict.fromkeys([*PRESETS, *usual, *names]))


def _actions() -> None:
    flat = state.asked()
    st.button("Reset", key="_reset", icon=":material/restart_alt:", on_click=state.reset, width="stretch")
    with st.popover("Copy link", icon=":material/link:", width="stretch"):
        st.caption("Every setting spelled out. Use the button at the right end of the line to copy it.")
        st.code(link(str(st.context.url or ""), flat | state.linked()), language=None, wrap_lines=True)
    with st.popover("Copy command", icon=":material/terminal:", width="stretch"):
        st.caption("The same question in a shell. Use the button at the right end of the line to copy it.")
        shown = {**flat, "model": "config.json"} if state.config_text() else flat
        st.code(command(shown), language="bash", wrap_lines=True)
