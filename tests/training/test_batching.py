"""Padded and packed samples train as each does alone: losses and gradients of real tensors on the CPU."""

from __future__ import annotations

from typing import Any
from unittest import mock

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    PreTrainedTokenizerFast,
)

from planner import batching
from planner.batching import sample_lengths
from planner.errors import SetupError
from planner.spec import PeftConfig, Setup, Training
from planner.training.batches import samples
from planner.training.varlen_attention import VARLEN_ATTENTION
from tests.simulate.small import GPT2, LLAMA, setup_of
from tests.training.peft_families import FAMILIES, VOCAB_SIZE, tiny_model

B, S = 3, 12
WINDOW = {"sliding_window": 5}
SLIDING = {"mistral": WINDOW, "gemma3_text": WINDOW, "phi3": WINDOW, "starcoder2": WINDOW, "gemma2": WINDOW,
           "qwen2": {**WINDOW, "use_sliding_window": True, "max_window_layers": 1}}  # fmt: skip
EAGER_ONLY = ("gemma2", "bloom")
BY_POSITIONS = batching._APART_BY_POSITIONS


def net_of(family: str, attention: str, **changes: Any) -> nn.Module:
    """A tiny model in fp32 without dropout, in training mode; with a cache no mask keeps samples apart."""
    changes = {"attn_implementation": attention, "use_cache": False, **changes}
    if family in FAMILIES:
        return tiny_model(family, **changes).train()
    torch.manual_seed(0)
    tokens = {"vocab_size": VOCAB_SIZE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = CONFIG_MAPPING[family](**FAMILIES["llama"][0], **tokens, **changes)
    return AutoModelForCausalLM.from_config(config).train()


def answer(net: nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and the gradients as one vector."""
    net.zero_grad()
    loss = net(**batch).loss
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


def alone(net: nn.Module, ids: torch.Tensor, lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Each sample by itself, weighed by the labels that are asked for."""
    asked = [length - 1 for length in lengths]
    found = [answer(net, {"input_ids": row, "labels": row})
             for row in (ids[i : i + 1, :length] for i, length in enumerate(lengths))]  # fmt: skip
    weights = [count / sum(asked) for count in asked]
    losses, gradients = zip(*found, strict=True)
    return (
        sum(w * loss for w, loss in zip(weights, losses, strict=True)),
        sum(w * gradient for w, gradient in zip(weights, gradients, strict=True)),
    )


def ids_of() -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randint(3, VOCAB_SIZE, (B, S))


def assert_alike(net: nn.Module, training: Training) -> None:
    """The batch that the training makes answers as its samples do alone."""
    ids = ids_of()
    made = samples(training, ids.view(1, -1) if training.batching == "packed" else ids)
    for found, wanted in zip(answer(net, made), alone(net, ids, sample_lengths(training)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-4, atol=2e-6)


def training_of(kind: str, attention: str = "sdpa") -> Training:
    return Training(micro_batch_size=B, seq_len=S, batching=kind, attention=attention)


@pytest.mark.parametrize("family", BY_POSITIONS)
def test_packed_samples_train_as_they_do_alone(family: str) -> None:
    attention = "eager" if family in EAGER_ONLY else "sdpa"
    assert_alike(net_of(family, attention, **SLIDING.get(family, {})), training_of("packed"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_packed_samples_train_as_they_do_alone_by_eager_attention(family: str) -> None:
    assert_alike(net_of(family, "eager", **SLIDING.get(family, {})), training_of("packed"))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma2", "opt", "bloom", "falcon"])
def test_padded_samples_train_as_they_do_alone(family: str, attention: str) -> None:
    if family in EAGER_ONLY and attention == "sdpa":
        pytest.skip(f"transformers runs {family} with eager attention only")
    assert_alike(net_of(family, attention, **SLIDING.get(family, {})), training_of("padded"))


@pytest.mark.parametrize("family", ["opt", "falcon", "gpt_oss"])
def test_models_that_are_not_packed_mix_their_samples(family: str) -> None:
    """What `check_batching` refuses is wrong indeed; BLOOM takes no positions at all."""
    net = net_of(family, "eager" if family == "gpt_oss" else "sdpa")
    with pytest.raises(AssertionError, match="not close"):
        assert_alike(net, training_of("packed"))


def by_lengths(query: Any, key: Any, value: Any, starts: Any, _starts: Any, longest: int, _longest: int,
               dropout: float, causal: bool, _debug: bool, *, scale: float | None = None,
               window_size_left: int | None = None) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """What `_flash_attention_forward` computes, sample by sample: `[tokens, heads, d]`."""
    assert dropout == 0.0
    assert starts.dtype == torch.int32
    assert longest == max(starts.diff())
    rows = []
    for begin, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        q, k, v = (t[begin:end].transpose(0, 1)[None] for t in (query, key, value))
        back = torch.arange(end - begin)[:, None] - torch.arange(end - begin)
        seen = ~torch.tensor(causal) | (back >= 0)
        seen = seen & (back <= (S if window_size_left is None else window_size_left))
        out = F.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=True)
        rows.append(out[0].transpose(0, 1))
    return torch.cat(rows), query, query, query, query


@pytest.mark.parametrize("family", [f for f in (*BY_POSITIONS, "opt") if f not in (*EAGER_ONLY, "stablelm")])
def test_flash_attention_is_told_where_samples_begin(family: str) -> None:
    """Through every model's code to the kernel, whose place a reference takes: there is none for the CPU."""
    ids = ids_of()
    made = samples(training_of("packed", "flash"), ids.view(1, -1))
    with mock.patch.object(torch.ops.aten, "_flash_attention_forward", by_lengths):
        found = answer(net_of(family, VARLEN_ATTENTION, **SLIDING.get(family, {})), made)
    wanted = alone(net_of(family, "sdpa", **SLIDING.get(family, {})), ids, (S,) * B)
    for here, there in zip(found, wanted, strict=True):
        torch.testing.assert_close(here, there, rtol=2e-4, atol=2e-6)


UNPADDED = [f for f in (*BY_POSITIONS, "opt", *batching._ENCODERS) if f not in EAGER_ONLY]


@pytest.mark.parametrize("family", UNPADDED)
def test_flash_attention_takes_the_padding_out(family: str) -> None:
    """As samples alone, of other lengths too than the planner's; the padding is never seen by the kernel."""
    ids, lengths = ids_of(), (S, 7, 2)
    there = torch.arange(S) < torch.tensor(lengths)[:, None]
    made = {"input_ids": ids * there, "attention_mask": there.long(), "labels": ids.masked_fill(~there, -100)}
    seen: list[int] = []

    def counted(query: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(query))
        return by_lengths(query, *args, **kwargs)

    net = net_of(family, VARLEN_ATTENTION, **SLIDING.get(family, {}))
    with mock.patch.object(torch.ops.aten, "_flash_attention_forward", counted):
        found = answer(net, made)
    assert set(seen) == {sum(lengths)}
    other = net_of(family, "sdpa", **SLIDING.get(family, {}))
    wanted = answer(other, made) if family in batching._ENCODERS else alone(other, ids, lengths)
    for here, there_ in zip(found, wanted, strict=True):
        torch.testing.assert_close(here, there_, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("family", ["bert", "roberta", "t5"])
def test_padding_changes_nothing_in_encoders(family: str) -> None:
    """Every label that is asked for, and every token of a sample, is seen as without padding."""
    ids, training = ids_of(), training_of("padded")
    net = tiny_model(family)
    made, lengths = samples(training, ids), sample_lengths(training)
    with torch.no_grad():
        padded = net(**made).logits
        for i, length in enumerate(lengths):
            row = ids[i : i + 1, :length]
            torch.testing.assert_close(padded[i : i + 1, :length], net(input_ids=row, labels=row).logits)


def test_the_batches_are_those_of_the_collators() -> None:
    ids = ids_of()
    for attention in ("sdpa", "flash"):
        collator = DataCollatorWithFlattening(return_flash_attn_kwargs=attention == "flash")
        wanted = collator([{"input_ids": row} for row in ids.tolist()])
        assert_same(samples(training_of("packed", attention), ids.view(1, -1)), wanted)
    training = training_of("padded")
    features = [row[:n] for row, n in zip(ids.tolist(), sample_lengths(training), strict=True)]
    padding = DataCollatorForLanguageModeling(tokenizer(), mlm=False, pad_to_multiple_of=S)
    assert_same(samples(training, ids), padding([{"input_ids": row} for row in features]))


def assert_same(found: dict[str, Any], wanted: Any) -> None:
    assert {**found}.keys() == {**wanted}.keys()
    for name, value in wanted.items():
        if isinstance(value, torch.Tensor):
            assert found[name].dtype == value.dtype, name
            assert torch.equal(found[name], value), name
        else:
            assert found[name] == value, name


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    words = {f"w{i}": i for i in range(VOCAB_SIZE)}
    made = Tokenizer(models.WordLevel(words, unk_token="w1"))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="w0", unk_token="w1")


def test_lengths_differ_and_some_are_shorter() -> None:
    four = Training(micro_batch_size=4, seq_len=512, batching="padded")
    assert sample_lengths(four) == (448, 384, 320, 256)
    for b, s in ((1, 2), (3, 2), (16, 5), (1, 4096)):
        lengths = sample_lengths(Training(micro_batch_size=b, seq_len=s, batching="padded"))
        assert 1 <= min(lengths) < s
        assert max(lengths) <= s
    assert sample_lengths(Training(micro_batch_size=2, seq_len=7)) == (7, 7)
    most = Training(micro_batch_size=2, seq_len=7, batching="padded", attention="flash")
    assert sample_lengths(most) == (7, 6)


@pytest.mark.parametrize(
    "training, words",
    [
        ({"batching": "ragged"}, "batching must be one of full, padded, packed, got 'ragged'"),
    ],
)
def test_a_training_that_cannot_be_is_refused(training: dict[str, Any], words: str) -> None:
    with pytest.raises(SetupError, match=words):
        Training(**training)


@pytest.mark.parametrize(
    "model, more, words",
    [
        ("google-bert/bert-base-uncased", {}, "packed is for causal language models"),
        ("google-t5/t5-base", {}, "packed is for causal language models"),
        ("tiiuae/falcon-7b", {}, r"packed samples apart, and tiiuae/falcon-7b \(falcon\) is none"),
        ("bigscience/bloom-560m", {}, "known to keep packed samples apart"),
        ("openai/gpt-oss-20b", {"attention": "eager"}, "known to keep packed samples apart"),
        ("stabilityai/stablelm-2-1_6b", {"attention": "flash"}, "by their positions alone"),
        ("facebook/opt-350m", {}, "attention sdpa does not take; choose attention flash"),
    ],
)
def test_packing_that_would_mix_samples_is_refused(model: str, more: dict[str, Any], words: str) -> None:
    with pytest.raises(SetupError, match=words) as error:
        Setup.from_dict({"model": model, "batching": "packed", **more})
    assert "\n" not in str(error.value)


def test_prompts_before_a_row_are_refused_and_are_those_of_peft() -> None:
    kinds = {kind.value for kind, config in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()
             if issubclass(config, peft.PromptLearningConfig)}  # fmt: skip
    assert {*batching.PROMPT_METHODS} == kinds
    for kind in kinds:
        method = PeftConfig(peft_config_json=f'{{"peft_type": "{kind}", "num_virtual_tokens": 4}}')
        with pytest.raises(SetupError, match="drops its positions"):
            setup_of(LLAMA, method, batching="packed")
    method = PeftConfig(peft_config_json='{"peft_type": "LORA", "alora_invocation_tokens": [5]}')
    with pytest.raises(SetupError, match="from one place of a row"):
        setup_of(LLAMA, method, batching="packed")


def test_narrow_heads_are_refused_for_flash_attention_on_a_row() -> None:
    with pytest.raises(SetupError, match="multiple of 8, small-gpt2 has 20"):
        setup_of(GPT2, None, {"n_embd": 80}, batching="packed", attention="flash")
    setup_of(GPT2, None, {"n_embd": 80}, batching="packed")


def test_one_token_has_no_padding() -> None:
    training = Training(micro_batch_size=2, seq_len=1, batching="padded")
    assert not batching.has_masks(training)
    assert samples(training, torch.ones(2, 1, dtype=torch.int64))["attention_mask"].all()
