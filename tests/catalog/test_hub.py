"""config.json from the hub: real HTTP against a local stand-in, every refusal in its own words."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from planner.catalog import hub as hub_module
from planner.catalog.config_file import local_config, looks_like_a_path, parsed_config
from planner.catalog.hub import MissingRepository, hub_config, is_hub_id
from planner.errors import ModelError
from tests.hub_server import COMMIT, LLAMA, Hub, hub_server

TOKEN = "hf_right"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub, with nothing cached yet."""
    monkeypatch.setenv("PLANNER_CACHE_DIR", str(tmp_path / "cache"))
    with hub_server() as server:
        yield server


def refusal(model_id: str, endpoint: str) -> str:
    """The one-line message that fetching ends in."""
    with pytest.raises(ModelError) as caught:
        hub_config(model_id, endpoint=endpoint)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    assert str(Path.home()) not in message
    assert TOKEN not in message
    return message


def test_one_get_of_config_json_alone(hub: Hub) -> None:
    found = hub_config("org/llama", endpoint=hub.endpoint)
    assert json.loads(found.text) == LLAMA
    assert found.source == f"{hub.endpoint}/org/llama/blob/{COMMIT}/config.json"
    assert [(method, path) for method, path, _ in hub.requests] == [
        ("GET", "/org/llama/resolve/main/config.json")
    ]
    assert "hf_hub/" in hub.requests[0][2]["user-agent"]
    hub_config("org/llama", endpoint=hub.endpoint)
    assert len(hub.requests) == 1  # asked for once in a process


def test_a_renamed_repository_is_followed_on_the_same_host(hub: Hub) -> None:
    assert json.loads(hub_config("org/old-name", endpoint=hub.endpoint).text) == LLAMA
    assert hub.paths == ["/org/old-name/resolve/main/config.json", "/org/llama/resolve/main/config.json"]


def test_another_host_is_never_asked(hub: Hub) -> None:
    with hub_server() as other:
        hub.other_host = other.endpoint.replace("127.0.0.1", "localhost")
        assert "redirects to another host, localhost" in refusal("org/elsewhere", hub.endpoint)
        assert other.requests == []


@pytest.mark.parametrize(
    ("repository", "message"),
    [
        ("org/gated", r"gated \(HTTP 401\); accept its terms .* HF_TOKEN"),
        ("org/gated-403", r"gated \(HTTP 403\)"),
        ("org/forbidden", r"refuses access \(HTTP 403\)"),
        ("org/no-config", "the repository has no config.json"),
        ("org/no-main", "the repository has no config.json"),
        ("org/broken", "answered HTTP 503; try again later"),
        ("org/garbage", r"not valid JSON \(Expecting property name .*line 1, column 2"),
        ("org/html", "not valid JSON"),
        ("org/nan", "NaN is not a JSON number"),
        ("org/list", "must hold an object, got a list"),
        ("org/binary", "not UTF-8"),
        ("org/deep", "nests deeper than"),
        ("org/huge", "larger than 1 MiB"),
        ("org/loop", "redirects more than 5 times"),
    ],
)
def test_every_refusal_has_its_own_words(hub: Hub, repository: str, message: str) -> None:


    assert re.search(message, refusal(repository, hub.endpoint))


def test_a_flood_is_cut_off_early(hub: Hub) -> None:
    assert "larger than 1 MiB" in refusal("org/flood", hub.endpoint)
    assert hub.flood_bytes < 64 << 20  # of 256 MiB: what the sockets' buffers took before the client hung up


@pytest.mark.parametrize("repository", ["org/missing", "org/missing-404", "org/plain-404", "org/secret"])
def test_a_missing_or_private_repository_is_told_from_the_rest(hub: Hub, repository: str) -> None:
    with pytest.raises(MissingRepository, match=repository):
        hub_config(repository, endpoint=hub.endpoint)


@pytest.mark.parametrize(
    "model_id",
    [
        "../etc/passwd", "org/..", "a/b/c", "org/na me", "org//x", "/x", "x/", "org/-x", "org/x-",
        "org/x.git", "org/a--b", "org/x?y", "org/x#y", "org/%2e%2e", "org\\x", "org/é", "x" * 97, "",
        "http://host/x", "a@b/c",
    ],
)  # fmt: skip
def test_an_id_is_checked_before_anything_is_sent(hub: Hub, model_id: str) -> None:
    assert not is_hub_id(model_id)
    assert "is not a Hugging Face id" in refusal(model_id, hub.endpoint)
    assert hub.requests == []


def test_real_ids_pass() -> None:
    for model_id in ("gpt2", "meta-llama/Llama-3.2-3B", "a/b", "01-ai/Yi-1.5-9B", "org/x_", "O/x.y"):
        assert is_hub_id(model_id)


def test_slow_answers_are_given_up(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "_MOST_SECONDS", 1.0)
    for repository in ("org/slow", "org/endless"):
        began = time.monotonic()
        assert "did not send config.json within 1 s" in refusal(repository, hub.endpoint)
        assert time.monotonic() - began < 2.5


def test_nobody_listens(hub: Hub, free_port: int) -> None:
    message = refusal("org/llama", f"http://user:{TOKEN}@127.0.0.1:{free_port}")
    assert f"could not reach http://127.0.0.1:{free_port} (ConnectError)" in message
    assert "user" not in message


def test_a_kept_copy_stands_in_when_the_hub_is_away(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = hub_config("org/llama", endpoint=hub.endpoint)
    endpoint = hub.endpoint
    hub_module._hub_config.cache_clear()
    monkeypatch.setattr(hub_module, "_timed_transfer", _unreachable)
    assert hub_config("org/llama", endpoint=endpoint) == fetched
    for kept in Path(os.environ["PLANNER_CACHE_DIR"]).rglob("*.json"):
        kept.write_text('{"text": "{", "source": "x"}', encoding="utf-8")
    hub_module._hub_config.cache_clear()
    assert "away" in refusal("org/llama", endpoint)  # a damaged copy is none


def _unreachable(model_id: str, endpoint: str) -> tuple[bytes, str]:
    raise hub_module._Unreachable("away")


def in_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, since huggingface_hub reads its environment once, at import."""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), **environment},
    )


FETCH = "from planner.catalog.hub import hub_config; print(hub_config({!r}).text)"


def test_the_environment_is_respected(hub: Hub, tmp_path: Path) -> None:
    own = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf")}
    answer = in_process(FETCH.format("org/secret"), **own, HF_TOKEN=TOKEN)
    assert json.loads(answer.stdout) == LLAMA, answer.stderr
    assert hub.requests[-1][2]["authorization"] == f"Bearer {TOKEN}"

    offline = in_process(FETCH.format("org/secret"), **own, HF_HUB_OFFLINE="1")
    assert json.loads(offline.stdout) == LLAMA, offline.stderr
    elsewhere = in_process(FETCH.format("org/llama"), **own, HF_HUB_OFFLINE="1")
    assert "offline (HF_HUB_OFFLINE is set) and its config.json is not cached" in elsewhere.stderr
    assert len(hub.requests) == 1


def test_huggingface_hubs_own_cache_serves_offline(tmp_path: Path) -> None:
    snapshot = tmp_path / "hf" / "hub" / "models--org--cached" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT, encoding="utf-8")
    own = {"HF_HOME": str(tmp_path / "hf"), "PLANNER_CACHE_DIR": str(tmp_path / "own"), "HF_HUB_OFFLINE": "1"}
    answer = in_process(FETCH.format("org/cached"), **own)
    assert json.loads(answer.stdout) == LLAMA, answer.stderr


def test_without_huggingface_hub_it_says_so(hub: Hub) -> None:
    code = "import sys; sys.modules['huggingface_hub'] = None; " + FETCH.format("org/llama")
    assert "needs huggingface_hub; pip install huggingface_hub" in in_process(code).stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1e999}', "1e999 is out of range"),
        ('{"a": -Infinity}', "-Infinity is not a JSON number"),
        ('{"a": 1, "a": 2}', "'a' is given twice with different values"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
        ('{"a":' * 40 + "1" + "}" * 40, "nests deeper than 32 levels"),
        ("null", "got null"),
        ('"x"', "got a string"),
        ("3", "got a number"),
        ("", "not valid JSON"),
        ("\ud800", "not UTF-8"),
    ],
)
def test_malformed_text_is_refused(text: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        parsed_config(text, label="pasted")
    assert "\n" not in str(caught.value)


def test_a_config_is_parsed_as_it_stands() -> None:
    assert parsed_config('\ufeff{"a": 1.5, "b": {"c": [1, null]}, "a": 1.5}', label="x") == {
        "a": 1.5,
        "b": {"c": [1, None]},
    }


def test_local_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    assert local_config(str(tmp_path)) == LLAMA
    assert local_config(str(tmp_path / "config.json")) == LLAMA
    (tmp_path / "empty").mkdir()
    (tmp_path / "big.json").write_bytes(b" " * (1 << 21))
    os.mkfifo(tmp_path / "pipe.json")
    for name, message in {
        "empty": "has no config.json",
        "none.json": "no such file",
        "big.json": "larger than 1 MiB",
        "pipe.json": "not a regular file",
        "x\0.json": "cannot be read",
    }.items():
        with pytest.raises(ModelError, match=message) as caught:
            local_config(str(tmp_path / name))
        assert "\n" not in str(caught.value)


def test_an_unreadable_file_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")

    def refused(path: Path, flags: int) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refused)  # root, as in a container, reads every file
    with pytest.raises(ModelError, match="permission denied; give"):
        local_config(str(tmp_path))


def test_only_what_looks_like_a_path_is_one() -> None:
    for text in ("./x", "../x", "/x", "~/x", ".", "x.json", "C:\\models\\x"):
        assert looks_like_a_path(text)
    for text in ("x", "org/x", "gpt2", "params:7e9"):
        assert not looks_like_a_path(text)
