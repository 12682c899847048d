"""The chunked loss beside transformers' own: the same value and gradients; labels not asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from planner.errors import SetupError
from planner.losses import LOSS_CHUNK_TOKENS
from planner.spec import LoRA, Setup, Training
from planner.training.losses import chunked_loss
from planner.training.run import TrainingRun
from tests.simulate.small import GPT2, LLAMA, model_of, setup_of

STILL = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # no dropout
ITEMS = [None, torch.tensor(1500.0)]


def _full(hidden: torch.Tensor, head: nn.Module, labels: torch.Tensor, items: Any) -> torch.Tensor:
    from transformers.loss.loss_utils import ForCausalLMLoss

    return ForCausalLMLoss(head(hidden), labels, head.out_features, num_items_in_batch=items)


@pytest.mark.parametrize("items", ITEMS, ids=["mean", "sum over items"])
@pytest.mark.parametrize("bias", [False, True])
def test_value_and_gradients_are_those_of_the_full_loss(items: Any, bias: bool) -> None:
    torch.manual_seed(0)
    head = nn.Linear(16, 50, bias=bias)
    length = LOSS_CHUNK_TOKENS + 37  # three chunks, the last one short
    labels = torch.randint(0, 50, (2, length)).masked_fill(torch.rand(2, length) < 0.3, -100)
    found = []
    for loss in (_full, chunked_loss):
        torch.manual_seed(1)
        hidden = torch.randn(2, length, 16, requires_grad=True)
        head.zero_grad()
        value = loss(hidden, head, labels, items)
        value.backward()
        found.append([value.detach(), hidden.grad, *[p.grad.clone() for p in head.parameters()]])
    for full, chunked in zip(*found, strict=True):
        torch.testing.assert_close(chunked, full, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loop", ["plain", "trainer"])
@pytest.mark.parametrize("method", [None, LoRA(lora_rank=4, target_modules=("attention",))], ids=str)
@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_a_step_with_it_trains_as_one_without(config: Any, method: Any, loop: str) -> None:
    """Weights after one step of plain SGD on the CPU: equal but for the order of sums."""
    after = []
    for loss in ("full", "chunked"):
        setup = setup_of(
            config, method, STILL if config is GPT2 else None,
            precision="fp32", optimizer="sgd", loss=loss, loop=loop, seq_len=64,
        )  # fmt: skip
        torch.manual_seed(0)
        run = TrainingRun(setup, torch.device("cpu"), _no_phases)
        run.prepare()
        torch.manual_seed(1)
        before = [p.detach().clone() for p in run.trained]
        run.step(1)
        after.append([p.detach() - old for p, old in zip(run.trained, before, strict=True)])
    assert any(change.abs().max() > 0 for change in after[0])
    for full, chunked in zip(*after, strict=True):
        torch.testing.assert_close(chunked, full, rtol=1e-3, atol=1e-7)


def _no_phases(_name: str, _step: int | None) -> Any:
    import contextlib

    return contextlib.nullcontext()


CHUNK_BYTES = LOSS_CHUNK_TOKENS * 50 * 4  # of 50 logits in fp32


@pytest.mark.parametrize("loss", ["full", "chunked", "masked-lm"])
def test_labels_that_are_not_asked_for_change_no_byte(loss: str) -> None:
    """-100 in labels: each loss makes and keeps as much, tensor by tensor, forward and backward."""
    torch.manual_seed(0)
    head = nn.Linear(16, 50)
    made: list[list[int]] = []
    for share in (0.0, 0.5, 0.99):
        labels = torch.randint(0, 50, (1, 2000)).masked_fill(torch.rand(1, 2000) < share, -100)
        labels[0, 1] = 3
        hidden = torch.randn(1, 2000, 16, requires_grad=True)
        with _Made() as sizes:
            if loss == "masked-lm":  # models/bert/modeling_bert.py, BertForMaskedLM.forward
                value = nn.CrossEntropyLoss()(head(hidden).view(-1, 50), labels.view(-1))
            else:
                value = (_full if loss == "full" else chunked_loss)(hidden, head, labels, None)
            value.backward()
        made.append(sizes.bytes)
    assert made[0] == made[1] == made[2]
    assert max(made[0]) == (CHUNK_BYTES if loss == "chunked" else 2000 * 50 * 4)


class _Made(TorchDispatchMode):
    """The bytes of every tensor that an operation gives, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        outs = out if isinstance(out, tuple) else (out,)
        self.bytes += [tensor.nbytes for tensor in outs if isinstance(tensor, torch.Tensor)]
        return out


def test_a_model_with_something_behind_its_head_is_refused() -> None:
    model = model_of({"model_type": "gemma2", "hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 100,
                      "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
                      "intermediate_size": 64, "architectures": ["Gemma2ForCausalLM"]})  # fmt: skip
    with pytest.raises(SetupError, match="loss chunked is there for causal language models"):
        Setup(model=model, training=Training(loss="chunked"))


def test_a_compiled_step_is_refused_with_its_reason() -> None:
    flat = {"model": "Qwen/Qwen2.5-0.5B", "torch_compile": True}
    with pytest.raises(SetupError, match="torch_compile is not covered: "):
        Setup.from_dict(flat)
