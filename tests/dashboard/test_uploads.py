"""Uploaded records: real ones come in, hostile ones end in one clear line, nothing is opened or fetched."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from planner import catalog
from planner.dashboard.lines import LONGEST, public_line
from planner.dashboard.uploads import LARGEST_BYTES, MOST_LINES, uploaded
from tests.measure.made_up import made_record

GOOD = json.loads(json.dumps(made_record().to_dict()))


def changed(change: Callable[[dict[str, Any]], object]) -> bytes:
    """A record as a line, with something wrong in it."""
    value = copy.deepcopy(GOOD)
    change(value)
    return json.dumps(value).encode()


def put(*path: str, value: Any) -> bytes:
    """A record in which one value is another."""

    def change(record: dict[str, Any]) -> None:
        for name in path[:-1]:
            record = record[name]
        record[path[-1]] = value

    def change_alike(record: dict[str, Any]) -> None:
        change(record)
        if path[0] == "setup" and path[-1] != "seq_len":  # the reports carry their setup, too
            for name in ("report", "estimate", "simulation"):
                record[name]["setup"] = record["setup"]

    return changed(change_alike)


def test_records_come_in_and_stay_apart() -> None:
    lines = [GOOD, json.loads(json.dumps(made_record(seq_len=32).to_dict()))]
    found = uploaded("\n".join(map(json.dumps, lines)).encode() + b"\n\n")
    assert found.problems == ()
    assert [record.setup["seq_len"] for record in found.records] == [16, 32]
    assert {record.origin for record in found.records} == {"uploaded"}
    assert [json.loads(json.dumps(record.to_dict())) for record in found.records] == lines


def test_a_config_of_ones_own_is_read_without_the_hub() -> None:
    config = catalog.catalogue_entry("EleutherAI/pythia-70m")["config"]
    value = copy.deepcopy(GOOD)
    value["setup"] |= {"model": "me/own", "model_config": config}
    for name in ("report", "estimate", "simulation"):
        value[name]["setup"] = value["setup"]
    found = uploaded(json.dumps(value).encode())
    assert found.problems == ()
    assert found.records[0].setup["model"] == "me/own"


NAMELESS = {"name": None, "allocated_bytes": 1, "peak_allocated_bytes": 1}
REMOTE = {"model_type": "foo", "auto_map": {"AutoModel": "x.y"}}
HOSTILE = {
    "empty": b" \n",
    "too large": b"x" * (LARGEST_BYTES + 1),
    "too many": b"{}\n" * (MOST_LINES + 1),
    "binary": bytes(range(128, 256)),
    "no JSON": b"hello",
    "a list": b"[1]",
    "a number": b"1",
    "null": b"null",
    "nested": b"[" * 100_000,
    "nested objects": b'{"a":' * 50_000,
    "NaN": put("report", "peak_reserved_bytes", value=float("nan")),
    "infinity": put("device", "total_bytes", value=float("inf")),
    "many digits": b'{"schema": ' + b"9" * 5000 + b"}",
    "huge": put("report", "parts", "base_weights", value=10**30),
    "negative": put("report", "parts", "base_weights", value=-(1 << 30)),
    "a fraction": put("report", "parts", "base_weights", value=0.5),
    "a truth": put("report", "parts", "gradients", value=True),
    "a text for a size": put("report", "parts", "base_weights", value="<script>"),
    "another schema": put("schema", value=99),
    "an unknown part": put("report", "parts", "gold", value=1),
    "a report that is a text": put("report", value="x"),
    "parameters as a list": put("report", "parameters", value=[1, 2]),
    "no parameters": put("report", "parameters", "total", value=0),
    "phases as a number": put("report", "phases", value=7),
    "a phase without a name": put("report", "phases", value=[NAMELESS]),
    "a device without a name": put("device", "name", value=""),
    "a long name": put("device", "name", value="A" * 1000),
    "capability of text": put("device", "capability", value=["a", "b"]),
    "a path": put("setup", "model", value="/etc/passwd"),
    "a path up": put("setup", "model", value="../../etc/passwd.json"),
    "the hub": put("setup", "model", value="someone/else"),
    "no model": put("setup", "model", value=None),
    "remote code": put("setup", "model_config", value=REMOTE),
    "a config that is a text": put("setup", "model_config", value="x"),
    "an unknown setting": put("setup", "shell", value="; rm -rf /"),
    "not a measurement": put("report", "source", value="simulation"),
    "a sum that is wrong": put("report", "peak_allocated_bytes", value=1),
    "another setup": put("setup", "seq_len", value=64),
    "no versions": changed(lambda record: record.pop("versions")),
    "a long list": put("report", "notes", value=["x"] * 10_000),
    "a long text": put("command", value="x" * 10_000),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_record_ends_in_one_clear_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", no_network)
    monkeypatch.setattr("subprocess.Popen.__init__", no_network)
    found = uploaded(HOSTILE[name])
    assert found.records == ()
    assert len(found.problems) == 1
    line = found.problems[0]
    assert 10 < len(line) <= LONGEST
    assert "\n" not in line
    for secret in ("Traceback", "site-packages", str(Path.home()), "/etc", "NoneType"):
        assert secret not in line


def test_a_wrong_line_does_not_spoil_the_others_and_only_the_first_are_named() -> None:
    data = b"\n".join([b"nonsense"] * 9 + [json.dumps(GOOD).encode()] + [b"[]"])
    found = uploaded(data)
    assert len(found.records) == 1
    assert len(found.problems) == 6
    assert found.problems[0].startswith("Line 1 ")
    assert found.problems[-1] == "And 5 more lines are no records."


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=400) | st.text(max_size=300).map(str.encode))
def test_any_bytes_are_answered(data: bytes) -> None:
    found = uploaded(data)
    assert found.problems
    assert not found.records


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
PATHS = [
    (top, *deeper)
    for top, below in GOOD.items()
    for deeper in [(), *((name,) for name in (below if isinstance(below, dict) else ()))]
]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(PATHS), JSON)
def test_any_value_in_any_place_is_answered(path: tuple[str, ...], value: Any) -> None:
    found = uploaded(put(*path, value=value))
    assert len(found.records) + len(found.problems) == 1


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ("a  b\n c", "a b c"),
        ("/srv/app/planner/x.py failed", "x.py failed"),
        ("File '/root/.cache/huggingface/token', line 3", "File 'token', line 3"),
        ("see https://example.org/a/b", "see https://example.org/a/b"),
        ("meta-llama/Llama-3.1-8B is gated", "meta-llama/Llama-3.1-8B is gated"),
    ],
)
def test_a_line_for_the_page_shows_no_path(said: str, line: str) -> None:
    assert public_line(said) == line
    assert len(public_line("word " * 1000)) <= LONGEST
