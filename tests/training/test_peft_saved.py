"""The trained tensors on disk: round trip, the predicted size to the byte, and files that do not fit."""

from __future__ import annotations

import os
import pickle
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings as hypothesis_settings, strategies as st
from safetensors.torch import load_file, save as serialized, save_file
from torch import nn

from planner.errors import SetupError
from planner.estimate.storage import safetensors_bytes
from planner.training.peft import LoRASettings, attach, load, merge, save, trainable_parameters
from tests.training.peft_families import logits, tiny_model
from tests.training.test_peft_training import settings

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def trained(model_type: str, method: str) -> nn.Module:
    """A model whose method has other values than at the start."""
    model = attach(tiny_model(model_type), settings(model_type, method))
    torch.manual_seed(7)
    for parameter in trainable_parameters(model).values():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("method", ["lora", "lora-all", "houlsby", "pfeiffer", "bitfit"])
@pytest.mark.parametrize("model_type", ["gpt2", "bert", "opt"])
def test_round_trip_and_predicted_size(model_type: str, method: str, tmp_path: Path) -> None:
    model = trained(model_type, method)
    path = save(model, tmp_path / "adapter.safetensors")
    shapes = {name: tuple(parameter.shape) for name, parameter in trainable_parameters(model).items()}
    assert path.stat().st_size == safetensors_bytes(shapes, 4)
    assert list(tmp_path.iterdir()) == [path]
    assert load_file(path).keys() == shapes.keys()

    fresh = attach(tiny_model(model_type), settings(model_type, method))
    assert not torch.equal(logits(fresh), logits(model))
    load(fresh, path)
    assert torch.equal(logits(fresh), logits(model))


def test_16_bit_biases_beside_fp32_adapters(tmp_path: Path) -> None:
    model = tiny_model("qwen2").to(torch.bfloat16)
    attach(model, LoRASettings(lora_rank=2, lora_alpha=4, lora_bias="all"))
    trained_here = trainable_parameters(model)
    path = save(model, tmp_path / "mixed.safetensors")
    shapes = {name: tuple(parameter.shape) for name, parameter in trained_here.items()}
    biases = {name: "BF16" for name, p in trained_here.items() if p.dtype == torch.bfloat16}
    assert biases
    assert path.stat().st_size == safetensors_bytes(shapes, 4, dtypes=biases)


@hypothesis_settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1, max_size=12),
        st.tuples(st.sampled_from(sorted(_DTYPES)), st.lists(st.integers(0, 40), max_size=3)),
        max_size=30,
    )
)
def test_any_file_has_the_predicted_size(tensors: dict[str, tuple[str, list[int]]]) -> None:
    file = serialized(
        {name: torch.empty(shape, dtype=_DTYPES[dtype]) for name, (dtype, shape) in tensors.items()}
    )
    shapes = {name: shape for name, (_, shape) in tensors.items()}
    assert len(file) == safetensors_bytes(
        shapes, dtypes={name: dtype for name, (dtype, _) in tensors.items()}
    )


def test_a_lora_file_worked_by_hand() -> None:
    """Header {"a":{"dtype":"F32","shape":[8,4096],"data_offsets":[0,131072]}}: 64 bytes, no padding."""
    assert safetensors_bytes({"a": (8, 4096)}) == 8 + 64 + 131_072
    assert safetensors_bytes({"ab": (8, 4096)}) == 8 + 72 + 131_072
    assert safetensors_bytes({"a": (8, 4096)}, 2) == 8 + 64 + 65_536


def test_saving_replaces_whole_files_readable_by_others(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(b"an older file")
    umask = os.umask(0o022)
    try:
        save(trained("gpt2", "lora"), path)
    finally:
        os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o644
    with path.open("rb") as file, pytest.raises(pickle.UnpicklingError):
        pickle.load(file)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(b"an older file")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SetupError, match="No space left on device"):
        save(trained("gpt2", "lora"), path)
    assert path.read_bytes() == b"an older file"
    assert list(tmp_path.iterdir()) == [path]


def changed(tensors: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    first = min(tensors)
    if how == "lacks":
        return {name: tensor for name, tensor in tensors.items() if name != first}
    if how == "besides":
        return tensors | {"other.weight": torch.zeros(2)}
    if how == "shape":
        return tensors | {first: tensors[first].T.contiguous()}
    return tensors | {first: tensors[first].to(torch.bfloat16)}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("lacks", r"lacks \S+lora_A\.weight; load it"),
        ("besides", r"has other\.weight besides"),
        ("shape", r"lora_A\.weight is \[16, 4\] torch\.float32, the model has \[4, 16\]"),
        ("dtype", r"torch\.bfloat16, the model has"),
    ],
)
def test_a_file_that_does_not_fit_changes_nothing(how: str, message: str, tmp_path: Path) -> None:
    path = save(trained("gpt2", "lora"), tmp_path / "adapter.safetensors")
    save_file(changed(load_file(path), how), path)
    fresh = attach(tiny_model("gpt2"), settings("gpt2", "lora"))
    before = {name: parameter.clone() for name, parameter in trainable_parameters(fresh).items()}
    with pytest.raises(SetupError, match=message) as refused:
        load(fresh, path)
    assert "\n" not in str(refused.value)
    assert all(torch.equal(p, before[name]) for name, p in trainable_parameters(fresh).items())


@pytest.mark.parametrize("content", [None, b"", b"not safetensors at all", pickle.dumps({"a": 1})])
def test_unreadable_files_are_one_line(content: bytes | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(SetupError, match=r"cannot read .* as safetensors") as refused:
            load(attach(tiny_model("gpt2"), settings("gpt2", "lora")), path)
        assert "\n" not in str(refused.value)


def test_what_cannot_be_saved_or_loaded(tmp_path: Path) -> None:
    model = trained("gpt2", "lora")
    with pytest.raises(SetupError, match=r"cannot write .*folder that exists"):
        save(model, tmp_path / "nowhere" / "adapter.safetensors")
    path = save(model, tmp_path / "adapter.safetensors")
    merge(model)
    with pytest.raises(SetupError, match="call unmerge before load"):
        load(model, path)
    with pytest.raises(SetupError, match="trains nothing to save"):
        save(tiny_model("gpt2").requires_grad_(False), path)
    with torch.device("meta"):
        empty = attach(tiny_model("gpt2"), settings("gpt2", "lora"))
    with pytest.raises(SetupError, match="meta device has no data to save"):
        save(empty, path)
    with pytest.raises(SetupError, match="meta device has no data to replace"):
        load(empty, path)
