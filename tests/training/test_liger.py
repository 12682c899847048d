"""Liger's fused loss in torch's words beside transformers' own loss; where it is refused."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from typing import Any

import pytest
import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from planner.errors import SetupError
from planner.losses import liger_chunk_tokens
from planner.spec import LoRA, PeftConfig, QLoRA, Setup, Sharding, Training
from planner.training import liger
from planner.training.run import TrainingRun
from tests.simulate.small import GPT2, LLAMA, model_of, setup_of

ITEMS = [None, torch.tensor(150.0)]
GEMMA2 = {"model_type": "gemma2", "hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 100,
          "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 64,
          "final_logit_softcapping": 3.0, "architectures": ["Gemma2ForCausalLM"]}  # fmt: skip


def _full(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, items: Any, cap: Any) -> Any:
    from transformers.loss.loss_utils import ForCausalLMLoss

    logits = hidden @ weight.t()
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    return ForCausalLMLoss(logits, labels, weight.shape[0], num_items_in_batch=items)


def _in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """The products as a card makes them, in torch's own words."""
    monkeypatch.setattr(liger, "has_buffer", lambda _rows, _weight: True)
    monkeypatch.setattr(
        liger, "add_product", lambda all, logits, rows: torch.addmm(all, logits.t(), rows, out=all)
    )


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("items", ITEMS, ids=["mean", "sum over items"])
def test_value_and_gradients_are_those_of_the_full_loss(
    items: Any, cap: float | None, in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if in_place:
        _in_place(monkeypatch)
    torch.manual_seed(0)
    labels = torch.randint(0, 50, (3, 67)).masked_fill(torch.rand(3, 67) < 0.3, -100)
    assert 1 < liger_chunk_tokens(3 * 67, 50, 16) < 3 * 67 / 2  # several chunks, the last one short
    found = []
    for loss in (_full, liger.fused_loss):
        torch.manual_seed(1)
        hidden = torch.randn(3, 67, 16, requires_grad=True)
        weight = nn.Parameter(torch.randn(50, 16))
        value = loss(hidden, weight, labels, items, cap)
        (2 * value).backward()
        found.append([value.detach(), hidden.grad, weight.grad])
    for full, fused in zip(*found, strict=True):
        torch.testing.assert_close(fused, full, rtol=1e-4, atol=1e-6)


def test_a_frozen_head_has_no_gradient() -> None:
    hidden, weight = torch.randn(1, 9, 16, requires_grad=True), torch.randn(50, 16)
    liger.fused_loss(hidden, weight, torch.randint(0, 50, (1, 9)), None).backward()
    assert weight.grad is None
    assert hidden.grad is not None


@pytest.mark.parametrize(
    ("tokens", "vocabulary", "hidden", "some"),
    # the first is the example in ops/fused_linear_cross_entropy.py of liger_kernel 0.8.5
    [(4096 * 4, 32000, 4096, 2048), (4096, 128256, 2048, 128), (3, 100, 10, 1), (100, 50, 64, 100)],
)
def test_so_many_tokens_have_logits_at_a_time(tokens: int, vocabulary: int, hidden: int, some: int) -> None:
    assert liger_chunk_tokens(tokens, vocabulary, hidden) == some


@pytest.mark.parametrize("loop", ["plain", "trainer"])
@pytest.mark.parametrize("method", [None, LoRA(lora_rank=4, target_modules=("attention",))], ids=str)
@pytest.mark.parametrize("config", [LLAMA, GEMMA2], ids=["llama", "gemma2"])
def test_a_step_with_it_trains_as_one_without(config: Any, method: Any, loop: str) -> None:
    """Weights after one step of plain SGD on the CPU: equal but for the order of sums."""
    after = []
    for loss in ("full", "liger"):
        setup = setup_of(
            config, method, precision="fp32", optimizer="sgd", loss=loss, loop=loop, seq_len=64,
            micro_batch_size=2, gradient_accumulation_steps=2,
        )  # fmt: skip
        torch.manual_seed(0)
        run = TrainingRun(setup, torch.device("cpu"), _no_phases)
        run.prepare()
        torch.manual_seed(1)
        before = [p.detach().clone() for p in run.trained]
        run.step(1)
        after.append([p.detach() - old for p, old in zip(run.trained, before, strict=True)])
    assert any(change.abs().max() > 0 for change in after[0])
    for full, fused in zip(*after, strict=True):
        torch.testing.assert_close(fused, full, rtol=1e-3, atol=1e-7)


def _no_phases(_name: str, _step: int | None) -> Any:
    return contextlib.nullcontext()


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is not None, reason="liger_kernel is installed")
def test_a_card_without_the_library_is_refused_before_anything_is_built() -> None:
    setup = setup_of(LLAMA, loss="liger")
    with pytest.raises(SetupError, match=r"pip install -r requirements-liger\.txt") as refusal:
        TrainingRun(setup, torch.device("cuda"), _no_phases)
    assert refusal.value.exit_code == 2
    TrainingRun(setup, torch.device("cpu"), _no_phases)  # which needs no kernels


@pytest.mark.parametrize(
    ("config", "advice"),
    [(GPT2, "choose loss full or chunked."), ({**LLAMA, "model_type": "granite"}, "choose loss full.")],
    ids=["gpt2", "granite"],
)
def test_models_that_the_library_has_it_not_for_are_refused(config: Any, advice: str) -> None:
    with pytest.raises(SetupError, match=r"loss liger is there for the models that liger_kernel") as refusal:
        Setup(model=model_of(config), training=Training(loss="liger"))
    assert str(refusal.value).endswith(advice)


def test_a_soft_cap_is_not_refused() -> None:
    Setup(model=model_of(GEMMA2), training=Training(loss="liger"))


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_several_gpus_are_refused(sharding: Any) -> None:
    with pytest.raises(SetupError, match="loss liger is covered on one GPU only"):
        Setup(
            model=model_of(LLAMA),
            training=Training(loss="liger"),
            sharding=Sharding(num_gpus=2, sharding=sharding),
        )


@pytest.mark.parametrize("kind", [LoRA, QLoRA])
def test_lora_on_the_output_layer_would_not_be_trained_and_is_refused(kind: Any) -> None:
    method = kind(target_modules=("q_proj", "lm_head"))
    with pytest.raises(SetupError, match="would never be trained; leave that layer out"):
        Setup(model="meta-llama/Llama-3.2-1B", method=method, training=Training(loss="liger"))
    Setup(model="meta-llama/Llama-3.2-1B", method=method, training=Training(loss="chunked"))


TIED = {**LLAMA, "tie_word_embeddings": True}
ON_THE_HEAD: list[tuple[Any, dict[str, Any]]] = [
    (LLAMA, {"target_modules": ["q_proj", "lm_head"]}),
    (LLAMA, {"target_modules": ".*(q_proj|lm_head)"}),
    (LLAMA, {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [1]}),  # a whole name
    (LLAMA, {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [1, 2]}}),
    (TIED, {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}),
    (TIED, {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    (TIED, {"peft_type": "TRAINABLE_TOKENS", "token_indices": [1, 2]}),
]
BESIDE_THE_HEAD: list[tuple[Any, dict[str, Any]]] = [
    (TIED, {"target_modules": ["q_proj", "embed_tokens"]}),
    (LLAMA, {"target_modules": "all-linear"}),
    (LLAMA, {"target_modules": ".*_proj", "trainable_token_indices": [1, 2]}),
    (LLAMA, {"target_modules": ["q_proj", "lm_head"], "exclude_modules": ["lm_head"]}),
    (LLAMA, {"target_modules": ".*(q_proj|lm_head)", "modules_to_save": ["lm_head"]}),
    (LLAMA, {"peft_type": "TRAINABLE_TOKENS", "token_indices": [1, 2]}),
]


def _file(values: dict[str, Any]) -> PeftConfig:
    return PeftConfig(peft_config_json=json.dumps({"peft_type": "LORA", **values}))


@pytest.mark.parametrize(("config", "values"), ON_THE_HEAD)
def test_so_is_an_adapter_config_that_puts_something_there(config: Any, values: dict[str, Any]) -> None:
    """In the setup, before anything is built; peft itself does put it there."""
    with pytest.raises(SetupError, match="would never be trained"):
        setup_of(config, _file(values), loss="liger")
    run = TrainingRun(setup_of(config, _file(values)), torch.device("meta"), _no_phases)
    run.prepare()
    with pytest.raises(SetupError, match="would never be trained"):
        liger.refuse_adapted_head(run.net, "small-llama")


@pytest.mark.parametrize(("config", "values"), BESIDE_THE_HEAD)
def test_one_that_leaves_it_alone_is_not_refused(config: Any, values: dict[str, Any]) -> None:
    run = TrainingRun(setup_of(config, _file(values), loss="liger"), torch.device("meta"), _no_phases)
    run.prepare()  # which looks at what peft has done
    assert type(run.net.get_output_embeddings()) in (nn.Linear, ModulesToSaveWrapper)  # type: ignore[operator]


def test_a_trained_copy_of_the_output_layer_is_trained() -> None:
    """modules_to_save: the library reads the copy's weight."""
    method = PeftConfig(
        peft_config_json='{"peft_type": "LORA", "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}'
    )
    setup = setup_of(LLAMA, method, loss="liger", precision="fp32", optimizer="sgd")
    run = TrainingRun(setup, torch.device("cpu"), _no_phases)
    run.prepare()
    weight = run.net.get_output_embeddings().weight  # type: ignore[operator]
    before = weight.detach().clone()
    run.step(1)
    assert (weight.detach() != before).any()


def test_every_switch_of_the_library_is_named() -> None:
    """liger_kernel_config as HF Trainer takes it, for the fused loss alone: every other kernel off."""
    pytest.importorskip("liger_kernel", reason="liger_kernel is not installed: requirements-liger.txt")
    import inspect

    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    from planner.liger import liger_switches
    from planner.losses import _LIGER_TYPES

    alone = liger_switches("torch", "liger")
    assert [name for name, on in alone.items() if on] == ["fused_linear_cross_entropy"]

    for name in _LIGER_TYPES:
        switches = set(inspect.signature(MODEL_TYPE_TO_APPLY_LIGER_FN[name]).parameters) - {"model", "kwargs"}
        assert switches <= set(alone), name
        assert "fused_linear_cross_entropy" in switches
