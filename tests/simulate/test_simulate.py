"""The simulated step of a setup: what is in the report, what each option changes, and what is left behind."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from planner.errors import TraceError
from planner.estimate import estimate
from planner.report import MemoryReport, Phase
from planner.simulate.ledger import Ledger
from planner.simulate.run import simulate
from planner.simulate.simulation import Simulation
from planner.spec import Adapter, BitFit, LoRA, Setup
from planner.units import MIB
from tests.simulate.small import GPT2, LLAMA, setup_of

FULL = setup_of(LLAMA)
FEW_TOKENS = {"micro_batch_size": 1, "seq_len": 16}  # the peak is in the optimizer's step
LAYER = [256 * 256, 128 * 256, 128 * 256, 256 * 256, 512 * 256, 512 * 256, 512 * 256, 256, 256]
WEIGHTS = [1000 * 256, *LAYER, *LAYER, 256, 1000 * 256]
LORA = setup_of(LLAMA, LoRA(lora_rank=8, target_modules=("q_proj", "v_proj")))


def up(size_bytes: int) -> int:
    return -(-size_bytes // 512) * 512


def phase(report: MemoryReport, name: str, step: int | None = 2) -> Phase:
    """The last phase of that name in a step."""
    return [p for p in report.phases if (p.name, p.step) == (name, step)][-1]


def event_count(setup: Setup) -> int:
    found: list[Simulation] = []
    simulate(setup, watch=found.append)
    return len(found[0].ledger.events)


def test_the_report_holds_together() -> None:
    report = simulate(FULL, gpu="a100-40gb")
    assert report.source == "simulation"
    assert report.setup == FULL.to_dict()
    assert report.peak_allocated_bytes == max(p.peak_allocated_bytes for p in report.phases)
    assert report.peak_reserved_bytes == max(p.peak_reserved_bytes or 0 for p in report.phases)
    assert report.peak_allocated_bytes == max(size for _, size in report.timeline)
    names = [(p.name, p.step) for p in report.phases]
    step = ("forward", "backward", "optimizer_step")
    assert names == [("load", None), ("attach", None), *[(n, 1) for n in step], *[(n, 2) for n in step]]
    assert set(report.provenance) == {"planner", "torch", "transformers", "peft", "accelerate"}
    assert MemoryReport.from_dict(report.to_dict()) == report


@pytest.mark.parametrize("setup", [FULL, LORA], ids=["full", "lora"])
def test_twice_gives_the_same_to_the_byte(setup: Setup) -> None:
    assert simulate(setup) == simulate(setup)


def test_the_cost_grows_with_layers_and_not_with_tokens() -> None:
    by_layers = [event_count(setup_of(LLAMA, changes={"num_hidden_layers": n})) for n in (2, 3, 4)]
    assert by_layers[2] - by_layers[1] == by_layers[1] - by_layers[0] > 0
    assert event_count(setup_of(LLAMA, micro_batch_size=8, seq_len=256)) == by_layers[0]


def test_full_fine_tuning_byte_by_byte() -> None:
    report = simulate(setup_of(LLAMA, precision="fp32", **FEW_TOKENS))
    weights = sum(up(4 * n) for n in WEIGHTS)
    rotary = 2 * up(32 * 4)  # buffers: inverse frequencies of 64 / 2 numbers, and their original
    assert report.parameters.total == report.parameters.trainable == sum(WEIGHTS)
    assert report.parts.base_weights == weights + rotary
    assert report.parts.gradients == weights
    assert report.parts.optimizer_states == 2 * weights
    assert report.parts.temporaries == weights  # torch._foreach_sqrt
    assert phase(report, "load", None).allocated_bytes == weights + rotary


def test_an_adapter_stays_fp32_over_a_sixteen_bit_base() -> None:
    report = simulate(LORA)
    adapters = 2 * [up(4 * 8 * 256), up(4 * 256 * 8), up(4 * 8 * 256), up(4 * 128 * 8)]
    assert report.parts.adapter_weights == sum(adapters)
    assert report.parts.optimizer_states == 2 * sum(adapters)
    attach = phase(report, "attach", None).allocated_bytes - phase(report, "load", None).allocated_bytes
    assert attach == sum(adapters)


def test_tied_weights_are_there_once() -> None:
    tied, own = (
        simulate(setup_of(LLAMA, changes={"tie_word_embeddings": tie}, **FEW_TOKENS)) for tie in (True, False)
    )
    table = up(1000 * 256 * 2)
    assert own.parts.base_weights - tied.parts.base_weights == table
    assert own.parameters.total - tied.parameters.total == 1000 * 256
    assert own.parts.gradients - tied.parts.gradients == table


def test_the_second_step_is_higher_than_the_first() -> None:
    report = simulate(FULL)
    states = report.parts.optimizer_states
    assert states > 0
    first, second = phase(report, "backward", 1), phase(report, "backward", 2)
    assert second.allocated_bytes - first.allocated_bytes == states
    assert second.peak_allocated_bytes - first.peak_allocated_bytes >= states


def test_kept_outputs_hold_the_logits_through_the_backward_pass() -> None:
    logits = up(2 * 128 * 1000 * 2)
    kept, given_up = (simulate(LORA.replace(loop=loop)) for loop in ("plain", "trainer"))
    ends = [phase(report, "backward").allocated_bytes for report in (kept, given_up)]
    assert ends[0] - ends[1] == logits - 512  # HF Trainer holds the number of tokens asked for


def test_labels_of_their_own_are_one_more_tensor() -> None:
    separate, same = (simulate(LORA, separate_labels=own) for own in (True, False))
    difference = phase(separate, "forward").allocated_bytes - phase(same, "forward").allocated_bytes
    assert difference == up(2 * 128 * 8)


def test_gradients_are_alive_while_the_next_micro_batch_runs() -> None:
    once = simulate(FULL)
    twice = simulate(setup_of(LLAMA, gradient_accumulation_steps=2))
    assert [p.name for p in twice.phases[2:7]] == ["forward", "backward"] * 2 + ["optimizer_step"]
    difference = phase(twice, "forward").peak_allocated_bytes - phase(once, "forward").peak_allocated_bytes
    gradients = sum(up(2 * n) for n in WEIGHTS)
    outputs = up(2 * 128 * 1000 * 2) + 2 * up(2 * 128 * 8) + 2 * 512  # of before: logits, inputs, both losses
    assert difference == gradients + outputs


def test_clipping_takes_a_norm_for_each_gradient() -> None:
    # fused AdamW takes nothing, so the norms of the tensors (512 bytes each) are the peak of that phase
    plain = simulate(setup_of(LLAMA, optimizer="adamw-fused"))
    clipped = simulate(setup_of(LLAMA, optimizer="adamw-fused", clip_grad_norm=1.0))
    peaks = [phase(report, "optimizer_step").peak_allocated_bytes for report in (plain, clipped)]
    assert len(WEIGHTS) * 512 <= peaks[1] - peaks[0] < 64 * 512
    assert plain.parts.base_weights == clipped.parts.base_weights


def test_clipping_takes_a_partial_sum_for_each_65536_numbers_of_the_largest_gradient() -> None:
    """ForeachReduceOp.cu: as many for every tensor as for the largest, in fp32, before the norms are made."""
    wide: dict[str, Any] = {"changes": {"vocab_size": 90_000}, "optimizer": "adamw-fused", **FEW_TOKENS}
    setup = setup_of(LLAMA, clip_grad_norm=1.0, **wide)
    chunks = -(-90_000 * 256 // 65_536)
    for report in (simulate(setup), estimate(setup)):
        before = phase(report, "backward").allocated_bytes
        rise = phase(report, "optimizer_step").peak_allocated_bytes - before
        assert rise == up(4 * len(WEIGHTS) * chunks) + 512 * len(WEIGHTS), report.source


def test_foreach_copies_what_is_trained_and_fused_does_not() -> None:
    foreach, fused, sgd = (
        simulate(setup_of(LLAMA, optimizer=name)) for name in ("adamw", "adamw-fused", "sgd")
    )
    rise = {
        name: phase(report, "optimizer_step").peak_allocated_bytes - phase(report, "backward").allocated_bytes
        for name, report in (("adamw", foreach), ("adamw-fused", fused), ("sgd", sgd))
    }
    trained = sum(up(2 * n) for n in WEIGHTS)
    assert rise["adamw"] == trained  # torch._foreach_sqrt of the second moments
    assert rise["sgd"] == 0
    assert rise["adamw-fused"] <= 2 * 512  # the amp scaler's none, the step's increment
    states = [phase(report, "forward").allocated_bytes for report in (foreach, fused, sgd)]
    assert states[0] - states[2] == 2 * trained
    assert states[1] - states[0] == len(WEIGHTS) * 512  # fused: a step counter on the device for each tensor


def test_checkpointing_keeps_the_layers_inputs_alone() -> None:
    plain = simulate(setup_of(LLAMA, micro_batch_size=8))
    again = simulate(setup_of(LLAMA, micro_batch_size=8, activation_checkpointing=True))
    loaded = phase(plain, "attach", None).allocated_bytes
    kept = [phase(report, "forward", 1).allocated_bytes - loaded for report in (plain, again)]
    assert kept[1] < kept[0] / 2
    assert again.parts.base_weights == plain.parts.base_weights
    rise = phase(again, "backward").peak_allocated_bytes - phase(again, "forward").allocated_bytes
    assert rise > 8 * 128 * 512 * 2  # one layer computed again


def test_mixed_precision_holds_fp32_weights_and_casts_them() -> None:
    mixed, plain = simulate(setup_of(LLAMA, precision="bf16-mixed")), simulate(FULL)
    assert mixed.parts.base_weights > 1.9 * plain.parts.base_weights
    assert phase(mixed, "forward").peak_allocated_bytes > phase(plain, "forward").peak_allocated_bytes


def test_dropout_costs_a_mask() -> None:
    kept = []
    for p in (0.1, 0.0):
        changes = {"resid_pdrop": p, "embd_pdrop": p, "attn_pdrop": 0.0}
        report = simulate(setup_of(GPT2, changes=changes))
        kept.append(phase(report, "forward").allocated_bytes)
    masks = 5 * up(2 * 128 * 256)  # the embeddings', and two a layer
    copies = kept[0] - kept[1] - masks
    assert copies >= 0
    assert copies % up(2 * 128 * 256 * 2) == 0


@pytest.mark.parametrize("method", [LoRA(), Adapter(adapter_size=8), BitFit()], ids=lambda m: m.name)
def test_other_methods_train_their_own_tensors_alone(method: Any) -> None:
    report = simulate(setup_of(GPT2, method))
    assert 0 < report.parameters.trainable < report.parameters.total
    assert report.parts.gradients < 0.1 * report.parts.base_weights


# --- a device that is too small


def test_a_limit_just_at_the_reserved_peak_fits_and_the_allocated_one_does_not() -> None:
    roomy = simulate(FULL)
    assert simulate(FULL, limit_bytes=roomy.peak_reserved_bytes).out_of_memory is None
    report = simulate(FULL, limit_bytes=roomy.peak_allocated_bytes - 1)
    failure = report.out_of_memory
    assert failure is not None
    assert failure.op.startswith("aten.")
    assert failure.requested_bytes > 0
    assert failure.phase == report.phases[-1].name
    assert report.peak_allocated_bytes < roomy.peak_allocated_bytes
    assert report.parameters == roomy.parameters


def test_the_request_that_fails_is_named() -> None:
    setup = setup_of(LLAMA, micro_batch_size=64, seq_len=512)
    limit = phase(simulate(setup), "attach", None).reserved_bytes or 0
    failure = simulate(setup, limit_bytes=limit + 64 * MIB).out_of_memory
    assert failure is not None
    assert failure.phase == "forward"
    assert failure.module.startswith("model.")
    assert failure.requested_bytes > 2 * MIB


def test_a_device_too_small_for_the_weights_still_counts_the_parameters() -> None:
    report = simulate(LORA, limit_bytes=3 * MIB)
    assert report.out_of_memory is not None
    assert report.out_of_memory.phase == "load"
    assert report.parameters == simulate(LORA).parameters


def test_a_trace_that_grows_past_its_limit_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["planner.simulate.ledger"], "LARGEST_EVENT_COUNT", 1000)
    with pytest.raises(TraceError, match="the trace grew past"):
        simulate(FULL)


# --- nothing is left behind


def replaced() -> tuple[Any, ...]:
    optimizers = torch.optim.optimizer if hasattr(torch.optim, "optimizer") else None
    names = (F.softmax, F.dropout, F.scaled_dot_product_attention, F.linear, torch.matmul, torch.autocast)
    hooks = len(nn.modules.module._global_forward_pre_hooks), len(nn.modules.module._global_forward_hooks)
    return (*names, torch.Tensor.softmax, torch.is_autocast_enabled, hooks, optimizers, gc.isenabled())


@pytest.mark.parametrize("collects", [True, False])
def test_garbage_collection_is_left_as_it_was(collects: bool) -> None:
    try:
        (gc.enable if collects else gc.disable)()
        simulate(LORA)
        assert gc.isenabled() == collects
    finally:
        gc.enable()


@pytest.mark.parametrize("moment", ["load", "forward", "backward", "optimizer_step"])
def test_an_interruption_leaves_torch_as_it_was(moment: str) -> None:
    before = replaced()

    def interrupt(name: str, _step: int | None) -> None:
        if name == moment:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(LORA, progress=interrupt)
    assert replaced() == before


def test_an_interruption_within_an_operation_leaves_torch_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    before = replaced()
    original: Callable[..., None] = Ledger.record

    def record(self: Ledger, tensor: torch.Tensor, part: str | None = None) -> None:
        if self.phase == "backward":
            raise KeyboardInterrupt
        original(self, tensor, part)

    monkeypatch.setattr(Ledger, "record", record)
    with pytest.raises(KeyboardInterrupt):
        simulate(LORA)
    assert replaced() == before


def test_progress_names_every_phase() -> None:
    seen: list[tuple[str, int | None]] = []
    report = simulate(LORA, progress=lambda name, step: seen.append((name, step)))
    assert seen == [(p.name, p.step) for p in report.phases]
