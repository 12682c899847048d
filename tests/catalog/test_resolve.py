"""What a user may type or paste, and what it becomes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from planner.catalog import hub as hub_module, models, resolve as resolve_module
from planner.catalog.resolve import resolve
from planner.errors import ModelError, SetupError
from planner.model import Model
from tests.hub_server import COMMIT, LLAMA, Hub, hub_server

LLAMA_PARAMETERS = 2 * 256 * 64 + 2 * (64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64) + 64  # by hand


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A local hub that huggingface_hub takes for its endpoint."""
    from huggingface_hub import constants

    monkeypatch.setenv("PLANNER_CACHE_DIR", str(tmp_path / "cache"))
    with hub_server() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        yield server


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to ask the hub fails the test."""

    def asked(model_id: str, **_: Any) -> Any:
        raise AssertionError(f"the hub was asked for {model_id}")

    monkeypatch.setattr(resolve_module, "hub_config", asked)


def refusal(text: str, **options: Any) -> str:
    with pytest.raises(SetupError) as caught:
        resolve(text, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.usefixtures("no_network")
def test_the_catalogue_comes_first() -> None:
    name = models()[0]
    assert resolve(name).id == name
    assert resolve(f"  {name.upper()} ").id == name
    assert resolve("gpt2").parameters == 124439808  # facts of the catalogue, transformers' own count


@pytest.mark.usefixtures("no_network")
def test_a_bare_parameter_count() -> None:
    bare = resolve("params:7e9")
    assert (bare.parameters, bare.is_bare) == (7 * 10**9, True)
    assert "not a number of parameters" in refusal("params:many")


@pytest.mark.usefixtures("no_network")
def test_a_local_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for text in (str(folder), "./my-model", "my-model/config.json", "./my-model/../my-model/"):
        found = resolve(text)
        assert (found.id, found.parameters) == (text, LLAMA_PARAMETERS)
    assert "no such file" in refusal("./other")
    assert "local files cannot be opened here" in refusal("./my-model", local_files=False)


def test_an_id_never_opens_a_local_file(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trap = tmp_path / "org" / "missing"
    trap.mkdir(parents=True)
    (trap / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert "no such model" in refusal("org/missing")


def test_a_hugging_face_id(hub: Hub) -> None:
    found = resolve("org/llama")
    assert (found.id, found.parameters) == ("org/llama", LLAMA_PARAMETERS)
    assert found.source.endswith(f"/org/llama/blob/{COMMIT}/config.json")
    assert found.architecture is not None


def test_a_missing_id_names_the_nearest_of_the_catalogue(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(model_id: str, **_: Any) -> Any:
        raise hub_module.MissingRepository(f"{model_id}: no such model.")

    monkeypatch.setattr(resolve_module, "hub_config", missing)
    assert "no such model. Did you mean meta-llama/Llama-3.2-3B" in refusal("meta-llama/Llama-3.2-3")
    assert "Did you mean gpt2" in refusal("gpt-2")
    assert refusal("zzz/qqq") == "zzz/qqq: no such model."


@pytest.mark.usefixtures("no_network")
def test_a_pasted_config() -> None:
    pasted = resolve("", config_text=json.dumps(LLAMA))
    assert (pasted.id, pasted.parameters, pasted.config) == ("config.json", LLAMA_PARAMETERS, LLAMA)
    assert resolve("my model", config_text=json.dumps(LLAMA)).id == "my model"
    assert "not valid JSON" in refusal("x", config_text="{")
    assert "must hold an object" in refusal("x", config_text="[]")


@pytest.mark.usefixtures("no_network")
def test_other_architectures_are_built(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def built(config: dict[str, Any], *, id: str, source: str) -> Model:
        seen.append(config)
        return Model(id=id, source=source, bare_parameters=1)

    monkeypatch.setattr(resolve_module, "inventoried_model", built)
    own = {"model_type": "mamba", "auto_map": {"AutoModelForCausalLM": "m.M"}}
    assert resolve("x", config_text=json.dumps(own)).parameters == 1
    assert seen == [own]  # whether transformers has it without remote code is the inventory's to say


@pytest.mark.usefixtures("no_network")
def test_remote_code_beside_a_known_architecture_is_not_needed() -> None:
    with_code = {**LLAMA, "auto_map": {"AutoModelForCausalLM": "modeling.Own"}}
    assert resolve("x", config_text=json.dumps(with_code)).parameters == LLAMA_PARAMETERS


@pytest.mark.usefixtures("no_network")
def test_a_config_without_a_model_type_is_refused() -> None:
    assert "model_type" in refusal("x", config_text="{}")
    assert "remote code" in refusal("x", config_text='{"auto_map": {"AutoConfig": "c.C"}}')


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("text", ["", "   ", "a/b/c", "org/../x", "llama 3 please", "\x00", "https://huggingface.co/x/y"])
def test_nonsense_is_one_line(text: str) -> None:
    assert refusal(text)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_any_text_resolves_or_is_refused(text: str) -> None:
    patch = pytest.MonkeyPatch()
    patch.setattr(resolve_module, "hub_config", _missing)
    try:
        resolve(text, local_files=False)
    except SetupError as error:
        message = str(error)
    else:
        message = ""
    finally:
        patch.undo()
    assert "\n" not in message


def _missing(model_id: str, **_: Any) -> Any:
    raise ModelError(f"{model_id}: offline")


def test_the_tests_see_no_cache_of_the_user() -> None:
    assert not os.environ["HF_HOME"].startswith(str(Path.home() / ".cache" / "huggingface"))
