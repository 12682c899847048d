"""Checkpoints of some layers, and inputs that wait on the host: refusals, bytes, and a real run."""

from __future__ import annotations

import json
import runpy
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import modeling_utils

from planner.advise import changes
from planner.catalog import model_from_config
from planner.cli.export import write
from planner.errors import SetupError
from planner.estimate import estimate
from planner.export import exported
from planner.report import MemoryReport
from planner.simulate import simulate, simulate_step
from planner.spec import FullFineTuning, LoRA, QLoRA, Setup, Sharding, Training
from planner.training.build import skeleton
from planner.training.run import TrainingRun
from planner.units import MIB
from tests.estimate.shapes import shortened
from tests.hub_server import LLAMA
from tests.test_export_qlora import in_folder

SMALL = model_from_config({**LLAMA, "num_hidden_layers": 5}, id="org/small", source="test")
LLAMA_1B = "meta-llama/Llama-3.2-1B"


def planned(model: Any = LLAMA_1B, method: Any = None, **training: Any) -> Setup:
    values = {"activation_checkpointing": True, "micro_batch_size": 4, "seq_len": 256, **training}
    return Setup(model=model, method=method, training=Training(**values))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"checkpoint_every": 0}, "checkpoint_every must be a whole number of at least 1, got 0"),
        ({"checkpoint_every": True}, "checkpoint_every must be a whole number"),
        ({"checkpoint_offload": "yes"}, "checkpoint_offload must be true or false, got 'yes'"),
        ({"checkpoint_every": 2}, "checkpoint_every chooses among the checkpoints of activation_"),
        ({"checkpoint_offload": True}, "turn that on, or leave checkpoint_offload out"),
    ],
)
def test_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(SetupError) as refusal:
        Training(**values)
    assert words in str(refusal.value)


def forward_end(report: MemoryReport) -> int:
    return next(p.allocated_bytes for p in report.phases if (p.name, p.step) == ("forward", 2))


@pytest.mark.parametrize("ask", [estimate, simulate])
def test_inputs_on_the_host_are_no_memory_of_the_gpu(ask: Any) -> None:
    """16 layers' inputs [4, 256, 2048] in bf16; the first is the embeddings' output, a leaf that stays."""
    size = 4 * 256 * 2048 * 2
    here, there = ask(planned(method=LoRA())), ask(planned(method=LoRA(), checkpoint_offload=True))
    assert forward_end(here) - forward_end(there) == 15 * size
    assert there.provenance["offloaded_bytes"] == 16 * size
    assert "offloaded_bytes" not in here.provenance
    assert any("0.06 GiB of layers' inputs (67,108,864 bytes)" in note for note in there.notes)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp", "zero3"])
def test_each_rank_has_its_own_on_its_host(sharding: Any) -> None:
    setup = planned(LLAMA_1B, LoRA(), checkpoint_offload=True, precision="bf16-mixed")
    shared = Setup(
        model=setup.model,
        method=setup.method,
        training=setup.training,
        sharding=Sharding(num_gpus=2, sharding=sharding),
    )
    report = estimate(shared)
    offloaded = report.provenance["offloaded_bytes"]
    assert offloaded > 0
    assert any("wait in pinned memory of the host" in note for note in report.notes)
    if sharding != "zero3":  # DeepSpeed is known by formula only
        assert simulate(shared).provenance["offloaded_bytes"] == offloaded


def test_the_more_layers_have_a_checkpoint_the_less_waits() -> None:
    for ask in (estimate, simulate):
        waiting = [forward_end(ask(planned(checkpoint_every=every))) for every in (1, 2, 4, 100)]
        without = forward_end(ask(planned(activation_checkpointing=False)))
        assert waiting[0] < waiting[1] < waiting[2] < waiting[3] < without


class Counted(saved_tensors_hooks):
    """What a real run hands to `save_on_cpu`; pinned memory is there beside a GPU alone."""

    seen: ClassVar[list[int]] = []

    def __init__(self, pin_memory: bool = False, device_type: str = "cuda") -> None:
        def pack(tensor: torch.Tensor) -> torch.Tensor:
            self.seen.append(tensor.numel() * tensor.element_size())
            return tensor.clone()

        super().__init__(pack, lambda tensor: tensor.clone())


def trained(setup: Setup) -> tuple[list[torch.Tensor], int]:
    """What a real step leaves in the weights, and how many bytes waited elsewhere."""
    torch.manual_seed(0)
    Counted.seen.clear()
    run = TrainingRun(setup, torch.device("cpu"), lambda _name, _step: nullcontext())
    with mock.patch.object(modeling_utils, "save_on_cpu", Counted):
        run.prepare()
        run.step(1)
    return [p.detach().clone() for p in run.trained], sum(Counted.seen)


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("method", [FullFineTuning(), LoRA()], ids=lambda m: m.name)
def test_a_real_step_trains_the_same_and_hands_over_what_was_said(method: Any, every: int) -> None:
    usual = planned(SMALL, method, precision="fp32", seq_len=16)
    weights, none = trained(usual)
    setup = usual.replace(checkpoint_every=every, checkpoint_offload=True)
    again, waited = trained(setup)
    assert none == 0
    assert waited == simulate(setup).provenance["offloaded_bytes"]
    assert waited == estimate(setup).provenance["offloaded_bytes"]
    assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_layers_last_product_runs_backwards_before_the_layer_is_made_again(quantization: Any) -> None:
    """bitsandbytes' products ask autograd for nothing: the weight they unpack meets no recomputed layer."""
    pytest.importorskip("bitsandbytes")
    method = QLoRA(lora_rank=64, target_modules=("attention",), quantization=quantization)
    wide = shortened("mistralai/Mistral-7B-v0.1", 3)
    setup = planned(wide, method, micro_batch_size=1, seq_len=1024, precision="fp16-mixed", loss="liger")
    peak = simulate(setup).peak_allocated_bytes
    assert estimate(setup).peak_allocated_bytes == pytest.approx(peak, rel=0.001)


def test_qlora_checkpoints_the_same_layers() -> None:
    pytest.importorskip("bitsandbytes")
    report = simulate(planned(method=QLoRA(), checkpoint_every=4, checkpoint_offload=True))
    assert report.provenance["offloaded_bytes"] == 4 * (4 * 256 * 2048 * 4)  # fp32, as peft leaves embeddings


def test_a_step_of_ones_own_that_saves_on_the_host() -> None:
    def step(layer: nn.Module) -> None:
        x = torch.zeros(1024, 1024, device="cuda", requires_grad=True)
        with torch.autograd.graph.save_on_cpu(pin_memory=True):
            out = layer(layer(x))
        out.sum().backward()

    report = simulate_step(lambda: nn.Linear(1024, 1024, device="cuda"), step)
    assert report.provenance["offloaded_bytes"] >= 2 * 4 * MIB


def test_the_advice_names_it_where_it_helps() -> None:
    """Long samples: what waits for the backward pass is layers' inputs."""
    setup = planned(method=LoRA(), seq_len=8192, loss="liger").replace(gpu="24GiB")
    assert {"checkpoint_offload": True} in [dict(change.keys) for change in changes(setup)]
    some = setup.replace(checkpoint_every=2, checkpoint_offload=True)
    keys = [dict(change.keys) for change in changes(some)]
    assert {"checkpoint_every": 1} in keys
    assert not any("checkpoint_offload" in each for each in keys)


def test_an_encoder_decoder_is_simulated_only() -> None:
    setup = planned("google-t5/t5-small", checkpoint_offload=True)
    assert "activations" in estimate(setup).not_known
    assert simulate(setup).provenance["offloaded_bytes"] > 0


@pytest.mark.parametrize("method", [LoRA(), QLoRA()], ids=lambda m: m.name)
def test_the_exported_script_checkpoints_them(method: Any, tmp_path: Path) -> None:
    setup = planned(SMALL, method, checkpoint_every=2, checkpoint_offload=True)
    write(exported(setup), tmp_path / "run")
    script = runpy.run_path(str(tmp_path / "run" / "train.py"))
    settings = json.loads((tmp_path / "run" / "settings.json").read_text(encoding="utf-8"))
    net = skeleton(SMALL, dtype=torch.float32)
    here = mock.patch.object(torch.cuda, "is_available", return_value=True)  # else it leaves the host alone
    with mock.patch.object(modeling_utils, "save_on_cpu", Counted), here:
        script["checkpointed"](net, settings)
        layers: Any = net.get_submodule("model.layers")
        assert [layer.gradient_checkpointing for layer in layers] == [True, False, True, False, True]
        Counted.seen.clear()
        layers[0]._gradient_checkpointing_func(torch.neg, torch.ones(3, requires_grad=True))
    assert sum(Counted.seen) >= 3 * 4
    text = (tmp_path / "run" / "train.py").read_text(encoding="utf-8")
    # peft's preparation of a quantized model turns on those of every layer: the choice comes again behind it
    assert text.count("checkpointed(model, settings)\n") == (2 if isinstance(method, QLoRA) else 1)


def test_the_exported_script_runs_without_a_gpu_too(tmp_path: Path) -> None:
    setup = planned(SMALL, LoRA(), checkpoint_every=2, checkpoint_offload=True, seq_len=16, precision="fp32")
    write(exported(setup), tmp_path / "run")
    said = in_folder(tmp_path / "run", "train.py", "--model", "model", "--steps", "2")
    assert said.count(": loss ") == 2
