"""Shards exactly as FSDP2 makes them: `fully_shard` itself over torch's fake process group, on `meta`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import _chunk_with_empty
from torch.testing._internal.distributed.fake_pg import FakeStore

from planner import LoRA, Setup, Sharding, Training
from planner.estimate.fsdp import shards
from planner.estimate.shards import chunk_numel, local_numel, pieces, units
from planner.spec import Adapter, BitFit, FullFineTuning, Method
from planner.training.attach import attached
from planner.training.build import skeleton
from planner.training.recipe import weight_dtype
from planner.training.units import units_of

from .shapes import shortened

LLAMA = "meta-llama/Llama-3.2-1B"
LLAMA8 = "meta-llama/Llama-3.1-8B"
GPT2 = "openai-community/gpt2-medium"
NEOX = "EleutherAI/pythia-410m"
BERT = "google-bert/bert-large-uncased"
QWEN3 = "Qwen/Qwen3-0.6B"
OPT = "facebook/opt-350m"
MOE = "Qwen/Qwen3-30B-A3B"
GEMMA = "google/gemma-2b"
LORA = LoRA(lora_rank=8, target_modules=("all-linear",))

CASES: list[tuple[str, Method, str, int]] = [
    *[
        (model, FullFineTuning(), "bf16-mixed", ranks)
        for model, ranks in (
            (LLAMA, 2), (LLAMA, 8), (LLAMA, 1024), (LLAMA8, 3), (LLAMA8, 64), (GPT2, 8), (GPT2, 7),
            (NEOX, 16), (BERT, 5), (QWEN3, 256), (OPT, 6), (MOE, 48), (GEMMA, 12),
        )
    ],
    *[(LLAMA, LORA, precision, ranks) for precision in ("bf16", "bf16-mixed") for ranks in (2, 64, 1000)],
    (GPT2, LORA, "fp32", 16),
    (LLAMA8, LoRA(target_modules=("attention",)), "bf16", 6),
    (QWEN3, Adapter(adapter_kind="houlsby"), "bf16-mixed", 24),
    (GPT2, BitFit(), "bf16", 11),
]  # fmt: skip


@contextmanager
def ranks_of(number: int, rank: int) -> Iterator[None]:
    """This process as one of `number` ranks that do not talk."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=number)
    try:
        yield
    finally:
        dist.destroy_process_group()


def setup_of(model: str, method: Method, precision: str, number: int) -> Setup:
    return Setup(
        model=shortened(model, 2),
        method=method,
        training=Training(precision=precision),  # type: ignore[arg-type]
        sharding=Sharding(num_gpus=number, sharding="fsdp", gpus_per_node=number),
    )


@pytest.mark.parametrize(("model", "method", "precision", "number"), CASES)
def test_every_byte_of_a_rank_is_fsdp2s_own(
    model: str, method: Method, precision: str, number: int
) -> None:
    setup = setup_of(model, method, precision, number)
    found = pieces(setup)
    for rank in {0, number // 2, number - 1}:
        with ranks_of(number, rank):
            net = skeleton(setup.model, dtype=weight_dtype(precision))
            net = attached(net, setup.model, method, low_memory=True)
            mesh = init_device_mesh("cpu", (number,))
            fully_shard(net, mesh=mesh)  # one group: the chunks are the same in any unit
            parameters = net._get_fsdp_state()._fsdp_param_groups[0].fsdp_params  # type: ignore[operator]
            held = [(p.sharded_param.to_local().numel(), p._sharded_param_data.numel()) for p in parameters]
            sizes = [p.sharded_param.to_local().element_size() for p in parameters]
            trained = [p.sharded_param.requires_grad for p in parameters]
        ours = [
            (local_numel(p.shape, number, rank), chunk_numel(p.shape, number), p.element_bytes, p.trained)
            for p in found
        ]
        theirs = [(*pair, size, asked) for pair, size, asked in zip(held, sizes, trained, strict=True)]
        assert sorted(ours) == sorted(theirs)
        if rank == 0:
            assert all(local == padded for local, padded in held)  # the largest chunk is rank 0's
            parameter_bytes = sum(padded * size for (_, padded), size in zip(held, sizes, strict=True))
            own = shards(setup)
            together = own.base_weights_bytes + own.adapter_weights_bytes
            assert 0 <= together - parameter_bytes < 0.02 * parameter_bytes + 512 * len(held)


@pytest.mark.parametrize(
    ("model", "method"),
    [(LLAMA, FullFineTuning()), (LLAMA8, FullFineTuning()), (LLAMA8, LORA), (GPT2, LORA), (NEOX, BitFit()),
     (OPT, FullFineTuning()), (MOE, FullFineTuning())],
)  # fmt: skip
def test_units_are_those_the_training_step_gathers(model: str, method: Method) -> None:
    setup = setup_of(model, method, "bf16", 4)
    net = attached(skeleton(setup.model, dtype=torch.bfloat16), setup.model, method, low_memory=True)
    cut, ours = units_of(net), units(setup)

    def numel(*modules: torch.nn.Module) -> int:
        return sum(p.numel() for p in {p for module in modules for p in module.parameters()})

    def counted(unit: tuple[object, ...]) -> int:
        return sum(piece.numel for piece in unit)  # type: ignore[attr-defined]

    assert [counted(unit) for unit in ours.layers] == [numel(block) for block in cut.blocks]
    assert counted(ours.embedding) == (numel(cut.embedding) if cut.embedding is not None else 0)
    assert counted(ours.tail) == numel(*cut.tail)
    assert sum(counted(unit) for unit in ours.all()) == numel(net)


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 64))
def test_chunks_are_torchs(rows: int, width: int, number: int) -> None:
    tensor = torch.empty(rows, width, device="meta")
    chunks = _chunk_with_empty(tensor, number, 0)
    assert [chunk.numel() for chunk in chunks] == [
        local_numel((rows, width), number, rank) for rank in range(number)
    ]
    assert chunks[0].numel() == chunk_numel((rows, width), number)


@given(st.lists(st.integers(1, 500), min_size=1, max_size=3), st.integers(1, 600))
def test_chunks_of_all_ranks_are_the_tensor(shape: list[int], number: int) -> None:
    sizes = [local_numel(tuple(shape), number, rank) for rank in range(number)]
    assert sum(sizes) == torch.empty(shape, device="meta").numel()
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == chunk_numel(tuple(shape), number)


