"""config.json of a Hugging Face model: that one small file, from the configured endpoint only.

`huggingface_hub` brings the endpoint (HF_ENDPOINT), offline mode (HF_HUB_OFFLINE), the token (HF_TOKEN or
a stored login), its HTTP client and its cache. The transfer itself is done here, so that it is bounded in
size and time and never leaves the endpoint. Weights are never asked for.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

from planner.catalog.cache import keep_text, kept_text
from planner.catalog.config_file import MOST_CONFIG_BYTES, parsed_config, shown
from planner.errors import ModelError

__all__ = ["HubConfig", "MissingRepository", "hub_config", "is_hub_id"]

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_ID = re.compile(rf"(?:{_PART}/)?{_PART}")
_LONGEST_ID = 96  # huggingface_hub.utils.validate_repo_id
_MOST_SECONDS = 20.0  # for everything; config.json has a few kB
_READ_SECONDS = 10.0  # without a byte, as huggingface_hub's own HF_HUB_DOWNLOAD_TIMEOUT
_MOST_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)


class MissingRepository(ModelError):
    """No model of this id on the hub, as far as the hub tells."""


class _Unreachable(ModelError):
    """The hub could not be asked; a cached copy may stand in."""


@dataclass(frozen=True, kw_only=True)
class HubConfig:
    """The text of a config.json and where it came from."""

    text: str
    source: str


def is_hub_id(text: str) -> bool:
    """Whether `text` can be a model's id: `name` or `namespace/name`, at most 96 characters."""
    return (
        len(text) <= _LONGEST_ID
        and _ID.fullmatch(text) is not None
        and ".." not in text
        and "--" not in text
        and not text.endswith(".git")
    )


def hub_config(model_id: str, *, endpoint: str | None = None) -> HubConfig:
    """The config.json of `model_id` on its main branch, already parsed once, so known to be sound.

    Asked for once in a process. Raises ModelError in one line: an id that cannot be one, gated, missing
    repository (MissingRepository) or config.json, offline and not cached, no network, malformed.
    """
    if not is_hub_id(model_id):
        raise ModelError(
            f"{shown(model_id)!r} is not a Hugging Face id; write namespace/name with letters, digits, "
            "'-', '_' and '.', as in meta-llama/Llama-3.2-3B."
        )
    try:
        from huggingface_hub import constants
    except ImportError:
        raise ModelError(
            f"{model_id}: fetching its config.json needs huggingface_hub; pip install huggingface_hub, "
            "or choose a model of the catalogue."
        ) from None
    return _hub_config(model_id, (endpoint or constants.ENDPOINT).rstrip("/"))


@lru_cache(maxsize=64)
def _hub_config(model_id: str, endpoint: str) -> HubConfig:
    from huggingface_hub import constants

    kept_name = f"configs/{hashlib.sha256(f'{endpoint} {model_id}'.encode()).hexdigest()}.json"
    if constants.HF_HUB_OFFLINE:
        found = _cached(model_id, kept_name)
        if found is None:
            raise ModelError(
                f"{model_id}: offline (HF_HUB_OFFLINE is set) and its config.json is not cached; unset it, "
                "or choose a model of the catalogue."
            )
        return found
    try:
        content, commit = _timed_transfer(model_id, endpoint)
    except _Unreachable:
        found = _cached(model_id, kept_name)
        if found is None:
            raise
        return found
    config = parsed_config(content, label=model_id)
    source = f"{_shown_host(endpoint)}/{model_id}/blob/{commit}/config.json"
    fetched = HubConfig(text=json.dumps(config, ensure_ascii=False), source=source)
    keep_text(kept_name, json.dumps({"text": fetched.text, "source": fetched.source}))
    return fetched


def _cached(model_id: str, kept_name: str) -> HubConfig | None:
    """huggingface_hub's cached copy, or the one kept here; None where neither is sound."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(model_id, "config.json")
    if isinstance(path, str):
        try:
            with Path(path).open("rb") as file:
                config = parsed_config(file.read(MOST_CONFIG_BYTES + 1), label=model_id)
            text = json.dumps(config, ensure_ascii=False)
            return HubConfig(text=text, source=f"huggingface_hub's cache of {model_id}")
        except (OSError, ModelError):
            pass
    try:
        kept = json.loads(kept_text(kept_name, 4 * MOST_CONFIG_BYTES) or "null")
        parsed_config(kept["text"], label=model_id)
        return HubConfig(text=kept["text"], source=str(kept["source"]))
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _timed_transfer(model_id: str, endpoint: str) -> tuple[bytes, str]:
    """`_transfer` in a thread of its own, given up after `_MOST_SECONDS`."""
    outcome: list[tuple[bytes, str] | BaseException] = []

    def work() -> None:
        try:
            outcome.append(_transfer(model_id, endpoint))
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=work, daemon=True, name="hub config")
    thread.start()
    thread.join(_MOST_SECONDS)
    if not outcome:
        raise _slow(model_id, endpoint)
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def _transfer(model_id: str, endpoint: str) -> tuple[bytes, str]:
    """The bytes of config.json and the commit they belong to. Raises ModelError."""
    utils: Any = import_module("huggingface_hub.utils")
    if urlsplit(endpoint).scheme not in ("http", "https") or not urlsplit(endpoint).hostname:
        raise ModelError(f"HF_ENDPOINT {_shown_host(endpoint)!r} is not an http or https address.")
    deadline = time.monotonic() + _MOST_SECONDS
    client = utils.get_session()
    # httpx for huggingface_hub 1, httpx2 for 2: the exceptions are those of the client's own package
    http: Any = import_module(type(client).__module__.partition(".")[0])
    url = f"{endpoint}/{quote(model_id)}/resolve/main/config.json"
    try:
        headers = {**utils.build_hf_headers(), "Accept-Encoding": "identity"}
        for _ in range(_MOST_REDIRECTS + 1):
            with client.stream(
                "GET", url, headers=headers, follow_redirects=False, timeout=_READ_SECONDS
            ) as response:
                if response.status_code not in _REDIRECTS:
                    _check_status(response.status_code, response.headers, model_id, endpoint)
                    commit = str(response.headers.get("X-Repo-Commit", ""))
                    content = _limited_body(response, model_id, endpoint, deadline)
                    return content, commit if re.fullmatch("[0-9a-f]{40}", commit) else "main"
                url = _same_host(urljoin(url, response.headers.get("Location", "")), model_id, endpoint)
    except http.TimeoutException:
        raise _slow(model_id, endpoint) from None
    except (http.HTTPError, http.InvalidURL, OSError, ValueError, UnicodeError) as error:
        if isinstance(error, ModelError):
            raise
        raise _Unreachable(
            f"{model_id}: could not reach {_shown_host(endpoint)} ({type(error).__name__}); check the "
            "network and HF_ENDPOINT, or choose a model of the catalogue."
        ) from None
    raise ModelError(f"{model_id}: {_shown_host(endpoint)} redirects more than {_MOST_REDIRECTS} times.")


def _limited_body(response: Any, model_id: str, endpoint: str, deadline: float) -> bytes:
    """The response's body, given up above 1 MiB or after the deadline."""
    if response.headers.get("Content-Encoding", "identity").casefold() != "identity":
        raise ModelError(f"{model_id}: {_shown_host(endpoint)} sent a compressed config.json, unasked.")
    content = bytearray()
    for chunk in response.iter_raw():
        content += chunk
        if len(content) > MOST_CONFIG_BYTES:
            raise ModelError(f"{model_id}: its config.json is larger than 1 MiB, so not a model's config.")
        if time.monotonic() > deadline:
            raise _slow(model_id, endpoint)
    return bytes(content)


def _check_status(status: int, headers: Any, model_id: str, endpoint: str) -> None:
    """Nothing for 200; else the ModelError that the hub's error headers mean."""
    code = headers.get("X-Error-Code", "")
    host = _shown_host(endpoint)
    if status == 200:
        return
    if code == "GatedRepo":
        raise ModelError(
            f"{model_id}: gated (HTTP {status}); accept its terms on {host}/{model_id} and set HF_TOKEN "
            "to a token of that account."
        )
    if code == "RepoNotFound":
        raise MissingRepository(
            f"{model_id}: no such model on {host}, or a private one; check the id, or set HF_TOKEN."
        )
    if status in (401, 403):
        raise ModelError(
            f"{model_id}: {host} refuses access (HTTP {status}): gated, private, or a token that is not "
            "valid; set HF_TOKEN to one that may read it."
        )
    if code in ("EntryNotFound", "RevisionNotFound"):
        raise ModelError(
            f"{model_id}: the repository has no config.json; choose one with transformers weights."
        )
    if status in (404, 410):
        raise MissingRepository(f"{model_id}: not found on {host} (HTTP {status}); check the id.")
    raise _Unreachable(f"{model_id}: {host} answered HTTP {status}; try again later.")


def _same_host(url: str, model_id: str, endpoint: str) -> str:
    """`url`, where it stays on the endpoint. Raises ModelError."""
    there, here = urlsplit(url), urlsplit(endpoint)
    if (there.scheme, there.netloc) != (here.scheme, here.netloc):
        raise ModelError(
            f"{model_id}: {_shown_host(endpoint)} redirects to another host, "
            f"{shown(str(there.hostname))}; only the configured endpoint is asked."
        )
    return url


def _slow(model_id: str, endpoint: str) -> _Unreachable:
    return _Unreachable(
        f"{model_id}: {_shown_host(endpoint)} did not send config.json within {_MOST_SECONDS:.0f} s; "
        "try again later."
    )


def _shown_host(endpoint: str) -> str:
    """The endpoint without a user name or password, for messages."""
    parts = urlsplit(endpoint)
    host = parts.netloc.rpartition("@")[2]
    return shown(f"{parts.scheme}://{host}{parts.path}" if parts.scheme else endpoint)
