"""The exported script of QLoRA: on bitsandbytes' own CPU kernels it loads, quantizes, trains and saves."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from planner.catalog.resolve import resolve
from planner.cli.export import write
from planner.estimate.parameters import parameters
from planner.export import BITSANDBYTES, exported, why_not
from planner.spec import QLoRA, Setup, Training

QWEN = {
    "model_type": "qwen2", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 96, "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}  # fmt: skip
SHOW = """
import json, runpy, sys, warnings
warnings.simplefilter("ignore")
sys.argv = ["train.py", "--steps", "2", "--out", "saved"]
parts = runpy.run_path("train.py", run_name="__main__")
settings = json.load(open("settings.json"))
net = parts["attached"](parts["loaded"]("model", settings), settings)
print(json.dumps({n: [list(p.shape), str(p.dtype), p.requires_grad] for n, p in net.named_parameters()}))
"""


def planned(quantization: str, **training: Any) -> Setup:
    """QLoRA of a tiny model."""
    model = resolve("a qwen2", config_text=json.dumps(QWEN))
    method = QLoRA(lora_rank=4, quantization=quantization)  # type: ignore[arg-type]
    return Setup(model=model, method=method, training=Training(seq_len=8, **training))


@pytest.mark.parametrize("quantization", ["nf4", "nf4-double", "int8"])
def test_the_files_say_what_was_planned(quantization: str) -> None:
    setup = planned(quantization, precision="bf16-mixed")
    files = exported(setup)
    ast.parse(files["train.py"])
    settings = json.loads(files["settings.json"])
    assert settings["quantization"] == quantization
    assert settings["planned"]["trainable_parameters"] == parameters(setup).trainable
    assert BITSANDBYTES in files["requirements.txt"].splitlines()
    assert why_not(setup) is None


def in_folder(folder: Path, *words: str) -> str:
    """What Python prints there on the CPU."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    ("quantization", "precision", "checkpointing"),
    [("nf4-double", "bf16-mixed", True), ("int8", "bf16", False)],
)
def test_the_script_runs_and_holds_the_planner_s_tensors(
    tmp_path: Path, quantization: str, precision: str, checkpointing: bool
) -> None:
    """Two steps, the adapter saved; every parameter by name, shape, dtype and whether it is trained."""
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed; tests/requirements.txt brings it")
    setup = planned(quantization, precision=precision, activation_checkpointing=checkpointing)
    write(exported(setup), tmp_path / "run")
    said, shown = in_folder(tmp_path / "run", "-c", SHOW).rstrip("\n").rsplit("\n", 1)
    expected = f"{parameters(setup).trainable:,}"
    assert f"trained parameters: {expected}, planned {expected}" in said
    assert said.count(": loss ") == 2
    assert (tmp_path / "run" / "saved" / "adapter_model.safetensors").is_file()
    assert json.loads(shown) == ours(setup)


def ours(setup: Setup) -> dict[str, list[Any]]:
    """The same of the training step that is simulated and measured."""
    import contextlib
    import warnings

    import torch

    from planner.training.run import TrainingRun

    step = TrainingRun(setup, torch.device("meta"), lambda _name, _step: contextlib.nullcontext())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step.prepare()
    return {n: [list(p.shape), str(p.dtype), p.requires_grad] for n, p in step.net.named_parameters()}
