"""The reader around the real training step on a simulated device, where every byte's part is known.

What the reader claims to know from the allocator's statistics and blocks has to be what the ledger of the
simulation knows of the same moment; the rest of the peak is the one remainder.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, get_args

import pytest
import torch

from planner import Adapter, BitFit, LoRA, Setup
from planner.measure import reading
from planner.measure.answer import measured_report, readings
from planner.optimizers import FROM_BITSANDBYTES, Optimizer
from planner.report import PARTS, MemoryReport
from planner.simulate.place import simulated_place
from planner.simulate.run import simulate
from planner.training.runs import run_of
from tests.simulate.small import GPT2, LLAMA, setup_of

TOTAL_BYTES = 16 << 30
USED_BY_OTHERS_BYTES = 300 << 20
CONTEXT_BYTES = 450 << 20
DEVICE = {
    "event": "device", "name": "a simulated device", "capability": [8, 0], "total_bytes": TOTAL_BYTES,
    "driver": "0", "others_bytes": USED_BY_OTHERS_BYTES, "context_bytes": CONTEXT_BYTES,
    "used_source": "nvml",
}
STARTED = {
    "event": "started", "pid": 1, "seed": 0, "versions": {"torch": torch.__version__}, "environment": {},
}


def on_a_simulated_device(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> MemoryReport:
    """The report of the measuring process's own reader, torch.cuda answered by the simulation's allocator."""
    simulation, place = simulated_place(setup.sharding, None)
    allocator, ledger = simulation.allocator, simulation.ledger

    def stats(_device: int) -> dict[str, Any]:
        allocated = {"current": allocator.allocated_bytes, "peak": allocator.peak_allocated_bytes}
        reserved = {"current": allocator.reserved_bytes, "peak": allocator.peak_reserved_bytes}
        return {
            "allocated_bytes": {"all": allocated},
            "reserved_bytes": {"all": reserved},
            "num_alloc_retries": 0,
        }

    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", stats)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", allocator.reset_peak)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: [])
    monkeypatch.setattr(reading, "_bytes_of", lambda _blocks, kept: sum({
        getattr(tensor, "_local_tensor", tensor).untyped_storage()._cdata: ledger.bytes_of(tensor)
        for tensor in kept
    }.values()))
    events: list[dict[str, Any]] = [STARTED, DEVICE]
    reader = reading.CudaReadings(
        lambda event, **values: events.append({"event": event, **values}),
        lambda: allocator.reserved_bytes + CONTEXT_BYTES + USED_BY_OTHERS_BYTES,
    )

    @contextmanager
    def phases(name: str, step: int | None) -> Iterator[None]:
        with reader(name, step), simulation.phase(name, step):
            yield

    stack = ExitStack()
    stack.enter_context(place)
    run = run_of(setup, torch.device("meta"), phases)
    with stack, simulation.outcome():
        run.prepare()
        reader.follow(run)
        simulation.follow(run.net, run.trained)
        for step in (1, 2):
            run.step(step)
    total = sum(p.numel() for p in run.net.parameters())
    trained = sum(p.numel() for p in run.trained)
    events.append(
        {"event": "parameters", "total": total, "trainable": trained, "added": total - setup.model.parameters}
    )
    events.append({"event": "workspace", "workspace_bytes": ledger.totals["workspace"]})
    if reader.paged_bytes:
        events.append({"event": "paged", "paged_bytes": reader.paged_bytes})
    events.append({"event": "done"})
    return measured_report(setup, readings(events), date="2026-01-01T00:00:00+00:00")


SETUPS = {
    "full": setup_of(LLAMA),
    "full, clipped, accumulated": setup_of(LLAMA, gradient_accumulation_steps=2, clip_grad_norm=1.0),
    "full, peak at the loss": setup_of(LLAMA, changes={"vocab_size": 90_000}),
    "full, mixed": setup_of(LLAMA, precision="bf16-mixed"),
    "full, tied": setup_of(LLAMA, changes={"tie_word_embeddings": True, "vocab_size": 5000}),
    "full, tied, accumulated, mixed": setup_of(
        LLAMA, changes={"tie_word_embeddings": True}, precision="bf16-mixed", gradient_accumulation_steps=2
    ),
    "full, tied, fp16 scaled": setup_of(GPT2, precision="fp16-mixed", activation_checkpointing=True),
    "lora": setup_of(LLAMA, LoRA(lora_rank=8)),
    "lora, checkpointed": setup_of(LLAMA, LoRA(lora_rank=8), activation_checkpointing=True),
    "lora, all linear layers, scaled": setup_of(
        LLAMA, LoRA(lora_rank=16, target_modules="all-linear"), precision="fp16-mixed"
    ),
    "adapter": setup_of(GPT2, Adapter(adapter_size=16), seq_len=256),
    "bitfit": setup_of(GPT2, BitFit(), optimizer="sgd"),
    "full, trainer's clipping, fp32": setup_of(GPT2, precision="fp32", clip_grad_norm=1.0),
    **{f"full, {name}": setup_of(LLAMA, optimizer=name) for name in get_args(Optimizer)},
    "full, zeroed": setup_of(LLAMA, zero_grad="zero"),
    "full, zeroed, peak at the loss": setup_of(LLAMA, changes={"vocab_size": 90_000}, zero_grad="zero"),
    "full, zeroed, paged, accumulated": setup_of(
        GPT2, zero_grad="zero", optimizer="paged-adamw-8bit", gradient_accumulation_steps=2
    ),
    **{
        f"{kind} of 4, {what}": setup.replace(num_gpus=4, sharding=kind)
        for kind in ("fsdp", "fsdp-grad-op", "ddp")
        for what, setup in {
            "full": setup_of(LLAMA),
            "full, mixed, accumulated": setup_of(
                LLAMA, precision="bf16-mixed", gradient_accumulation_steps=2
            ),
            "lora": setup_of(LLAMA, LoRA(lora_rank=8)),
            "full, tied": setup_of(LLAMA, changes={"tie_word_embeddings": True, "vocab_size": 5000}),
        }.items()
    },
    "lora, zeroed, adafactor": setup_of(LLAMA, LoRA(lora_rank=8), zero_grad="zero", optimizer="adafactor"),
}


@pytest.mark.parametrize("name", SETUPS)
def test_what_is_read_is_what_the_ledger_knows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = SETUPS[name]
    if setup.training.optimizer in FROM_BITSANDBYTES:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    simulated = simulate(setup)
    measured = on_a_simulated_device(setup, monkeypatch)
    assert measured.parameters == simulated.parameters
    assert measured.peak_allocated_bytes == simulated.peak_allocated_bytes
    assert measured.peak_phase == simulated.peak_phase
    for seen, true in zip(measured.phases, simulated.phases, strict=True):
        assert (seen.name, seen.step) == (true.name, true.step)
        assert seen.allocated_bytes == true.allocated_bytes, (seen.name, seen.step)
        assert seen.peak_allocated_bytes == true.peak_allocated_bytes, (seen.name, seen.step)
    exact = set(PARTS) - set(measured.not_known) - set(measured.by_subtraction)
    promised = {"base_weights", "adapter_weights", "gradients"}
    if setup.sharding.is_fsdp and setup.training.gradient_accumulation_steps > 1:
        promised -= {"gradients"}  # whole ones wait within FSDP2
    assert exact >= promised, "what the probe promises to know"
    for part in exact:
        assert getattr(measured.parts, part) == getattr(simulated.parts, part), part
    (remainder,) = measured.by_subtraction
    others = sum(getattr(simulated.parts, part) for part in {*measured.not_known, remainder})
    assert getattr(measured.parts, remainder) == others
    assert measured.provenance.get("paged_bytes") == simulated.provenance.get("paged_bytes")
    assert measured.provenance["context_bytes"] == CONTEXT_BYTES
