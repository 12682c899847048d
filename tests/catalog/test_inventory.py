"""Weights counted by building the class on `meta`, in a child process, and kept on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from planner.catalog import inventory as parent, model, model_from_config
from planner.catalog.inventory import inventoried_model
from planner.errors import ModelError
from planner.model import AttentionShape, Model
from tests.hub_server import LLAMA

ROOT = Path(__file__).resolve().parents[2]
MAMBA = {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 64, "state_size": 4}


TENSOR = {"name": "a.*.w", "shape": [3], "role": "norm", "kind": "norm", "layers": [0, 1], "tied_to": None}
HEAD = {"name": "b", "shape": [3], "role": "head", "kind": "linear", "layers": [], "tied_to": "a.0.w"}
ATTENTION = {"fused": True, "head_dims": [[6, 4]], "window": 7, "dropout": 0.5}
ANSWER = {
    "task": "causal-lm",
    "max_positions": 8,
    "parameters": 6,
    "tensors": [TENSOR, HEAD],
    "attention": ATTENTION,
}


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache of this test's own."""
    monkeypatch.setenv("PLANNER_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The process ids of the children that were started."""
    started: list[int] = []
    real = subprocess.Popen

    class Recorded(real):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            started.append(self.pid)

    monkeypatch.setattr(parent.subprocess, "Popen", Recorded)
    return started


def built(config: dict[str, Any], **options: Any) -> Model:
    return inventoried_model(config, id="org/x", source="test", **options)


def refusal(config: dict[str, Any], **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        built(config, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("org/x: ")
    assert len(message) < 500
    return message


def test_every_language_model_of_transformers_is_counted_exactly() -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "tests.catalog.every_architecture"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=True,
    )
    found = json.loads(answer.stdout.splitlines()[-1])
    print("transformers cannot build, from its own default config:", *found["unbuildable"], sep="\n  ")
    assert found["wrong"] == []
    assert len(found["counted"]) >= 200
    assert len(found["unbuildable"]) <= len(found["counted"]) // 10


def test_a_state_space_model_and_its_kept_inventory(cache: Path, children: list[int]) -> None:
    mamba = built(MAMBA)
    assert mamba.architecture is None
    assert (mamba.task, mamba.config) == ("causal-lm", MAMBA)
    by_name = {tensor.name: tensor for tensor in mamba.tensors}
    mixer = by_name["backbone.layers.*.mixer.A_log"]
    assert (mixer.shape, mixer.layers, mixer.kind) == ((64, 4), (0, 1, 2), "parameter")
    assert by_name["lm_head.weight"].tied_to == "backbone.embeddings.weight"
    assert by_name["backbone.layers.*.mixer.in_proj.weight"].kind == "linear"
    assert len(children) == 1

    assert built(dict(reversed(MAMBA.items()))) == mamba  # kept; the order of keys does not matter
    assert len(children) == 1
    assert len(list(cache.rglob("*.json"))) == 1
    assert list(cache.rglob("*.part")) == []


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"tensors": []}', '"tensors"', "\x00"])
def test_a_damaged_inventory_is_made_again(monkeypatch: pytest.MonkeyPatch, cache: Path, damage: str) -> None:
    answers = ["never used", json.dumps(ANSWER), json.dumps(ANSWER)]
    monkeypatch.setattr(parent, "_answer", lambda *_: answers.pop())
    first = built(MAMBA)
    assert first.attention == AttentionShape(fused=True, head_dims=((6, 4),), window=7, dropout=0.5)
    (kept,) = cache.rglob("*.json")
    kept.write_text(damage, encoding="utf-8")
    assert built(MAMBA) == first
    assert built(MAMBA) == first
    assert answers == ["never used"]
    assert json.loads(kept.read_text(encoding="utf-8")) == ANSWER


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("PLANNER_CACHE_DIR", str(tmp_path / "file"))
    monkeypatch.setattr(parent, "_answer", lambda *_: json.dumps(ANSWER))
    assert built(MAMBA).parameters == 6


@pytest.mark.parametrize(
    "damage",
    [
        {"task": "x"},
        {"tensors": []},
        {"parameters": 7},
        {"tensors": [{**TENSOR, "kind": "x"}]},
        {"attention": None},
        {"attention": {**ATTENTION, "head_dims": [["wide", 4]]}},
    ],
)
def test_an_answer_is_checked(monkeypatch: pytest.MonkeyPatch, damage: dict[str, Any]) -> None:
    monkeypatch.setattr(parent, "_answer", lambda *_: json.dumps({**ANSWER, **damage}))
    assert "could not be counted" in refusal(MAMBA)


def test_what_transformers_refuses_is_said_in_one_line(cache: Path) -> None:
    message = refusal({"model_type": "mamba", "hidden_size": "wide"})
    assert "cannot build it: " in message
    assert "hidden_size" in message
    message = refusal({"model_type": "own", "auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}})
    assert "never runs remote code" in message
    assert list(cache.rglob("*")) == []  # an error is not kept


def test_a_child_that_takes_too_long_is_ended(children: list[int]) -> None:
    began = time.monotonic()
    assert "took longer than 1 s" in refusal({**MAMBA, "num_hidden_layers": 10**6}, patience_seconds=1)
    assert time.monotonic() - began < 10
    assert_gone(children[0])


def test_an_interrupt_ends_the_child(children: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(parent.subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        built(MAMBA)
    assert_gone(children[0])


def assert_gone(pid: int) -> None:
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_without_torch_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    real = parent.util.find_spec
    monkeypatch.setattr(parent.util, "find_spec", lambda name: None if name == package else real(name))
    assert f"needs {package}, which is not installed; install torch and transformers" in refusal(MAMBA)


def in_process(config: dict[str, Any], task: Any = None) -> dict[str, Any]:
    """The child's own function, without the process."""
    from planner.training.inventory import inventory

    return inventory(config, task)


SMALL = ("gpt2", "Qwen2.5-0.5B", "pythia-160m", "bloom-560m", "gemma-3-270m", "bert-base-uncased", "t5-small")


@pytest.mark.parametrize("name", SMALL)
def test_inventory_and_closed_formulas_list_the_same_tensors(name: str) -> None:
    closed = model(name)
    found = in_process(closed.config, closed.task)
    assert found["parameters"] == closed.parameters
    entries = [parent._tensor(entry) for entry in found["tensors"]]
    assert sum(entry.parameters for entry in entries) == closed.parameters
    assert shapes(entries) == shapes(closed.tensors)


def shapes(tensors: Any) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for tensor in tensors for name in tensor.names()}


@pytest.mark.parametrize(
    ("config", "task"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "masked-lm"),
        ({"model_type": "bert", "architectures": ["BertLMHeadModel"]}, "causal-lm"),
        ({"model_type": "bert", "architectures": ["BertForSequenceClassification"]}, "masked-lm"),
        ({"model_type": "bart", "architectures": ["BartForConditionalGeneration"]}, "seq2seq-lm"),
        ({"model_type": "t5"}, "seq2seq-lm"),
        ({"model_type": "mamba", "architectures": None}, "causal-lm"),
        ({"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"]}, "seq2seq-lm"),
        ({"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}, "causal-lm"),
    ],
)
def test_the_task_is_what_the_config_says_or_transformers_maps(config: dict[str, Any], task: str) -> None:
    from planner.training.inventory import class_for, config_of

    cls, found = class_for(config_of(config), config.get("architectures"), None)
    assert found == task
    named = (config.get("architectures") or [None])[0]
    assert named is None or "Classification" in named or cls.__name__ == named


def test_what_is_no_language_model_is_refused() -> None:
    with pytest.raises(Exception, match="no vit language model"):
        in_process({"model_type": "vit"})
    with pytest.raises(Exception, match="no llama language model for masked-lm"):
        in_process(LLAMA, "masked-lm")
    with pytest.raises(Exception, match="has no model_type 'nope'"):
        in_process({"model_type": "nope"})


def test_quantization_and_attention_settings_do_not_change_the_count() -> None:
    plain = in_process(LLAMA)
    stored = {"quantization_config": {"quant_method": "mxfp4"}, "_attn_implementation": "flash_attention_2"}
    assert in_process({**LLAMA, **stored}) == plain
    assert plain["parameters"] == model_from_config(LLAMA, id="x", source="test").parameters
