"""Padded and packed samples, simulated and run with real tensors on the CPU: the same masks and bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import masking_utils

from planner.errors import SetupError
from planner.simulate.kernels import SCRATCH
from planner.simulate.run import simulate
from planner.simulate.simulation import Simulation
from planner.spec import LoRA, Setup
from tests.simulate.live_bytes import BLOCK_BYTES, really, simulated
from tests.simulate.small import GPT2, LLAMA, setup_of

MISTRAL = {**LLAMA, "model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 16}
GEMMA3 = {**LLAMA, "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "head_dim": 64,
          "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}  # fmt: skip
BERT = {"model_type": "bert", "architectures": ["BertForMaskedLM"], "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 128, "vocab_size": 200,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip
T5 = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "d_model": 64, "d_kv": 16,
      "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 200, "is_encoder_decoder": True,
      "dropout_rate": 0.0}  # fmt: skip
STILL = {**GPT2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # only CUDA fuses dropout
CAUSAL = {"llama": LLAMA, "gpt2": STILL, "mistral": MISTRAL, "gemma3": GEMMA3}
Shape = tuple[str, tuple[int, ...] | None, torch.dtype | None]


@contextmanager
def masks_made(into: list[Shape]) -> Iterator[None]:
    """Note what each implementation of attention gets as its mask."""

    def noted(name: str, made: Callable[..., Any]) -> Callable[..., Any]:
        def form(*args: Any, **kwargs: Any) -> Any:
            mask = made(*args, **kwargs)
            into.append((name, None, None) if mask is None else (name, tuple(mask.shape), mask.dtype))
            return mask

        return form

    mapping = masking_utils.AttentionMaskInterface._global_mapping
    with mock.patch.dict(mapping, {name: noted(name, made) for name, made in mapping.items()}):
        yield


def setup(config: dict[str, Any], kind: str, attention: str, **more: Any) -> Setup:
    values = {"micro_batch_size": 3, "seq_len": 24, "optimizer": "sgd", "precision": "bf16", **more}
    return setup_of(config, LoRA(lora_rank=4), batching=kind, attention=attention, **values)


ATTENTIONS = ("sdpa", "eager")
CASES = [
    *[(name, kind, a, {}) for name in CAUSAL for kind in ("full", "padded", "packed") for a in ATTENTIONS],
    ("llama", "packed", "sdpa", {"micro_batch_size": 1}),
    ("llama", "padded", "sdpa", {"micro_batch_size": 1}),
    *[(name, kind, a, {}) for name in ("bert", "t5") for kind in ("full", "padded") for a in ATTENTIONS],
]


@pytest.mark.parametrize("name, kind, attention, more", CASES)
def test_the_simulation_makes_the_masks_of_a_real_run(
    name: str, kind: str, attention: str, more: dict[str, Any]
) -> None:
    chosen = setup({**CAUSAL, "bert": BERT, "t5": T5}[name], kind, attention, **more)
    made: list[list[Shape]] = [[], []]
    with masks_made(made[0]):
        _, phases = simulated(chosen)
    with masks_made(made[1]):
        _, real = really(chosen)
    assert made[0] == made[1] != []
    whole = (3, 1, 24, 24) if kind == "padded" else (1, 1, 72, 72)
    if kind != "full" and not more:
        assert (attention, whole, torch.bool if attention == "sdpa" else torch.bfloat16) in made[0]
    if attention == "sdpa":
        return  # the kernels of the CPU are others
    for here, there in zip(phases[1:], real[1:], strict=True):
        # a run on the CPU does not copy its batch to a device: up to four tensors and two made on the way
        assert 0 <= here.peak_bytes - there.peak_bytes <= 6 * 8 * 72 + 6 * BLOCK_BYTES, here.name


def blocks(chosen: Setup) -> list[tuple[str, int]]:
    """Operation and bytes of every block that the simulated run takes."""
    seen: list[Simulation] = []

    def watch(simulation: Simulation) -> None:
        simulation.ledger.trail = []
        seen.append(simulation)

    simulate(chosen, steps=1, watch=watch)
    return [(str(event[4]), event[1]) for event in seen[0].trail or () if event[0] > 0]


@pytest.mark.parametrize("kind, kernel, row", [("full", "flash", 0), ("padded", "efficient", 3 * 128 * 128),
                                               ("packed", "efficient", (3 * 128) ** 2)])  # fmt: skip
def test_each_layer_converts_the_mask_of_the_batch(kind: str, kernel: str, row: int) -> None:
    """sdpa, where torch chooses: a mask rules flash out, and each of the two layers makes it bf16 once."""
    taken = blocks(setup(LLAMA, kind, "sdpa", seq_len=128))
    kernels = {op for op, _ in taken if "dot_product" in op and "backward" not in op}
    assert kernels == {f"aten._scaled_dot_product_{kernel}_attention.default"}
    assert [size for op, size in taken if op == "aten.where.self"] == ([2 * row] * 2 if row else [])


def test_a_gpu_without_the_kernel_is_refused_before_anything_is_traced() -> None:
    with pytest.raises(SetupError, match=r"needs capability 8\.0, t4 has 7\.5"):
        simulate(setup(LLAMA, "packed", "flash", precision="fp16"), gpu="Tesla T4")


def test_flash_attention_on_a_row_makes_no_mask() -> None:
    taken = blocks(setup(LLAMA, "packed", "flash", seq_len=128))
    kernels = [size for op, size in taken if op == "aten._flash_attention_forward.default"]
    assert kernels[:2] == [384 * 256 * 2, 4 * 384 * 4]  # the output, and the log-sum-exp of 4 heads
    assert not any("dot_product" in op or op == "aten.where.self" for op, _ in taken)


def test_flash_attention_takes_the_padding_out_and_puts_it_back() -> None:
    """modeling_flash_attention_utils.py: all tokens but one of padding, in each of two layers."""
    taken = blocks(setup(LLAMA, "padded", "flash", seq_len=128))
    tokens = 3 * 128 - 1
    places = [size for op, size in taken if op == "aten.nonzero.default"]
    assert places == [tokens * 8] * 2
    kernels = [size for op, size in taken if op == "aten._flash_attention_forward.default"]
    assert kernels[:2] == [tokens * 256 * 2, 4 * tokens * 4]  # the output, and the log-sum-exp of 4 heads
    gathered = [size for op, size in taken if op == "aten.index.Tensor"]
    wide, narrow = tokens * 256 * 2, tokens * 128 * 2
    forward, backward = [narrow, narrow, wide], [wide]  # keys, values, queries; the output's gradient
    assert gathered == forward * 2 + backward * 2
    padded = [size for op, size in taken if op == "aten.new_zeros.default"]
    assert sorted(padded) == sorted([384 * 256 * 2, *[384 * 128 * 2] * 2] * 2)  # of q, k and v
    assert not any("dot_product" in op or op == "aten.where.self" for op, _ in taken)


@pytest.mark.parametrize("attention", ["sdpa", "flash"])
def test_one_sample_in_a_row_is_a_plain_batch(attention: str) -> None:
    """Its positions follow one another, so that torch's flash attention is there, and no mask."""
    plain, packed = (simulate(setup(LLAMA, kind, attention, micro_batch_size=1, seq_len=256))
                     for kind in ("full", "packed"))  # fmt: skip
    positions, lengths = 256 * 8, 2 * BLOCK_BYTES if attention == "flash" else 0
    rows = 128 * 4 * (1 + 64) * 4 if attention == "flash" else 0  # 128 more, of 4 heads of 64: at most
    more = packed.peak_allocated_bytes - plain.peak_allocated_bytes
    assert positions + lengths <= more <= positions + lengths + rows


def test_flash_attention_on_a_row_takes_what_its_sources_say() -> None:
    """flash_api.cpp, mha_varlen_bwd, by hand: 3 samples, 8 heads of 40 over 2, 300 tokens."""
    heads, tokens, samples, head = 8, 300, 3, 40
    query = torch.empty(tokens, heads, head, dtype=torch.bfloat16, device="meta")
    key = torch.empty(tokens, 2, head, dtype=torch.bfloat16, device="meta")
    starts = torch.empty(samples + 1, dtype=torch.int32, device="meta")
    backward = SCRATCH[torch.ops.aten._flash_attention_backward.default]
    rows = tokens + 128 * samples
    expanded = tokens * heads * head * 2
    sums = [heads * rows * 4, rows * heads * 64 * 4]
    args = (query, query, key, key, query, None, starts, starts, 100, 100)
    assert backward(args, None) == [*sums, expanded, expanded]
    turned = torch.empty(heads, tokens, head, dtype=torch.bfloat16, device="meta").transpose(0, 1)
    copied = tokens * heads * head * 2
    assert backward((query, query, query, query, turned, None, starts), None) == [copied, *sums]
