"""Steps on a Tesla T4 that others measured and published (tests/data/published_t4_runs.json cites them)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from planner.report import MemoryReport
from planner.simulate.arrivals import Arrivals
from planner.spec import LoRA, QLoRA, Setup, Training

__all__ = ["as_run", "lora_runs", "other_residents", "qlora_runs", "setup_of", "title"]

_FIGURES = json.loads((Path(__file__).parent / "data" / "published_t4_runs.json").read_text())


def lora_runs() -> list[dict[str, Any]]:
    """The runs over unquantized fp16 weights."""
    return list(_FIGURES["runs"])


def qlora_runs() -> list[dict[str, Any]]:
    """The runs over nf4 weights."""
    return list(_FIGURES["nf4_runs"])


def other_residents() -> list[dict[str, Any]]:
    """More nf4 runs, of 7 other models: MiB on the card before the step."""
    return list(_FIGURES["nf4_residents"])


def setup_of(run: dict[str, Any]) -> Setup:
    """The setup of a run: fp16 weights, adapters in fp32, checkpointing, AdamW."""
    lora = run["lora"]
    method = LoRA if run in _FIGURES["runs"] else QLoRA
    return Setup(
        model=run["model"],
        method=method(
            lora_rank=lora["rank"], lora_alpha=lora["alpha"], target_modules=tuple(lora["target_modules"])
        ),
        training=Training(
            micro_batch_size=run["micro_batch_size"],
            seq_len=run["seq_len"],
            precision="fp16",
            attention=run["attention"],
            activation_checkpointing=True,
        ),
        gpu="t4",
    )


def as_run(setup: Setup) -> tuple[MemoryReport, Arrivals]:
    """The simulation of a QLoRA run as the libraries of the runs stepped, and its weights' arrivals.

    Four threads that never wait for the one that quantizes, `Loading()`, is the order to look at first;
    cached memory was kept: what all 25 show, though one session names versions (transformers 5.17, peft 0.20)
    whose sources read otherwise.
    """
    from planner.simulate.run import simulate

    watched: list[Any] = []
    with _rotary_products():
        report = simulate(setup, separate_labels=False, watch=watched.append)
    (simulation,) = watched
    return report, Arrivals(simulation.trail, simulation.allocator.config)


@contextmanager
def _rotary_products() -> Iterator[None]:
    """Llama's rotary angles by a product of matrices, as transformers up to 5.17 made them.

    It is the first product of a step, so cuBLAS's workspace lies before all else in the cached memory.
    """
    import torch
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    def forward(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inverse = self.inv_freq[None, :, None].float().expand(position_ids.shape[0], -1, 1)
        angles = (inverse @ position_ids[:, None, :].float()).transpose(1, 2)
        both = torch.cat((angles, angles), dim=-1)
        cosines, sines = both.cos() * self.attention_scaling, both.sin() * self.attention_scaling
        return cosines.to(x.dtype), sines.to(x.dtype)

    with mock.patch.object(LlamaRotaryEmbedding, "forward", torch.no_grad()(forward)):
        yield


def title(run: dict[str, Any]) -> str:
    """Model, shape, attention and the end of the run's id."""
    name = run["model"].rpartition("/")[2]
    return f"{name} {run['micro_batch_size']} x {run['seq_len']} {run['attention']} {run['id'][-5:]}"
