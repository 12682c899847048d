"""T5, simulated and run with real tensors on the CPU: the same parameters, bytes and masks.

What `meta` cannot answer is answered here with values: whether a mask is made, and what the search for
infinities in fp16 takes.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from planner.spec import Adapter, LoRA, Method, Setup
from planner.training.build import skeleton
from tests.simulate.live_bytes import BLOCK_BYTES, really, simulated
from tests.simulate.small import setup_of

T5: dict[str, Any] = {
    "model_type": "t5",
    "architectures": ["T5ForConditionalGeneration"],
    "d_model": 256,
    "d_kv": 64,
    "d_ff": 512,
    "num_heads": 4,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "vocab_size": 1000,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
LORA = LoRA(target_modules=("attention",))


def setup_with(method: Method | None = None, changes: Any = None, **training: Any) -> Setup:
    """Eager attention and SGD: operations that the CPU runs as CUDA does."""
    options: dict[str, Any] = {"seq_len": 64, "attention": "eager", "optimizer": "sgd", "precision": "bf16"}
    return setup_of(T5, method, changes, **(options | training))


@pytest.mark.parametrize(
    ("method", "changes", "training"),
    [
        (None, {}, {}),
        (None, {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, {}),
        (None, {}, {"precision": "fp16"}),
        (None, {}, {"precision": "fp32", "activation_checkpointing": True}),
        (LORA, {}, {"precision": "fp16"}),
        (LORA, {}, {"activation_checkpointing": True}),
        (LORA, {}, {"loop": "trainer"}),
        (Adapter(adapter_kind="houlsby", adapter_size=16), {}, {}),
    ],
    ids=str,
)
def test_simulated_bytes_are_those_of_a_real_run(
    method: Method | None, changes: dict[str, Any], training: dict[str, Any]
) -> None:
    setup = setup_with(method, {"dropout_rate": 0.0, **changes}, **training)
    found, phases = simulated(setup)
    expected, real = really(setup)
    assert found == expected
    assert [phase.name for phase in phases] == [phase.name for phase in real]
    for here, there in zip(phases[2:], real[2:], strict=True):  # loading and attaching give weights values
        assert abs(here.end_bytes - there.end_bytes) <= BLOCK_BYTES, here.name
        assert abs(here.peak_bytes - there.peak_bytes) <= BLOCK_BYTES, here.name


def _masks(device: str) -> list[tuple[Any, ...]]:
    """What every call of torch's fused attention is given: the mask and is_causal."""
    net = skeleton(setup_with().model, dtype=torch.float32).to_empty(device=device)
    given: list[tuple[Any, ...]] = []

    def attention(q: torch.Tensor, *_rest: Any, attn_mask: torch.Tensor, **options: Any) -> torch.Tensor:
        given.append((tuple(attn_mask.shape), attn_mask.dtype, attn_mask.stride(), options["is_causal"]))
        return q

    ids = torch.zeros(2, 24, dtype=torch.int64, device=device)
    with mock.patch.object(F, "scaled_dot_product_attention", attention):
        net(input_ids=ids, labels=ids)
    return given


def test_real_tensors_and_simulated_ones_get_the_same_masks() -> None:
    """The mask of every call of torch's fused attention, and whether it is told to be causal."""
    real = _masks("cpu")
    assert real == _masks("meta")
    assert {mask[0] for mask in real} == {(1, 4, 24, 24)}
    assert [mask[3] for mask in real] == [False] * (2 + 2 * 3)


def test_what_its_class_keeps_in_fp32_is_so_where_it_is_loaded_in_fp16() -> None:
    """As `from_pretrained` loads it: transformers, `_keep_in_fp32_modules`; bf16 changes nothing."""
    model = setup_with().model
    half, other = (skeleton(model, dtype=dtype) for dtype in (torch.float16, torch.bfloat16))
    wide = {name for name, p in half.named_parameters() if p.dtype == torch.float32}
    assert wide == {name for tensor in model.tensors if tensor.wide for name in tensor.names()}
    assert len(wide) == 2 + 3
    assert {p.dtype for p in other.parameters()} == {torch.bfloat16}
