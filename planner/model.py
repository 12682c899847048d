"""A model as the planner knows it: its weight tensors, and the numbers the formulas need.

Nothing here reads a file or imports torch; `planner.catalog` makes models from config.json.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

__all__ = ["Architecture", "AttentionShape", "Kind", "Model", "Role", "Task", "WeightTensor"]

Task = Literal["causal-lm", "masked-lm", "seq2seq-lm"]
Role = Literal["embedding", "position", "attention", "mlp", "experts", "router", "norm", "head", "other"]
Kind = Literal["linear", "conv1d", "embedding", "norm", "parameter"]


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightTensor:
    """One parameter tensor, or `count` equal ones that differ in the layer's index only.

    `name` is transformers' parameter name; `*` stands for the layer's index, as in
    `model.layers.*.self_attn.q_proj.weight`. `layers` lists the indices (empty: no `*`).
    `kind` is the module that holds it: `linear` (torch.nn.Linear, weight `[out, in]`), `conv1d`
    (transformers' Conv1D, weight `[in, out]`), `embedding`, `norm`, or `parameter` for a bare
    `nn.Parameter` such as fused experts. A bias has the kind of its module.
    `tied_to` names the tensor whose storage it shares; a tied tensor adds no parameters. `wide`: transformers
    keeps it in fp32 where the model is loaded in fp16 (`_keep_in_fp32_modules`).
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    kind: Kind
    layers: tuple[int, ...] = ()
    tied_to: str | None = None
    wide: bool = False

    @property
    def count(self) -> int:
        """How many tensors this entry stands for."""
        return len(self.layers) or 1

    @property
    def numel(self) -> int:
        """Elements of one tensor."""
        return math.prod(self.shape)

    @property
    def parameters(self) -> int:
        """Elements of all `count` tensors; 0 where the storage belongs to another tensor."""
        return 0 if self.tied_to else self.numel * self.count

    @property
    def module(self) -> str:
        """Name of the module that holds it, `*` kept: `model.layers.*.self_attn.q_proj`."""
        return self.name.rpartition(".")[0]

    @property
    def leaf(self) -> str:
        """Last part of the parameter's name: `weight`, `bias`, ..."""
        return self.name.rpartition(".")[2]

    @property
    def in_features(self) -> int:
        """Input width of a linear or Conv1D weight, number of rows of an embedding."""
        return self.shape[0] if self.kind in ("conv1d", "embedding") else self.shape[-1]

    @property
    def out_features(self) -> int:
        """Output width of a linear or Conv1D weight, width of an embedding."""
        return self.shape[-1] if self.kind in ("conv1d", "embedding") else self.shape[0]

    def names(self) -> Iterator[str]:
        """The full parameter names, one for each layer."""
        if self.layers:
            yield from (self.name.replace("*", str(layer)) for layer in self.layers)
        else:
            yield self.name


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionShape:
    """What decides which of torch's fused kernels takes a model's attention.

    `fused`: whether transformers' class asks for one at all. `head_dims`: the different pairs of widths of
    a head, of queries and keys and of values, in elements. `window`: tokens from which on a sliding or
    chunked layer has a mask. `dropout`: of the weights of attention, as the config asks for it in training.
    """

    fused: bool
    head_dims: tuple[tuple[int, int], ...]
    window: int | None = None
    dropout: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The numbers of a transformer that decide its activations (closed-form families only).

    Sizes are elements. `hidden_size` h, `num_layers` l, `num_attention_heads` a,
    `num_key_value_heads` k, `head_dim` d, `intermediate_size` f, `vocab_size` v.
    """

    family: str  # the config's model_type: "llama", "gpt2", ...
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    norm: Literal["rmsnorm", "layernorm"]
    norm_placement: Literal["pre", "post", "sandwich"] = "pre"
    parallel_residual: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"  # RMSNorm of q and k, by head or full width
    attention_bias: bool = False
    fused_qkv: bool = False  # one linear layer for q, k and v
    positions: Literal["rope", "learned", "alibi", "relative", "none"] = "rope"
    rotary_dim: int | None = None  # None: the whole head
    mlp: Literal["gated", "plain", "experts"] = "gated"
    fused_gate_up: bool = False
    mlp_bias: bool = False
    activation: str = "silu"
    attention_dropout: float = 0.0  # dropout as the config asks for it in training
    hidden_dropout: float = 0.0  # after attention and MLP
    embedding_dropout: float = 0.0
    sliding_window: int | None = None
    sliding_layers: tuple[int, ...] = ()  # layers that use the window
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    tied_head: bool = True
    embedding_scale: bool = False  # embeddings multiplied by a number, Gemma and Granite
    num_experts: int = 0
    experts_per_token: int = 0
    expert_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    dense_layers: tuple[int, ...] = ()  # layers of a mixture of experts that have a plain MLP
    encoder_layers: int = 0  # encoder-decoder models: layers of the encoder (num_layers: decoder)
    cross_attention: str = ""  # ... and the module in which the decoder attends to the encoder's output
    scaled_head_input: bool = False  # what the head reads is multiplied by a number, T5
    sdpa: bool = True  # whether transformers' class takes attention from torch's fused kernels
    attention_output: str = "o_proj"  # suffix of the module whose output leaves attention
    mlp_output: str = "down_proj"  # ... and of the one whose output leaves the MLP
    layer_class: str = ""  # transformers' decoder layer class

    @property
    def attention(self) -> AttentionShape:
        """Its attention, as the kernels see it."""
        return AttentionShape(
            fused=self.sdpa,
            head_dims=((self.head_dim, self.head_dim),),
            window=self.sliding_window if self.sliding_layers else None,
            dropout=self.attention_dropout,
        )


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model that can be planned for.

    `config_json` is the config.json it was made from (canonical JSON; "" for a bare parameter
    count). `tensors` lists every parameter of transformers' own class for `task`. `architecture`
    is None outside the closed-form families: then activations need `simulate`, and `built_attention` is what
    its modules say of their attention.
    """

    id: str
    task: Task = "causal-lm"
    config_json: str = ""
    tensors: tuple[WeightTensor, ...] = ()
    architecture: Architecture | None = None
    max_positions: int | None = None
    source: str = ""
    bare_parameters: int | None = None  # params:7e9
    built_attention: AttentionShape | None = None

    @property
    def attention(self) -> AttentionShape | None:
        """What decides its attention kernel; None where only the number of parameters is known."""
        return self.architecture.attention if self.architecture else self.built_attention

    @property
    def config(self) -> dict[str, Any]:
        """The config.json as a fresh dictionary, empty for a bare parameter count."""
        loaded = json.loads(self.config_json) if self.config_json else {}
        return dict(loaded)

    @cached_property
    def parameters(self) -> int:
        """Number of parameters, tied weights counted once, as `sum(p.numel())` gives."""
        if self.bare_parameters is not None:
            return self.bare_parameters
        return sum(tensor.parameters for tensor in self.tensors)

    @property
    def is_bare(self) -> bool:
        """Whether only the number of parameters is known."""
        return self.bare_parameters is not None

    @cached_property
    def linear_weights(self) -> tuple[WeightTensor, ...]:
        """Weights of Linear and Conv1D modules, the head included."""
        return tuple(t for t in self.tensors if t.kind in ("linear", "conv1d") and t.leaf == "weight")
