"""Real training steps on the CPU: the loss falls, the frozen weights do not move by a bit; BitFit's set."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from planner.catalog.outputs import OUTPUTS
from planner.errors import SetupError
from planner.training.peft import (
    AdapterSettings,
    BitFitSettings,
    LoRALayer,
    LoRASettings,
    MethodSettings,
    attach,
    merge_and_unload,
    trainable_count,
    trainable_parameters,
)
from tests.training.peft_families import FAMILIES, WITHOUT_BIAS, batch, logits, tiny_model

STEPS = 30


def settings(model_type: str, method: str) -> MethodSettings:
    """The five methods, small."""
    if method == "bitfit":
        return BitFitSettings()
    if method.startswith("lora"):
        preset, bias = {"lora": ("attention", "none"), "lora-all": ("all-linear", "all")}[method]
        return LoRASettings(
            lora_rank=4, lora_alpha=8, lora_dropout=0.05, target_modules=(preset,), lora_bias=bias
        )
    attention, mlp = OUTPUTS[model_type]
    return AdapterSettings(adapter_kind=method, adapter_size=8, attention_outputs=attention, mlp_outputs=mlp)


@pytest.mark.parametrize(
    ("model_type", "method"),
    [
        (model_type, method)
        for model_type in ("qwen2", "gpt2", "mixtral", "bert")
        for method in ("lora", "lora-all", "houlsby", "pfeiffer", "bitfit")
        if not (model_type in WITHOUT_BIAS and method == "bitfit")
    ],
)
def test_the_loss_falls_and_frozen_weights_do_not_move(model_type: str, method: str) -> None:
    # transformers' 0.02 gives logits so small that a frozen head can hardly say anything
    model = tiny_model(model_type, initializer_range=0.3)
    attach(model, settings(model_type, method)).train()
    trained = trainable_parameters(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    frozen = set(before) - set(trained)
    # weight_decay would move a frozen weight that was handed over by mistake
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2, weight_decay=0.1)
    losses = []
    torch.manual_seed(0)
    for _ in range(STEPS):
        loss = model(**batch(model)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.85 * losses[0], losses
    after = model.state_dict()
    # A tied twin of a trained bias (BERT's decoder.bias) has its own name in the state.
    shared = {tensor.data_ptr() for tensor in trained.values()}
    for name in frozen:
        assert torch.equal(after[name], before[name]) or after[name].data_ptr() in shared, name
    moved = [name for name in trained if not torch.equal(after[name], before[name])]
    # A constant added to every score of a row changes nothing: key biases get no gradient.
    still = {name for name in set(trained) - set(moved) if "key.bias" not in name and "k_proj" not in name}
    assert not still


@pytest.mark.parametrize("model_type", FAMILIES)
def test_bitfit_trains_the_biases_and_nothing_else(model_type: str) -> None:
    model = tiny_model(model_type)
    biases = {name: p.numel() for name, p in model.named_parameters() if name.split(".")[-1] == "bias"}
    if not biases:
        with pytest.raises(SetupError, match=r"BitFit trains bias terms, and \w+ has none; choose lora"):
            attach(model, BitFitSettings())
        assert all(parameter.requires_grad for parameter in model.parameters())
        return
    attach(model, BitFitSettings())
    assert set(trainable_parameters(model)) == set(biases)
    assert trainable_count(model) == sum(biases.values())


def test_which_families_have_no_bias() -> None:
    for model_type in WITHOUT_BIAS:
        with pytest.raises(SetupError, match="has none"):
            attach(tiny_model(model_type), BitFitSettings())


def test_bert_base_biases_are_bitfits() -> None:
    """Ben Zaken et al. 2021, section 4: BERT-base's bias terms are about 0.09 % of its parameters."""
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        model = BertModel(BertConfig(), add_pooling_layer=False)
    total = sum(parameter.numel() for parameter in model.parameters())
    # 12 layers of q, k, v, o (4 x 768), MLP (3072 + 768), two norms (2 x 768); the embeddings' norm
    assert trainable_count(attach(model, BitFitSettings())) == 12 * (4 * 768 + 3072 + 768 + 2 * 768) + 768
    assert 100 * trainable_count(model) / total == pytest.approx(0.09, abs=0.005)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text", "t5"])
def test_a_merged_model_is_plain_again(model_type: str, tmp_path) -> None:
    names = [name for name, _ in tiny_model(model_type).named_parameters()]
    model = attach(tiny_model(model_type), settings(model_type, "lora-all"))
    for name, parameter in trainable_parameters(model).items():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    adapted = logits(model)
    assert merge_and_unload(model) is model
    assert not any(isinstance(module, LoRALayer) for module in model.modules())
    assert [name for name, _ in model.named_parameters()] == names
    assert not trainable_parameters(model)
    merged = logits(model)
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(merge_and_unload(model)), merged)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path)), merged)


def test_merging_a_tied_embedding_unties_it_on_disk_too(tmp_path) -> None:
    model = attach(
        tiny_model("gemma"), LoRASettings(lora_rank=4, lora_alpha=4, target_modules=("embed_tokens",))
    )
    nn.init.normal_(next(p for n, p in model.named_parameters() if "lora_B" in n))
    adapted = logits(model)
    merge_and_unload(model)
    assert model.config.tie_word_embeddings is False
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(type(model).from_pretrained(tmp_path)), logits(model))
