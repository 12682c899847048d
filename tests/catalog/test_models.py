"""Every entry of the catalogue against transformers' own class, tensor by tensor.

Depends on the version: since transformers 5 the experts of a layer are one parameter, and T5's head is
always tied while the model is built.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from planner.catalog import bare_model, catalogue_entry, model, models
from planner.catalog.outputs import OUTPUTS
from planner.errors import ModelError, SetupError
from planner.targets import module_matches
from tests.catalog.on_meta import built, tensors_by_formula, tensors_of

REPRODUCED = json.loads((Path(__file__).parent / "reproduced_counts.json").read_text())["parameters"]
POSITION_KEYS = ("max_position_embeddings", "n_positions")
NO_LIMIT = ("bloom", "t5")  # ALiBi and relative positions


@pytest.mark.parametrize("name", models())
def test_entry_equals_transformers(name: str) -> None:
    entry = catalogue_entry(name)
    ours = model(name)
    theirs = built(entry["config"], entry["task"])
    expected = tensors_of(theirs)
    assert tensors_by_formula(ours) == expected
    counted = sum(math.prod(tensor.shape) for tensor in expected.values() if tensor.tied_to is None)
    assert counted == sum(p.numel() for p in theirs.parameters())
    assert ours.parameters == counted == entry["parameters"]

    shape = ours.architecture
    assert shape is not None
    assert (shape.family, ours.task) == (entry["config"]["model_type"], entry["task"])
    layers = [type(module).__name__ for module in theirs.modules()]
    assert layers.count(shape.layer_class) == shape.num_layers + shape.encoder_layers
    assert ((shape.attention_output,), (shape.mlp_output,)) == OUTPUTS[shape.family]
    for suffix in (shape.attention_output, shape.mlp_output):
        assert any(module_matches(module, suffix) for module, _ in theirs.named_modules())


@pytest.mark.parametrize("name", REPRODUCED)
def test_counts_that_were_reproduced_elsewhere(name: str) -> None:
    assert model(name).parameters == REPRODUCED[name]


@pytest.mark.parametrize(
    "name, positions",
    [  # max_position_embeddings of the published config.json; RoBERTa's 514 rows hold 512 positions
        ("meta-llama/Llama-2-7b-hf", 4096),
        ("meta-llama/Meta-Llama-3-8B", 8192),
        ("meta-llama/Llama-3.2-3B", 131072),
        ("mistralai/Mistral-7B-v0.1", 32768),
        ("Qwen/Qwen2.5-7B", 131072),
        ("Qwen/Qwen2.5-7B-Instruct", 32768),
        ("Qwen/Qwen3-8B", 40960),
        ("google/gemma-3-1b-pt", 32768),
        ("openai-community/gpt2", 1024),
        ("google-bert/bert-base-uncased", 512),
        ("FacebookAI/roberta-large", 512),
        ("bigscience/bloom-560m", None),
        ("google-t5/t5-base", None),
    ],
)
def test_positions(name: str, positions: int | None) -> None:
    assert model(name).max_positions == positions


def test_entries_are_complete() -> None:
    """At least 70 models, each with a source, and its positions written down."""
    assert len(models()) >= 70
    for name in models():
        entry = catalogue_entry(name)
        assert set(entry) - {"evidence"} == {"task", "parameters", "source", "config"}, name
        for source in (entry["source"], *entry.get("evidence", ())):
            assert re.fullmatch(r"https://\S+( \(.+\))?", source), (name, source)
        config = entry["config"]
        assert any(key in config for key in POSITION_KEYS) or config["model_type"] in NO_LIMIT, name
    assert len({name.casefold() for name in models()}) == len(models())


@pytest.mark.parametrize(
    "family",
    ["bloom-1", "bloom-3b", "opt-2", "opt-30b", "opt-66b", "t5-", "gpt-neox-20b", "starcoder2", "distil"],
)
def test_numbers_that_were_compared_say_with_what(family: str) -> None:
    """Their config.json was out of reach when they were written, so other files vouch for them."""
    own = [name for name in models() if name.rpartition("/")[2].startswith(family)]
    vouched = {"google-t5/t5-base", "distilbert/distilbert-base-uncased"}  # reproduced, or opened
    assert own
    assert all(catalogue_entry(name).get("evidence") for name in own if name not in vouched)


def test_names_are_forgiving() -> None:
    full = model("meta-llama/Llama-3.2-3B")
    assert model("META-llama/llama-3.2-3b") == model("llama-3.2-3b") == full
    assert model("gpt2").id == "openai-community/gpt2"
    assert model("meta-llama/Llama-3.2-3B") is full


@pytest.mark.parametrize(
    "name, near",
    [("gpt-2", "gpt2"), ("meta-llama/Llama-3.2-4B", "meta-llama/Llama-3.2-3B"), ("qwen3_8b", "Qwen3-8B")],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ModelError, match="not in the catalogue; did you mean") as raised:
        model(name)
    assert near in str(raised.value)
    assert "\n" not in str(raised.value)


def test_bare_models() -> None:
    bare = bare_model("params:7e9")
    assert (bare.parameters, bare.is_bare, bare.tensors, bare.architecture) == (7_000_000_000, True, (), None)
    for text in ("params:0", "params:-1", "params:nan", "params:1e99", "params:"):
        with pytest.raises(SetupError, match="not a number of parameters"):
            bare_model(text)
    with pytest.raises(ModelError, match="params: and a number"):
        bare_model("7e9")


def test_a_lookup_imports_the_standard_library_only() -> None:
    """A family's module is read when it is asked for, and nothing heavy ever."""
    code = """
import sys
before = set(sys.modules)
from planner.catalog import model
model("Llama-3.2-3B")
new = {name.partition(".")[0] for name in set(sys.modules) - before} - {"planner"}
print(sorted(name for name in new if name not in sys.stdlib_module_names))
print("planner.catalog.families.gpt" in sys.modules)
"""
    root = Path(__file__).resolve().parents[2]
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert answer.stdout.split() == ["[]", "False"], answer.stdout + answer.stderr
