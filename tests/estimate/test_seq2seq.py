"""Encoder-decoders: what is covered, what is not and what is refused, and what crosses between the stacks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from planner import catalog
from planner.advise import largest_micro_batch, verdict
from planner.errors import SetupError
from planner.estimate import estimate
from planner.estimate.stack import stack
from planner.spec import FullFineTuning, LoRA, Setup, Sharding, Training

from .seq2seq_cases import METHODS, seq2seq_model

T5 = "google-t5/t5-small"
COVERED = sorted(METHODS.keys() - {"bitfit", "lora+bias"})  # T5 has no biases
MODELS = [m for m in catalog.models() if catalog.catalogue_entry(m)["task"] == "seq2seq-lm"]


@pytest.mark.parametrize("method", COVERED)
def test_every_encoder_decoder_of_the_catalogue_is_known_with_every_method(method: str) -> None:
    assert len(MODELS) >= 5
    for model in MODELS:
        report = estimate(Setup(model=model, method=METHODS[method]))
        assert report.not_known == (), model
        assert report.parts.activations > 0


def test_the_largest_micro_batch_fits_and_one_more_does_not() -> None:
    setup = Setup(model="google-t5/t5-3b", method=LoRA(), gpu="24GiB")
    found = largest_micro_batch(setup)
    assert found
    assert setup.gpu
    for size, fits in ((found, True), (found + 1, False)):
        setup = replace(setup, training=replace(setup.training, micro_batch_size=size))
        assert (verdict(estimate(setup), setup.gpu).word == "fits") == fits


@pytest.mark.parametrize("target", ["shared", "relative_attention_bias"])
def test_lora_on_a_table_is_left_to_the_simulation(target: str) -> None:
    report = estimate(Setup(model=T5, method=LoRA(target_modules=(target,))))
    assert "activations" in report.not_known
    assert "simulate" in report.notes[0]


@pytest.mark.parametrize("attention", ["sdpa", "efficient"])
def test_padding_under_a_fused_kernel_is_left_to_the_simulation(attention: str) -> None:
    """The biases of positions meet a mask of each sample: [b, a, s, s] instead of [1, a, s, s]."""
    training = Training(micro_batch_size=2, batching="padded", attention=attention)
    assert "activations" in estimate(Setup(model=T5, training=training)).not_known


@pytest.mark.parametrize("sharding", ["fsdp", "hsdp", "fsdp-grad-op", "zero1", "zero3"])
def test_what_ranks_share_of_two_stacks_is_not_guessed(sharding: Any) -> None:
    training = Training(precision="bf16-mixed")
    setup = Setup(model=T5, training=training, sharding=Sharding(sharding=sharding, num_gpus=16))
    report = estimate(setup)
    assert report.not_known == ("activations", "logits_and_loss", "temporaries")
    assert report.notes
    assert report.parts.base_weights > 0


def test_ranks_that_hold_everything_are_one_gpu_with_buckets() -> None:
    alone = Setup(model=T5)
    ranks = replace(alone, sharding=Sharding(sharding="ddp", num_gpus=2))
    assert estimate(ranks).not_known == ()
    assert estimate(ranks).peak_allocated_bytes > estimate(alone).peak_allocated_bytes


@pytest.mark.parametrize(
    ("attention", "method", "training"),
    [
        ("flash", LoRA(), {}),
        ("cudnn", FullFineTuning(), {}),
        ("cudnn", LoRA(), {"activation_checkpointing": True}),
    ],
)
def test_kernels_without_a_place_for_position_biases_are_refused(
    attention: Any, method: Any, training: Any
) -> None:
    with pytest.raises(SetupError, match="position biases"):
        Setup(model=T5, method=method, training=Training(attention=attention, **training), gpu="h200")


def test_the_encoders_output_is_kept_once_for_all_layers_of_the_decoder() -> None:
    """[b s, h] in bf16: the plain loop holds it to the end; else the first decoder layer gives it up."""
    size_bytes = 4 * 512 * 512 * 2
    setups = [
        Setup(model=T5, training=Training(micro_batch_size=4, seq_len=512, loop=loop))
        for loop in ("plain", "trainer")
    ]
    plain, trainer = (stack(setup, accumulates=False) for setup in setups)
    assert (plain.pinned_bytes, trainer.pinned_bytes) == (size_bytes, 0)
    assert _kept_bytes(setups[0]) == _kept_bytes(setups[1])


def test_the_gradient_of_the_encoders_output_waits_while_the_decoders_embeddings_run() -> None:
    """Both tables' uses are alike but for that: [b s, h] in bf16."""
    setup = Setup(model=T5, training=Training(micro_batch_size=4, seq_len=512))
    stretches = stack(setup, accumulates=False).stretches
    encoder, decoder = stretches[0], stretches[5]  # between them three stretches of layers, and the norm
    assert [s.count for s in stretches[:6]] == [1, 1, 4, 1, 1, 1]
    assert encoder.backward
    assert decoder.backward
    waiting = decoder.backward.temporaries_bytes - encoder.backward.temporaries_bytes
    assert waiting == 4 * 512 * 512 * 2


def test_biases_are_made_once_and_kept_by_every_layer_as_masks() -> None:
    """8 heads, 6 layers in each stack: what grows with the square of the sequence and not with the batch."""
    masks = {}
    for seq_len in (256, 512):
        setups = [
            Setup(model=T5, training=Training(micro_batch_size=b, seq_len=seq_len, optimizer="sgd"))
            for b in (2, 4)
        ]
        two, four = (_kept_bytes(setup) for setup in setups)
        masks[seq_len] = 2 * two - four  # what no batch changes
    assert masks[512] == pytest.approx(4 * masks[256], rel=0.01)
    # a mask in each layer, the decoder's with bools; one for all to the encoder; buckets of both stacks
    s = 256
    assert masks[s] == pytest.approx(s * s * (8 * 2 * (6 + 6 + 1) + 6 + 2 * 8), rel=0.01)


def _kept_bytes(setup: Setup) -> int:
    """What the forward pass leaves, head and loss apart."""
    found = stack(setup, accumulates=False)
    return found.pinned_bytes + sum([s.kept_bytes * s.count for s in found.stretches])


def test_fp16_keeps_the_feed_forward_output_layer_in_fp32() -> None:
    """Its weight, its gradient and AdamW's states of it."""
    model = catalog.model(T5)
    wide = sum(t.parameters for t in model.tensors if t.wide)
    assert wide == 12 * 512 * 2048
    half, other = (
        estimate(Setup(model=model, training=Training(precision=precision, seq_len=64))).parts
        for precision in ("fp16", "bf16")
    )
    assert half.base_weights - other.base_weights == pytest.approx(2 * wide, rel=0.02)
    assert half.optimizer_states - other.optimizer_states == pytest.approx(4 * wide, rel=0.02)


def test_an_output_that_is_not_scaled_has_no_copy_of_itself() -> None:
    """T5 1.1 and Flan-T5: `tie_word_embeddings` false, configuration_t5.py."""
    shape = seq2seq_model("flan*").architecture
    assert shape is not None
    assert not shape.scaled_head_input
    known = catalog.model(T5).architecture
    assert known is not None
    assert known.scaled_head_input
