"""One training run as users run it: load, attach, then optimizer steps, with a hook at every phase."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from planner.batching import row_shape
from planner.errors import SetupError
from planner.spec import QLoRA, Setup
from planner.training.attach import attached, move_trained
from planner.training.attention import attention_kernels, implementation
from planner.training.batches import samples, tokens_asked_for
from planner.training.build import checkpoints_layers, loaded, skeleton
from planner.training.liger import refuse_adapted_head, require_liger, with_fused_loss
from planner.training.liger_kernels import with_kernels
from planner.training.losses import chunked
from planner.training.optimizers import optimizer_for, require_library
from planner.training.peft_config import method_batch, refuse_unknown
from planner.training.recipe import Autocast, autocast_dtype, cuda_autocast, loaded_dtype

__all__ = ["PhaseHook", "TrainingRun"]

PhaseHook = Callable[[str, int | None], AbstractContextManager[Any]]


class TrainingRun:
    """A setup on a device. `phases(name, step)` is entered around every phase.

    Attributes after `prepare`: `net`, `optimizer`, `trained` (parameters that require gradients).
    `separate_labels`: labels are a tensor of their own, as a collator makes them, not the token ids.
    """

    shared = False  # whether several ranks take part: planner.training.sharded_run
    added: tuple[nn.Parameter, ...] = ()  # there: the method's own parameters

    def __init__(
        self,
        setup: Setup,
        device: torch.device,
        phases: PhaseHook,
        *,
        separate_labels: bool = True,
        autocast: Autocast = cuda_autocast,
        own_lora: bool = False,
    ) -> None:
        """The model's skeleton is built on `meta`; nothing is on the device yet."""
        if setup.sharding.is_distributed and not self.shared:
            raise SetupError(
                f"sharding {setup.sharding.sharding} needs several ranks, and this process is one by itself; "
                "measure such a setup alone, or leave --sharding and --num-gpus out."
            )
        require_library(setup.training.optimizer)
        require_liger(setup.training, device)
        refuse_unknown(setup.method, setup.model)
        self.setup = setup
        self.device = device
        self.phases = phases
        self.separate_labels = separate_labels
        self.autocast = autocast
        self.autocast_dtype = autocast_dtype(setup.training.precision)
        self.own_lora = own_lora
        self.net = skeleton(
            setup.model,
            dtype=loaded_dtype(setup),
            attention=implementation(setup.training),
        )
        if isinstance(setup.method, QLoRA):
            from planner.training.quantize import quantizable

            self.net = quantizable(self.net, setup.method, loaded_dtype(setup))
        if setup.training.loss == "chunked":
            self.net = chunked(self.net)
        elif setup.training.loss == "liger":
            self.net = with_fused_loss(self.net, device)
        self.arrived: Callable[[], None] = lambda: None  # called when a weight to quantize is on the device
        self.positions: Callable[[], AbstractContextManager[Any]] = nullcontext  # entered around each step
        self.optimizer: torch.optim.Optimizer
        self.trained: list[nn.Parameter]
        self.scaler: torch.amp.GradScaler | None = None
        self._kept: Any = None
        self._waiting: list[dict[str, Any]] = []
        self._vocabulary = 0

    def prepare(self) -> None:
        """Load the model and attach the method: phases `load` and `attach`."""
        setup, training = self.setup, self.setup.training
        with self.phases("load", None):
            self._load()
            self._vocabulary = self.net.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
            if training.activation_checkpointing:
                checkpoints_layers(self.net, training)
        with self.phases("attach", None):
            meta = self.device.type == "meta"
            self.net = attached(self.net, setup.model, setup.method, low_memory=meta, own_lora=self.own_lora)
            if training.loss == "liger":
                refuse_adapted_head(self.net, setup.model.id)
            if training.kernels == "liger":
                self.positions = with_kernels(self.net, setup.model, self.device)
            self.net.train()
            move_trained(self.net, self.device)
            self.trained = [p for p in self.net.parameters() if p.requires_grad]
            self.optimizer = optimizer_for(training.optimizer, self.net)
            if training.precision == "fp16-mixed":
                self.scaler = torch.amp.GradScaler("cuda")
            self._join()

    def _join(self) -> None:
        """Meet the other ranks, where there are any."""

    def _load(self) -> None:
        """Weights on the device; for QLoRA quantized, and the others in fp32."""
        setup = self.setup
        if not isinstance(setup.method, QLoRA):
            loaded(self.net, self.device)
            return
        from planner.training.quantize import load_quantized, prepare

        load_quantized(self.net, self.device, loaded_dtype(setup), self.arrived)
        prepare(self.net, activation_checkpointing=setup.training.activation_checkpointing)

    def step(self, number: int) -> None:
        """One optimizer step, all its micro batches included; phases carry the step's number."""
        training = self.setup.training
        batches, items = self._batches()
        with attention_kernels(training.attention), self.positions():
            for micro in range(training.gradient_accumulation_steps):
                with self._reduction(last=micro == training.gradient_accumulation_steps - 1):
                    self._micro_batch(number, next(batches), items)
        with self.phases("optimizer_step", number):
            self._optimize(training.clip_grad_norm)
        self._kept = None

    def _batches(self) -> tuple[Iterator[dict[str, Any]], Any]:
        """The step's micro batches, and what the sum of their losses is divided by (None: their number).

        The plain loop makes each at its turn; HF Trainer's has all of them on the device, beside those of the
        step before, and counts their tokens (transformers/trainer.py, `get_batch_samples`).
        """
        training = self.setup.training
        each = (self._inputs() for _micro in range(training.gradient_accumulation_steps))
        if training.loop == "plain":
            return each, None
        self._waiting = list(each)
        return iter(self._waiting), tokens_asked_for(self._waiting, self.net, self.setup.model.task)

    def _micro_batch(self, number: int, inputs: dict[str, Any], items: Any) -> None:
        """Forward and backward pass of one micro batch.

        The plain loop says `outputs = model(**batch)` and holds all of it to the end of the step; HF
        Trainer's `compute_loss` returns the loss alone.
        """
        training = self.setup.training
        with self.phases("forward", number):
            loss, outputs = self._loss(inputs if items is None else {**inputs, "num_items_in_batch": items})
            if items is None and training.gradient_accumulation_steps > 1:
                loss = loss / training.gradient_accumulation_steps
            if training.loop == "plain":
                self._kept = inputs, outputs, loss
            del inputs, outputs
        with self.phases("backward", number):
            scaled = self.scaler.scale(loss) if self.scaler else loss
            scaled.backward()
            del scaled
        del loss

    def _reduction(self, *, last: bool) -> AbstractContextManager[Any]:
        """Entered around each micro batch: where ranks share the run, they meet after the last one."""
        return nullcontext()

    def _outputs(self, inputs: dict[str, Any]) -> Any:
        """The forward pass."""
        return self.net(**inputs)

    def _optimize(self, clip_grad_norm: float | None) -> None:
        """Unscale and clip where asked, step, and set the gradients to None, or to zero where asked."""
        if self.scaler and clip_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
        if clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.trained, clip_grad_norm)
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=self.setup.training.zero_grad == "none")

    def _loss(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
        """The loss and the output object."""
        dtype = self.autocast_dtype
        if dtype is None:
            outputs = self._outputs(inputs)
        else:
            from accelerate.utils import convert_outputs_to_fp32

            with self.autocast(dtype):
                outputs = self._outputs(inputs)
            outputs = convert_outputs_to_fp32(lambda: outputs)()
        return outputs.loss, outputs

    def _inputs(self) -> dict[str, Any]:
        """Random token ids (int64), labels, and what the setup's batching and method put beside them."""
        training = self.setup.training
        ids = torch.randint(0, self._vocabulary, row_shape(training))
        more = method_batch(self.setup.method, ids)
        batch = _brought(samples(training, ids), self.device)
        if "labels" not in batch:
            ids = batch["input_ids"]
            batch["labels"] = ids.clone() if self.separate_labels else ids
        return batch | _brought(more, self.device)


def _brought(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Its tensors on the device; numbers stay."""
    return {
        name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()
    }
