"""Where a family's code departs from LLaMA's in what it keeps or copies; its numbers are Architecture's.

Read off transformers 5.23, models/<family>/modeling_<family>.py. A family that is not listed has no
formulas for its activations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["TRAITS", "Traits"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Traits:
    """Defaults are LLaMA's."""

    # RMSNorm multiplies by its weight after the cast back (llama) or before it (gemma, olmo).
    rms_weight_in_fp32: bool = False
    layernorm_in_fp32: bool = False  # LayerNorm without weights on an fp32 copy
    rotary_cats: bool = False  # turned and unturned parts of a head are joined by `cat`
    rotary_halves: bool = False  # half a head is turned by tables as wide, both halves joined by `cat`
    rope_skips_every: int = 0  # every so-many-th layer has no rotary positions
    fused_qkv: Literal["split", "slices", "groups"] = "split"  # groups: keys and values copied out of it
    bias_added_apart: bool = False  # a linear layer's bias is added to its product, which stays in its type
    always_masked: bool = False  # a mask is made where torch could do without
    scaled_queries: bool = False  # q is multiplied by a number before the kernel
    scaled_scores: bool = True  # eager scores are multiplied by a number after the product
    gelu_by_hand: bool = False  # an autograd function of the model's own that keeps its input alone
    softmax_in_own_type: bool = False  # the eager softmax does not ask for fp32
    softmax_type_stays: bool = False  # nor is its output converted, which under autocast is fp32
    # The scores before the mask are a variable until the softmax is there, or as long as their function.
    scores_held: Literal["no", "softmax", "function"] = "no"
    weights_returned: bool = False  # a layer returns eager attention's, held until the next one has
    scaled_residual: bool = False  # what is added to the residual stream is multiplied first
    dropout_after_attention: bool = True
    embedding_scales: bool = True  # where embeddings are scaled, their own module does it, not the model
    normed_embeddings: bool = False
    scaled_logits: bool = False
    masked_head: bool = False  # a dense layer, gelu and a norm before the decoder
    loss_in_own_type: bool = False  # CrossEntropyLoss on the logits as they are, no fp32 copy
    clamped_gate: bool = False  # experts' gate and up are every other column, clamped, and up has 1 added
    shares_of_chosen: bool = False  # the router takes the softmax of the chosen experts' scores alone
    mask_by_place: bool = False  # a layer's mask is a positional argument, which its checkpoint keeps itself
    returns_cache: bool = True  # the output holds a cache that was given, though `use_cache` is off


# A softmax in the scores' own type, which are divided in place: models/falcon/modeling_falcon.py.
_FALCON = Traits(
    fused_qkv="groups",
    bias_added_apart=True,
    scores_held="softmax",
    weights_returned=True,
    always_masked=True,
    softmax_in_own_type=True,
    scaled_scores=False,
)
_BERT = Traits(
    softmax_in_own_type=True,
    softmax_type_stays=True,
    normed_embeddings=True,
    masked_head=True,
    loss_in_own_type=True,
    mask_by_place=True,
)
_GEMMA = Traits(rms_weight_in_fp32=True, returns_cache=False)

TRAITS: dict[str, Traits] = {
    "bert": _BERT,
    "bloom": Traits(
        fused_qkv="slices",
        normed_embeddings=True,
        scaled_scores=False,
        scores_held="function",
        weights_returned=True,
        gelu_by_hand=True,
    ),
    "distilbert": Traits(
        softmax_in_own_type=True,
        softmax_type_stays=True,
        normed_embeddings=True,
        masked_head=True,
        loss_in_own_type=True,
        mask_by_place=True,
        dropout_after_attention=False,
    ),
    "falcon": _FALCON,
    "gemma": _GEMMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gpt2": Traits(softmax_in_own_type=True, mask_by_place=True, returns_cache=False),
    "gpt_neox": Traits(rotary_cats=True),
    "gpt_oss": Traits(
        rms_weight_in_fp32=True,
        rotary_cats=True,
        rotary_halves=True,
        clamped_gate=True,
        shares_of_chosen=True,
    ),
    "granite": Traits(scaled_residual=True, scaled_logits=True, embedding_scales=False),
    "llama": Traits(),
    "mistral": Traits(returns_cache=False),
    "mixtral": Traits(),
    "olmo": Traits(layernorm_in_fp32=True),
    "olmo2": Traits(rms_weight_in_fp32=True),
    "opt": Traits(scaled_queries=True),
    "phi": Traits(rotary_cats=True),
    "phi3": Traits(rotary_cats=True, fused_qkv="slices", returns_cache=False),
    "qwen2": Traits(returns_cache=False),
    "qwen3": Traits(returns_cache=False),
    "qwen3_moe": Traits(),
    "roberta": _BERT,
    "smollm3": Traits(rope_skips_every=4, returns_cache=False),
    "stablelm": Traits(rotary_cats=True),
    "starcoder2": Traits(returns_cache=False),
    "t5": Traits(always_masked=True, loss_in_own_type=True),
}
