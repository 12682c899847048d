"""The training loop of peft's own comparison of its methods, simulated (tests/peft_runs.py has its runs)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from planner.batching import asks_masks
from planner.simulate.run import provenance
from planner.simulate.simulation import Simulation
from planner.training.run import TrainingRun
from tests.peft_runs import BEFORE, LONGEST, setup_of

__all__ = ["Outcome", "simulated"]


@dataclass(frozen=True)
class Outcome:
    """What a simulated run needs and counts; `trained` parameters, `total` with the model's own."""

    peak_reserved_bytes: int
    trained: int
    total: int
    versions: dict[str, Any]


class _PeftsRun(TrainingRun):
    """run.py's loop, where it differs from ours: how the model comes, and how long an output lives.

    `from_pretrained(device_map="cuda")` takes one block for all weights first and gives it back
    (transformers, caching_allocator_warmup); a model's `use_cache` is left on, so that its output holds the
    keys and values of all layers beside the logits; `outputs = model(**batch)` keeps the output of the batch
    before until the next forward pass is through, and gradients live until the next step begins.
    """

    def _load(self) -> None:
        self.net.config.use_cache = True
        (dtype,) = {p.dtype for p in self.net.parameters()}
        block = torch.empty(sum(p.numel() for p in self.net.parameters()), dtype=dtype, device=self.device)
        del block
        super()._load()

    def step(self, number: int) -> None:
        training = self.setup.training
        inputs = self._inputs()
        items = training.micro_batch_size * training.seq_len  # the sum of the mask, a number on the host
        with self.phases("forward", number):
            self.optimizer.zero_grad()
            loss, outputs = self._loss({**inputs, "num_items_in_batch": items})
            self._kept = inputs, outputs, loss
            del inputs, outputs
        with self.phases("backward", number):
            loss.backward()
        with self.phases("optimizer_step", number):
            nn.utils.clip_grad_norm_(self.net.parameters(), training.clip_grad_norm)
            self.optimizer.step()


def simulated(run: dict[str, Any], longest: int = LONGEST, *, steps: bool = True) -> Outcome:
    """The longest batch of a run, simulated; without `steps` only its parameters are counted.

    Batches come in buckets of 20, each from the longest to the shortest, and the cache is emptied every tenth
    step (run.py): before the longest batch of all the cache is empty, and the output of the shortest of the
    bucket before is alive.
    """
    setup = setup_of(run, longest)
    simulation = Simulation(gpu=setup.gpu, has_masks=asks_masks(setup.training))
    theirs = _PeftsRun(setup, torch.device("meta"), simulation.phase)
    with simulation.outcome():
        theirs.prepare()
        if steps:
            theirs.setup = setup.replace(seq_len=BEFORE)
            theirs.step(1)
            torch.cuda.empty_cache()
            theirs.setup = setup
            theirs.step(2)
    return Outcome(
        peak_reserved_bytes=simulation.peak_reserved_bytes,
        trained=sum(p.numel() for p in theirs.trained),
        total=sum(p.numel() for p in theirs.net.parameters()),
        versions=provenance(setup),
    )
