"""Links and commands: every field there and back, and what a wrong link says."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from urllib.parse import parse_qs, urlsplit

import pytest

from planner.dashboard.answers import setup_of
from planner.dashboard.fields import method_fields, parsed, sharding_fields, training_fields
from planner.dashboard.links import DEFAULTS, command, default_of, link, link_problems, method_options
from planner.spec import METHODS

ADDRESS = "https://planner.example/?old=1#part"
OTHER = {
    "seq_len": 640, "micro_batch_size": 3, "precision": "bf16-mixed", "activation_checkpointing": True,
    "clip_grad_norm": 0.5, "lora_rank": 16, "lora_dropout": 0.05, "target_modules": "q_proj,v_proj",
    "adapter_kind": "houlsby", "adapter_size": 32, "trainable_params": 5_000_000, "attention": "eager",
    "zero_grad": "zero", "loop": "trainer", "batching": "padded",
    "num_gpus": 4, "sharding": "ddp", "gpus_per_node": 2,
}  # fmt: skip


def flat(method: str) -> dict[str, object]:
    """A setup of this method with unusual values."""
    model = "params:7e9" if method == "peft" else "openai-community/gpt2"
    fields = [*method_fields(method), *training_fields(), *sharding_fields()]
    values = {field.name: OTHER.get(field.name, default_of(field)) for field in fields}
    if "target_modules" in values:
        values["target_modules"] = "c_attn,c_proj"
    if "quantization" in values:
        values |= {"quantization": "int8", "precision": "fp16"}  # qlora takes 16-bit precisions only
    return {"model": model, "method": method, **values, "gpu": "t4"}


@pytest.mark.parametrize("method", METHODS)
def test_a_link_brings_every_value_back(method: str) -> None:
    asked = flat(method)
    given = parse_qs(urlsplit(link(ADDRESS, asked)).query)
    assert given.pop("v") == ["1"]
    assert link_problems(given) == {}
    every = (*method_fields(method), *training_fields(), *sharding_fields())
    fields = {field.name: field for field in every}
    read = {
        key: parsed(fields[key], texts[-1]) if key in fields else texts[-1] for key, texts in given.items()
    }
    assert read == {key: value for key, value in asked.items() if value is not None}
    assert setup_of(read) == setup_of(asked)


def test_a_link_keeps_the_address_and_nothing_of_the_old_query() -> None:
    text = link(ADDRESS, DEFAULTS)
    assert text.startswith("https://planner.example/?v=1&model=meta-llama/Llama-3.1-8B&")
    assert "old" not in text


@pytest.mark.parametrize("method", ["full", "lora", "adapter", "bitfit", "peft"])
def test_the_command_asks_the_same_question(method: str, planner_command: Callable[..., object]) -> None:
    asked = flat(method)
    words = shlex.split(command(asked))
    assert words[:3] == ["python", "-m", "planner"]
    answer = planner_command(*words[3:], "--json")
    printed = json.loads(answer.stdout)["setup"]  # type: ignore[attr-defined]
    assert printed == json.loads(json.dumps(setup_of(asked).to_dict()))


@pytest.mark.parametrize(
    "key, text, says",
    [
        ("v", "2", "version"),
        ("method", "lorra", "did you mean lora, qlora?"),
        ("gpu", "nonsense", "unknown GPU"),
        ("seq_len", "-5", "at least 1"),
        ("seq_len", "1e400", "must be a number"),
        ("seq_len", "nan", "must be a number"),
        ("micro_batch_size", "1.5", "whole number"),
        ("precision", "fp8", "must be one of"),
        ("activation_checkpointing", "maybe", "true or false"),
        ("lora_dropout", "1", "below 1"),
        ("lora_rank", "", "must be a number"),
        ("micro_batch", "3", "did you mean micro_batch_size?"),
        ("target_modules", "x" * 300, "too long"),
    ],
)
def test_a_wrong_value_is_named_in_one_line(key: str, text: str, says: str) -> None:
    problems = link_problems({key: [text]})
    assert list(problems) == [key]
    assert says in problems[key]
    assert "\n" not in problems[key]


@pytest.mark.parametrize("key", ["utm_source", "fbclid", "embed"])
def test_the_keys_of_others_are_left_alone(key: str) -> None:
    assert link_problems({key: ["x"]}) == {}


def test_a_bare_count_takes_no_method_that_needs_layers() -> None:
    assert method_options(bare=True) == ["full", "peft"]
    assert "number of parameters" in link_problems({"model": ["params:7e9"], "method": ["lora"]})["method"]
    assert link_problems({"model": ["params:7e9"], "method": ["peft"]}) == {}


def test_which_layers_are_checkpointed_is_read_whatever_stands_before_it() -> None:
    chosen = {"activation_checkpointing": ["true"], "checkpoint_offload": ["true"], "checkpoint_every": ["2"]}
    assert link_problems(chosen) == {}
    assert link_problems(dict(reversed(chosen.items()))) == {}
    assert "at least 1" in link_problems({**chosen, "checkpoint_every": ["0"]})["checkpoint_every"]
