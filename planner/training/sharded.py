"""A model shared by several ranks: FSDP2's `fully_shard`, unit by unit, or DDP around the whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from planner.sharding import Sharding
from planner.training.build import brought, initialized
from planner.training.recipe import autocast_dtype
from planner.training.units import Units, units_of

__all__ = ["fsdp", "mesh_of", "mixed_precision"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def mesh_of(sharding: Sharding, device_type: str) -> DeviceMesh:
    """All ranks in one line, under HSDP `[nodes, GPUs of a node]`. A process group must stand already."""
    if sharding.sharding == "hsdp":
        shape = (sharding.nodes, sharding.per_node)
        return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(device_type, (sharding.num_gpus,), mesh_dim_names=("shard",))


def mixed_precision(precision: str, reduce_dtype: str | None) -> MixedPrecisionPolicy:
    """FSDP's own casting, which takes autocast's place: weights are gathered in the compute dtype.

    Source: accelerate 1.15, FullyShardedDataParallelPlugin.set_mixed_precision: one dtype for gathered
    weights, reduction and outputs. Recipes without autocast gather and reduce in the weights' own dtype.
    """
    compute = autocast_dtype(precision)
    reduce = _DTYPES[reduce_dtype] if reduce_dtype else compute
    return MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduce, output_dtype=compute)


def fsdp(net: nn.Module, sharding: Sharding, precision: str, device: torch.device, mesh: DeviceMesh) -> None:
    """Bring a skeleton to `device` as shards, in place: never more than one unit is there as a whole.

    Weights are random. Units and settings are accelerate's, see `units_of`; `reshard_after_forward` does
    not hold for the tail and the root, which the backward pass needs first. Raises SetupError.
    """
    units = units_of(net, sharding.shard_unit)
    pinned = device.type == "cuda"
    offloads = sharding.cpu_offload == "parameters"
    offload = CPUOffloadPolicy(pin_memory=pinned) if offloads else OffloadPolicy()
    settings: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": mixed_precision(precision, sharding.reduce_dtype),
        "offload_policy": offload,
    }
    reshard = sharding.reshard_after_forward
    for block in units.blocks:
        _bring(net, block.modules(), device)
        fully_shard(block, reshard_after_forward=reshard, **settings)
    if units.embedding is not None:
        _bring(net, units.embedding.modules(), device)
        fully_shard(units.embedding, reshard_after_forward=reshard, **settings)
    if units.tail:
        _bring(net, (part for module in units.tail for part in module.modules()), device)
        fully_shard(list(units.tail), reshard_after_forward=False, **settings)
    _bring(net, _outside(net, units), device)
    fully_shard(net, **settings)
    if device.type == "cpu":  # gloo knows no average
        sharded: Any = net
        sharded.set_force_sum_reduction_for_comms(True)
    if sharding.prefetch is not None:
        _prefetch(list(units.in_order()), sharding.prefetch)


def _bring(net: nn.Module, modules: Iterable[nn.Module], device: torch.device) -> None:
    chosen = list(modules)
    brought(chosen, device)
    if device.type != "meta":
        initialized(net, chosen)


def _outside(net: nn.Module, units: Units) -> Iterator[nn.Module]:
    roots = [*units.blocks, *units.tail, *([units.embedding] if units.embedding is not None else [])]
    inside = {module for root in roots for module in root.modules()}
    return (module for module in net.modules() if module not in inside)


def _prefetch(order: list[Any], ahead: int) -> None:
    """Each unit asks for the next ones in the forward pass, for those before it in the backward pass."""
    for index, module in enumerate(order):
        module.set_modules_to_forward_prefetch(order[index + 1 : index + 1 + ahead])
        before = order[max(0, index - ahead) : index]
        if before:
            module.set_modules_to_backward_prefetch(before[::-1])
