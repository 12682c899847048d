"""The exported script of padded and packed samples: real collators, the planner's own batches."""

from __future__ import annotations

import ast
import json
import re
import runpy
import warnings
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from transformers import AttentionInterface, AttentionMaskInterface

from planner.cli.export import write
from planner.export import exported
from planner.spec import LoRA, Setup
from planner.training.batches import samples
from planner.training.varlen_attention import varlen_attention
from tests.test_export import _tokenizer, planned, run
from tests.training.test_batching import by_lengths

assert run  # a fixture
B, S = 3, 12
CAUSAL = SimpleNamespace(is_causal=True)
KINDS = [
    *[("gpt2", "padded", "sdpa"), ("bert", "padded", "eager"), ("t5", "padded", "sdpa")],
    *[("gpt2", "packed", "sdpa"), ("gpt2", "packed", "flash"), ("gpt2", "padded", "flash")],
]


def setup_of(model: str, kind: str, attention: str, **more: Any) -> Setup:
    training = {"micro_batch_size": B, "seq_len": S, "precision": "fp32", **more}
    if attention == "flash":
        training["precision"] = "bf16"
    return planned(model, LoRA(lora_rank=2), batching=kind, attention=attention, **training)


def parts_of(setup: Setup, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the script defines, and its settings."""
    write(exported(setup), folder)
    made = runpy.run_path(str(folder / "train.py"), run_name="train")
    return made, json.loads((folder / "settings.json").read_text())


@pytest.fixture(autouse=True)
def own_registry() -> Any:
    """What a script registers with transformers is gone after the test."""
    with (
        mock.patch.dict(AttentionInterface._global_mapping),
        mock.patch.dict(AttentionMaskInterface._global_mapping),
    ):
        yield


@pytest.mark.parametrize("loop", ["plain", "trainer"])
@pytest.mark.parametrize("model, kind, attention", KINDS)
def test_the_script_trains_on_random_tokens_and_on_a_text(
    model: str, kind: str, attention: str, loop: str, tmp_path: Path, run: Any
) -> None:
    setup = setup_of(model, kind, attention, loop=loop, gradient_accumulation_steps=2)
    script = exported(setup)["train.py"]
    ast.parse(script)
    assert max(map(len, script.splitlines())) <= 110
    printed = run(setup, "--steps", "2")
    summed = 2 if loop == "trainer" and model in ("bert", "t5") else 1  # they do not divide by the labels
    losses = [float(loss) / summed for loss in re.findall(r"loss (\S+)$", printed, re.MULTILINE)]
    assert len(losses) == 2
    assert all(3 < loss < 7 for loss in losses)
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "config.json").write_text(exported(setup)["model/config.json"])
    _tokenizer().save_pretrained(folder)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox\n\nthe lazy dog " + "fox " * 30 + "\nthe dog\ndog\n")
    printed = run(setup, "--steps", "2", "--model", str(folder), "--data", str(text))
    assert "step 2: loss" in printed


@pytest.mark.parametrize("model, kind, attention", [k for k in KINDS if k[0] not in ("bert", "t5")])
def test_its_batches_are_the_planner_s(model: str, kind: str, attention: str, tmp_path: Path) -> None:
    setup = setup_of(model, kind, attention)
    made, settings = parts_of(setup, tmp_path / "run")
    batch = next(made["batches"](settings, 96, None, "model"))
    ids = batch["input_ids"]
    wanted = samples(setup.training, ids)
    assert {**batch}.keys() == wanted.keys()
    for name, value in wanted.items():
        if isinstance(value, torch.Tensor):
            assert batch[name].dtype == value.dtype, name
            assert torch.equal(batch[name], value), name
        else:
            assert batch[name] == value, name


@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_a_line_of_the_text_is_a_sample(kind: str, tmp_path: Path) -> None:
    setup = setup_of("gpt2", kind, "sdpa", micro_batch_size=2)
    made, settings = parts_of(setup, tmp_path / "run")
    _tokenizer().save_pretrained(tmp_path / "run" / "model")
    (tmp_path / "text.txt").write_text("the fox\n" + "dog " * 20)  # 2 and 20 tokens, of which 12 fit
    name = str(tmp_path / "run" / "model")
    for batch in islice(made["batches"](settings, 96, tmp_path / "text.txt", name), 3):
        labels = batch["labels"]
        if kind == "packed":
            assert batch["input_ids"].shape == (1, 14)
            assert int((batch["position_ids"] == 0).sum()) == int((labels == -100).sum()) == 2
        else:
            assert batch["input_ids"].shape == (2, 12)
            assert sorted(batch["attention_mask"].sum(1).tolist()) == [2, 12]
            assert torch.equal(labels == -100, batch["attention_mask"] == 0)


def test_its_flash_attention_is_the_planner_s(tmp_path: Path) -> None:
    made, _ = parts_of(setup_of("qwen2", "packed", "flash"), tmp_path / "run")
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, B * S, 8) for heads in (4, 2, 2))
    batch = samples(setup_of("qwen2", "packed", "flash").training, torch.zeros(1, B * S, dtype=torch.int64))
    lengths = {name: batch[name] for name in batch if name.startswith(("cu_", "max_"))}
    for window in (None, 5, 100):
        with mock.patch.object(torch.ops.aten, "_flash_attention_forward", by_lengths):
            found, wanted = (attend(CAUSAL, query, key, value, None, 0.0, 0.3, window, **lengths)[0]
                             for attend in (made["varlen"], varlen_attention))  # fmt: skip
        assert found.shape == (1, B * S, 4, 8)
        assert torch.equal(found, wanted)


def test_its_attention_without_padding_is_the_planner_s(tmp_path: Path) -> None:
    made, _ = parts_of(setup_of("qwen2", "padded", "flash"), tmp_path / "run")
    torch.manual_seed(0)
    query, key, value = (torch.randn(B, heads, S, 8) for heads in (4, 2, 2))
    mask = torch.arange(S) < torch.tensor([[S], [7], [1]])
    for window in (None, 5, 100):
        with mock.patch.object(torch.ops.aten, "_flash_attention_forward", by_lengths):
            found, wanted = (attend(CAUSAL, query, key, value, mask, 0.0, 0.3, window)[0]
                             for attend in (made["varlen"], varlen_attention))  # fmt: skip
            whole, full = (made["varlen"](CAUSAL, query, key, value, given, 0.0, 0.3, window)[0]
                           for given in (None, torch.ones(B, S)))  # fmt: skip
        assert found.shape == (B, S, 4, 8)
        assert torch.equal(found, wanted)
        assert not found[~mask].any()
        assert torch.equal(whole, full)


def test_lengths_go_to_the_device_beside_tensors(tmp_path: Path) -> None:
    """On a CUDA device the model asks for attention by lengths; here its place is taken by a reference."""
    setup = setup_of("qwen2", "packed", "flash")
    made, settings = parts_of(setup, tmp_path / "run")
    calls: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[5])
        return by_lengths(*args, **kwargs)

    with (
        warnings.catch_warnings(),
        mock.patch.object(torch.ops.aten, "_flash_attention_forward", counted),
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.dict(made["loaded"].__globals__, {"__name__": "train"}),
    ):
        warnings.simplefilter("ignore")
        net = made["attached"](made["loaded"](str(tmp_path / "run" / "model"), settings), settings)
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.0)
        data = made["batches"](settings, 96, None, "model")
        assert 3 < made["one_step"](Accelerator(cpu=True), net, optimizer, [], data, settings) < 7
    assert calls == [S, S]  # of two layers
