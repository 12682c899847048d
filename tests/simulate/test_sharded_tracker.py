"""The simulated rank beside torch's own tracker of FSDP2, which shares no code with the simulation.

FSDPMemTracker (torch.distributed._tools.fsdp2_mem_tracker) counts tensors of a FakeTensorMode on the CPU: no
allocator, no workspaces. Its optimizer step is left out: it counts DTensor's own trials of shapes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from planner import Setup, Sharding, Training
from planner.simulate.events import simulated_events
from planner.simulate.kernels import CUBLAS_WORKSPACE_BYTES
from planner.training.group import imagined_group
from planner.training.units import units_of
from tests.simulate.small import LLAMA, model_of

WIDE = {
    "hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 3072,
    "vocab_size": 2000,
}  # fmt: skip


def tracked(setup: Setup) -> tuple[int, int]:
    """Bytes at the end of the forward pass, and at most up to the end of the backward pass."""
    number, training = setup.sharding.num_gpus, setup.training
    config = transformers.AutoConfig.for_model(**setup.model.config)
    config.use_cache = False
    with imagined_group(number, 0):
        mesh = init_device_mesh("cpu", (number,))
        with FakeTensorMode():
            net: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            net.train()
            units = units_of(net)
            for block in units.blocks:
                fully_shard(block, mesh=mesh)
            if units.embedding is not None:
                fully_shard(units.embedding, mesh=mesh)
            fully_shard(list(units.tail), mesh=mesh, reshard_after_forward=False)
            fully_shard(net, mesh=mesh)
            net.set_force_sum_reduction_for_comms(True)
            tracker = FSDPMemTracker(net)
            ids = torch.randint(0, 2000, (training.micro_batch_size, training.seq_len))
            labels = ids.clone()
            tracker.track_inputs((ids, labels))

            def total(kind: str) -> int:
                return sum(device["Total"] for device in tracker.get_tracker_snapshot(kind).values())

            with tracker:
                outputs = net(input_ids=ids, labels=labels)  # kept, as the step keeps them
                forward = total("current")
                outputs.loss.backward()
                return forward, total("peak")


def asked_for(setup: Setup) -> tuple[int, int]:
    """The same of the simulation: sizes before the allocator rounds them, workspaces left out."""
    live = before = forward = highest = 0
    for event in simulated_events(setup, steps=1):
        if event.size_bytes == CUBLAS_WORKSPACE_BYTES:
            continue
        live += -event.size_bytes if event.freed else event.size_bytes
        if event.phase == "backward" and not forward:
            forward = before
        if event.phase == "optimizer_step":
            break
        highest = max(highest, live)
        before = live
    return forward, highest


@pytest.mark.parametrize(
    ("number", "changes", "batch"),
    [(8, {"num_hidden_layers": 3}, 1), (2, {}, 4), (64, {"num_hidden_layers": 4}, 1),
     (4, {"tie_word_embeddings": True}, 2)],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_torch_s_own_tracker_sees_the_same(number: int, changes: dict[str, Any], batch: int) -> None:
    setup = Setup(
        model=model_of(LLAMA, **{**WIDE, **changes}),
        training=Training(precision="fp32", micro_batch_size=batch, seq_len=512, attention="efficient"),
        sharding=Sharding(num_gpus=number, sharding="fsdp"),
    )
    forward, peak = tracked(setup)
    ours, highest = asked_for(setup)
    layers = setup.model.config["num_hidden_layers"]
    masks = layers * batch * 512 * 512 * 4  # transformers makes masks for fake tensors, which no real run has
    assert ours == pytest.approx(forward - masks, abs=64)
    assert highest == pytest.approx(peak, rel=0.02)  # some masks, and the scratch of CUDA's attention
