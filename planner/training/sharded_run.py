"""The training step of one rank among several: over shards, or over a copy that is kept equal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from planner.errors import SetupError
from planner.spec import Adapter, LoRA, PeftConfig, Setup
from planner.training.attach import attached
from planner.training.build import checkpoints_layers
from planner.training.group import is_imagined
from planner.training.optimizers import optimizer_for
from planner.training.run import PhaseHook, TrainingRun
from planner.training.sharded import fsdp, mesh_of

__all__ = ["ShardedRun"]


class ShardedRun(TrainingRun):
    """A setup on one of its devices; a process group of `num_gpus` ranks must stand.

    Under FSDP the method is attached before the model is brought to the device, as users do, so that its
    parameters are sharded with their unit. Raises SetupError for DeepSpeed's stages.
    """

    shared = True

    def __init__(self, setup: Setup, device: torch.device, phases: PhaseHook, **options: Any) -> None:
        """As for one GPU; under FSDP the method is attached to the skeleton already."""
        self.sharding = setup.sharding
        if self.sharding.zero_stage:
            raise SetupError(
                f"sharding {self.sharding.sharding} is DeepSpeed's, which only estimate knows, by formula; "
                "simulate or measure fsdp or fsdp-grad-op instead."
            )
        super().__init__(setup, device, phases, **options)
        self.replica: DistributedDataParallel | None = None
        if self.sharding.is_fsdp:
            self.autocast_dtype = None  # FSDP casts by itself
            self._vocabulary = self.net.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
            self.net = attached(
                self.net, setup.model, setup.method, low_memory=True, own_lora=self.own_lora
            )

    def prepare(self) -> None:
        """Load and shard, or load, attach and replicate: phases `load` and `attach`."""
        adds = isinstance(self.setup.method, LoRA | Adapter | PeftConfig)
        if not self.sharding.is_fsdp:
            super().prepare()
            self.added = tuple(self.trained) if adds else ()
            return
        training = self.setup.training
        with self.phases("load", None):
            if training.activation_checkpointing:
                checkpoints_layers(self.net, training)
            self.net.train()
            mesh = mesh_of(self.sharding, self.device.type)
            fsdp(self.net, self.sharding, training.precision, self.device, mesh)
        with self.phases("attach", None):
            self.trained = [p for p in self.net.parameters() if p.requires_grad]
            self.added = tuple(self.trained) if adds else ()
            self.optimizer = optimizer_for(training.optimizer, self.net)
            if training.precision == "fp16-mixed":
                self.scaler = torch.amp.GradScaler("cuda")

    def _join(self) -> None:
        simulated = self.device.type == "meta"
        imagined = is_imagined()  # the others' weights cannot be compared with ours
        self.replica = DistributedDataParallel(self.net, init_sync=simulated or not imagined)
        if imagined:  # it returns no result, which DDP asks for
            self.replica.register_comm_hook(None, lambda _state, bucket: _done(bucket.buffer()))
        if simulated:
            silent: Any = SimpleNamespace(set_runtime_stats_and_log=lambda: None)
            self.replica.logger = silent  # it warns that it cannot take times there

    def _outputs(self, inputs: dict[str, torch.Tensor]) -> Any:
        return self.net(**inputs) if self.replica is None else self.replica(**inputs)

    def _optimize(self, clip_grad_norm: float | None) -> None:
        if self.sharding.cpu_offload == "parameters" and self.device.type == "meta":
            self.optimizer.zero_grad()  # the step itself is the host's: nothing of it is on the device
            return
        super()._optimize(clip_grad_norm)

    def _reduction(self, *, last: bool) -> AbstractContextManager[Any]:
        """Gradients meet after the last micro batch, as HF Trainer has it (accelerate's `no_sync`)."""
        if last:
            return super()._reduction(last=last)
        if self.replica is not None:
            return self.replica.no_sync()
        return _unreduced(self.net)


def _done(buffer: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
    """A bucket of gradients as it is."""
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(buffer)
    return future


@contextmanager
def _unreduced(net: Any) -> Iterator[None]:
    net.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        net.set_requires_gradient_sync(True)
