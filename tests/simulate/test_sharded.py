"""One rank of many: FSDP2 and DDP themselves, simulated, against their own shards, buckets and rules."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import _compute_bucket_assignment_by_size

from planner import BitFit, LoRA, Setup, Sharding, Training, estimate, simulate
from planner.errors import SetupError
from planner.estimate.shards import chunk_numel, local_numel, pieces
from planner.simulate.events import simulated_events
from planner.simulate.place import simulated_place
from planner.simulate.simulation import Simulation
from planner.spec import Adapter
from planner.training.runs import run_of
from planner.units import MIB
from tests.simulate.small import GPT2, LLAMA, model_of, setup_of

MIXED = {"precision": "bf16-mixed"}
TIED = {"tie_word_embeddings": True}


def shared(setup: Setup, number: int, kind: str = "fsdp", **options: Any) -> Setup:
    """The setup on several GPUs."""
    sharding = Sharding(num_gpus=number, sharding=kind, **options)  # type: ignore[arg-type]
    return Setup(model=setup.model, method=setup.method, training=setup.training, sharding=sharding)


def local(tensor: Any) -> torch.Tensor:
    return getattr(tensor, "_local_tensor", tensor)


def stored(tensors: Iterable[Any]) -> int:
    """Bytes of the storages behind these tensors' shards, each once."""
    storages = [local(tensor).untyped_storage() for tensor in tensors]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


class Held:
    """What a simulated rank holds after a step: weights and states; and its gradients before it."""

    def __init__(self, setup: Setup, rank: int = 0) -> None:
        simulation, place = simulated_place(setup.sharding, rank)
        self.gradients: list[torch.Size] = []
        self.gradient_bytes = 0
        with place:
            run = run_of(setup, torch.device("meta"), simulation.phase)
            optimize = run._optimize
            run._optimize = lambda clip: self._note(run) or optimize(clip)  # type: ignore[method-assign, func-returns-value]
            with simulation.outcome():
                run.prepare()
                simulation.follow(run.net, run.trained)
                run.step(1)
                simulation.know_states(run.optimizer)
            parameters = list(run.net.parameters())
            self.parameter_bytes = stored(parameters)
            self.shapes = [tuple(local(p).shape) for p in parameters]
            self.weights = {name: local(p).numel() for name, p in run.net.named_parameters()}
            self.whole = {name: p.numel() for name, p in run.net.named_parameters()}
            self.weight_bytes = sum(simulation.ledger.bytes_of(p) for p in parameters)
            self.trained = [tuple(local(p).shape) for p in run.trained]
            states = [v for s in run.optimizer.state.values() for v in s.values()]
            self.state_bytes = stored(v for v in states if v.dim())
            self.states = [tuple(local(v).shape) for v in states if v.dim()]
            self.on_device = all(simulation.ledger.knows(p) for p in parameters)
            self.parts = dict(simulation.ledger.totals)

    def _note(self, run: Any) -> None:
        self.gradient_bytes = stored(p.grad for p in run.trained)
        self.gradients = [tuple(local(p.grad).shape) for p in run.trained]  # type: ignore[misc]


BYTES = [
    *[(config, None, training, number) for number in (2, 3, 8, 1024)
      for config, training in ((LLAMA, MIXED), (LLAMA, {}), (GPT2, {"precision": "fp32"}))],
    *[(LLAMA, LoRA(lora_rank=rank, target_modules=("all-linear",)), training, number)
      for rank, number in ((4, 2), (3, 5), (8, 64)) for training in ({}, MIXED)],
    (GPT2, LoRA(lora_rank=4), {}, 16),
    (LLAMA, Adapter(adapter_kind="houlsby"), MIXED, 6),
    (GPT2, BitFit(), {}, 11),
    ({**LLAMA, **TIED}, None, MIXED, 7),
]  # fmt: skip


@pytest.mark.parametrize(("config", "method", "training", "number"), BYTES)
def test_formulas_are_exact_to_the_byte(
    config: dict[str, Any], method: Any, training: dict[str, Any], number: int
) -> None:
    setup = shared(setup_of(config, method, seq_len=8, **training), number, gpus_per_node=number)
    tensors = pieces(setup)
    for rank in (0, number - 1) if number == 5 else (number - 1,):
        found = Held(setup, rank)
        padded = [chunk_numel(piece.shape, number) * piece.element_bytes for piece in tensors]
        own = [local_numel(piece.shape, number, rank) * piece.element_bytes for piece in tensors]
        trained = [piece.trained for piece in tensors]
        assert found.parameter_bytes == sum(padded)
        assert found.gradient_bytes == sum(size for size, asked in zip(padded, trained, strict=True) if asked)
        assert found.state_bytes == 2 * sum(size for size, asked in zip(own, trained, strict=True) if asked)


SHAPES = [
    (LLAMA, None, {}, 2, 0),
    (LLAMA, None, {}, 3, 2),
    (LLAMA, None, MIXED, 1024, 0),
    (LLAMA, None, MIXED, 1024, 1023),
    (LLAMA, None, {"precision": "fp32"}, 7, 6),
    (GPT2, None, MIXED, 5, 4),
    (LLAMA, LoRA(lora_rank=4), {}, 2, 1),
    (LLAMA, LoRA(lora_rank=4, target_modules=("all-linear",)), MIXED, 8, 7),
    (LLAMA, Adapter(), MIXED, 4, 3),
    (GPT2, BitFit(), {}, 4, 0),
]


@pytest.mark.parametrize(("config", "method", "training", "number", "rank"), SHAPES)
def test_a_rank_holds_its_chunks_and_nothing_else(
    config: dict[str, Any], method: Any, training: dict[str, Any], number: int, rank: int
) -> None:
    setup = shared(setup_of(config, method, **training), number)
    found = Held(setup, rank)
    assert found.on_device
    assert found.gradients == found.trained
    assert found.states == [shape for shape in found.trained for _ in range(2)]
    everybody = [Held(setup, other).weights for other in range(number)] if number <= 4 else []
    for name, numel in found.whole.items() if everybody else ():
        assert sum(weights[name] for weights in everybody) == numel
    weights = found.parts["base_weights"] + found.parts["adapter_weights"]
    assert 0 <= weights - found.weight_bytes <= 4096  # rotary frequencies stay whole


def test_the_cost_does_not_depend_on_the_number_of_ranks() -> None:
    setup = setup_of(LLAMA, **MIXED)
    simulate(shared(setup, 2))  # warm

    def cost(number: int) -> tuple[int, float]:
        watched: list[Simulation] = []
        began = time.process_time()
        simulate(shared(setup, number), watch=watched.append)
        return len(watched[0].ledger.events), time.process_time() - began

    (few_events, few_s), (many_events, many_s) = cost(2), cost(1024)
    assert few_events == many_events
    assert many_s < 2 * few_s + 0.5


def gathers(setup: Setup, number: int, size_bytes: int) -> int:
    """How often a buffer of this size was taken for a collective in the second step."""
    return sum(
        not event.freed and event.step == 2 and event.size_bytes == size_bytes and "empty" in event.site
        for event in simulated_events(shared(setup, number))
    )


def test_a_unit_is_gathered_twice_and_reduced_once() -> None:
    setup = setup_of(LLAMA)
    hidden, inner, heads, grouped = 256, 512, 256, 128
    block = 2 * hidden * heads + 2 * hidden * grouped + 3 * hidden * inner + 2 * hidden  # parameters
    # forward gather, backward gather and the reduce-scatter's input, for each of two blocks (all divide by 2)
    assert gathers(setup, 2, 2 * block) == 2 * 3
    # with checkpointing the backward pass gathers before it computes again, and not once more
    assert gathers(setup_of(LLAMA, activation_checkpointing=True), 2, 2 * block) == 2 * 3


def test_without_resharding_the_model_stays_gathered() -> None:
    setup = setup_of(LLAMA, **MIXED)
    both = {}
    for kind in ("fsdp", "fsdp-grad-op"):
        report = simulate(shared(setup, 8, kind))
        both[kind] = {p.name: p.allocated_bytes for p in report.phases if p.step == 2}
    units = 2 * sum(
        t.numel for t in setup.model.tensors for _ in t.layers or ((0,) if t.role == "embedding" else ())
    )
    kept = both["fsdp-grad-op"]["forward"] - both["fsdp"]["forward"]
    assert units <= kept <= units + 19 * 512  # the embedding, nine tensors in each of two blocks, rounded
    assert both["fsdp-grad-op"]["backward"] == both["fsdp"]["backward"]


def test_unreduced_gradients_wait_for_the_last_micro_batch() -> None:
    setup = setup_of(LLAMA, **MIXED)
    once = simulate(shared(setup, 8))
    thrice = simulate(shared(setup_of(LLAMA, **MIXED, gradient_accumulation_steps=3), 8))
    whole = 2 * setup.model.parameters  # bf16
    grown = max(p.peak_allocated_bytes for p in thrice.phases) - once.peak_allocated_bytes
    assert 0.9 * whole < grown < 1.1 * whole
    assert thrice.parts.gradients > 0.9 * whole


def test_offloaded_shards_are_not_on_the_device() -> None:
    found = Held(shared(setup_of(LLAMA, **MIXED), 4, cpu_offload="parameters"))
    assert found.weight_bytes == 0
    assert found.gradients == found.trained
    assert found.states == []  # the host's
    assert found.parts["base_weights"] <= 4096
    assert found.parts["optimizer_states"] == found.parts["gradients"] == 0


def test_buckets_are_those_of_ddp() -> None:
    setup = setup_of(LLAMA, **MIXED)
    watched: list[Simulation] = []
    report = simulate(shared(setup, 4, "ddp"), watch=watched.append)
    alone: list[Simulation] = []
    simulate(setup, watch=alone.append)
    sizes = [torch.Size(t.shape) for t in setup.model.tensors for _ in t.layers or (None,)]
    tensors = [torch.empty(size, device="meta") for size in sizes]
    buckets, _limits = _compute_bucket_assignment_by_size(tensors, [MIB, 25 * MIB], [False] * len(tensors))
    together = sum(4 * tensors[index].numel() for bucket in buckets for index in bucket)
    first, second = (s[0].phases[-1].allocated_bytes for s in (watched, alone))
    assert together <= first - second <= together + 512 * len(buckets) + 2 * MIB
    assert report.peak_phase == "optimizer_step"
    assert 2 * together <= report.parts.gradients <= 2 * together + 4 * MIB  # gradients and their copies
    assert report.parts.adapter_weights == 0
    assert simulate(shared(setup, 1000, "ddp")).peak_allocated_bytes == report.peak_allocated_bytes


def test_frozen_parameters_are_in_no_bucket() -> None:
    setup = setup_of(LLAMA, LoRA(lora_rank=4))
    alone, replicated = simulate(setup), simulate(shared(setup, 4, "ddp"))
    trained = 4 * alone.parameters.trainable
    more = replicated.phases[-1].allocated_bytes - alone.phases[-1].allocated_bytes
    assert trained <= more <= trained + 4096


def test_collectives_have_pools_of_their_own() -> None:
    watched: list[Simulation] = []
    simulate(shared(setup_of(LLAMA), 4), watch=watched.append)
    allocator = watched[0].allocator
    assert {0, 1, 3} <= set(allocator._large) | set(allocator._small)  # main, gathering, reducing
    assert allocator.peak_reserved_bytes > allocator.peak_allocated_bytes


def test_replicas_of_shards_hold_what_a_node_holds() -> None:
    setup = setup_of(LLAMA, **MIXED)
    one = simulate(shared(setup, 4))
    many = simulate(shared(setup, 64, "hsdp", gpus_per_node=4))
    assert many.phases[0].allocated_bytes == one.phases[0].allocated_bytes
    assert many.phases[-1].allocated_bytes == one.phases[-1].allocated_bytes


@pytest.mark.parametrize("changes", [{}, TIED])
def test_every_option_runs(changes: dict[str, Any]) -> None:
    setup = setup_of(LLAMA, changes=changes, **MIXED, clip_grad_norm=1.0)
    plain = simulate(shared(setup, 4))
    ahead = simulate(shared(setup, 4, prefetch=2))
    wide = simulate(shared(setup, 4, reduce_dtype="fp32"))
    scaled = simulate(shared(setup_of(LLAMA, changes=changes, precision="fp16-mixed"), 4))
    assert ahead.phases[-3].peak_allocated_bytes >= plain.phases[-3].peak_allocated_bytes
    assert wide.phases[-2].peak_allocated_bytes >= plain.phases[-2].peak_allocated_bytes
    assert scaled.parts.optimizer_states > 0
    assert all(p.allocated_bytes <= p.peak_allocated_bytes for p in plain.phases)


def test_two_runs_agree_to_the_byte_and_leave_nothing_behind() -> None:
    setup = shared(setup_of(LLAMA, LoRA(lora_rank=4)), 4)
    first, second = simulate(setup), simulate(setup)
    assert first == second
    full = simulate(setup, limit_bytes=4 * MIB)
    assert full.out_of_memory is not None
    assert not dist.is_initialized()
    assert not hasattr(torch, "meta")
    assert "resize_" not in vars(torch.UntypedStorage)


def test_deepspeed_s_slices_are_fsdp2_s_shards_where_they_coincide() -> None:
    """ZeRO-3 keeps fp32 weights beside its states, and a 16-bit copy; all are the same parameters over N."""
    setup = Setup(
        model="meta-llama/Llama-3.2-1B",
        training=Training(precision="bf16-mixed", seq_len=64, optimizer="adamw-fused"),
    )
    simulated = simulate(shared(setup, 8)).parts
    sliced = estimate(shared(setup, 8, "zero3")).parts
    shards = simulated.base_weights + simulated.optimizer_states
    assert sliced.optimizer_states == pytest.approx(shards, rel=0.002)  # blocks and padding
    assert sliced.base_weights == pytest.approx(simulated.base_weights / 2, rel=0.002)


def test_the_report_names_its_rank() -> None:
    setup = shared(setup_of(LLAMA), 4)
    report = simulate(setup, rank=3)
    assert report.notes[0].startswith("Rank 3 of 4.")
    assert report.parameters.total == setup.model.parameters
    assert report.parts.total_bytes == report.peak_allocated_bytes
    assert simulate(setup).notes[0].startswith("Rank 0 of 4.")


@pytest.mark.parametrize(
    ("sharding", "rank", "words"),
    [
        ({"num_gpus": 4, "sharding": "fsdp"}, 4, "rank must be a whole number from 0 to 3"),
        ({}, 0, "rank 0 is one of several, and this setup has one GPU"),
        ({"num_gpus": 4, "sharding": "zero3"}, None, "which only estimate knows, by formula"),
        ({"num_gpus": 4, "sharding": "fsdp", "shard_unit": "Nothing"}, None, "no module class of this model"),
    ],
)
def test_what_cannot_be_simulated_is_refused(sharding: dict[str, Any], rank: Any, words: str) -> None:
    setup = Setup(
        model=model_of(LLAMA), training=setup_of(LLAMA, **MIXED).training, sharding=Sharding(**sharding)
    )
    with pytest.raises(SetupError, match=words):
        simulate(setup, rank=rank)


def test_a_smaller_unit_leaves_the_rest_to_the_root() -> None:
    setup = setup_of(LLAMA, **MIXED)
    layers, parts = simulate(shared(setup, 8)), simulate(shared(setup, 8, shard_unit="LlamaMLP"))
    attention = 2 * sum(t.numel * 2 for t in setup.model.tensors if t.role == "attention")
    kept = parts.phases[2].allocated_bytes - layers.phases[2].allocated_bytes  # the root stays gathered
    assert 0.9 * attention < kept < 1.1 * attention + 8192
    for name in ("LlamaModel", "LlamaForCausalLM"):
        with pytest.raises(SetupError, match=f"shard_unit {name}"):
            simulate(shared(setup, 8, shard_unit=name))
