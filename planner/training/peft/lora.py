"""LoRA as a module: y = W x + (alpha / r) B A x around a Linear, Conv1D or Embedding.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1. The forward pass
does peft 0.21's operations in peft's order (`tuners/lora/layer.py`), so that it takes peft's memory.
Left out: convolutions, a mixture's fused experts and router (bare parameters, which peft 0.21 adapts under
`all-linear` in Mixtral and Qwen MoE), quantized weights in `merge`, more than one adapter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from planner.errors import SetupError, nearest
from planner.targets import PRESETS, module_matches
from planner.training.peft.methods import LoRASettings

__all__ = ["LoRALayer", "attach_lora", "in_attention", "lora_targets"]

_WRAPPED = (nn.Linear, Conv1D, nn.Embedding)


class LoRALayer(nn.Module):
    """A frozen `base_layer` and its two trained matrices, `lora_A` [r, in] and `lora_B` [out, r].

    A is Gaussian and B zero, so that the layer starts as its base. Section 4.1 gives no standard
    deviation; 1 / r is what peft's `init_lora_weights="gaussian"` takes. New tensors lie on the base
    weight's device, in `adapter_dtype` (None: fp32 over a 16-bit base). Unknown attributes are the
    base layer's. Raises SetupError for a rank above the smaller side.
    """

    base_layer: Any  # Linear, Conv1D or Embedding
    lora_A: nn.Linear
    lora_B: nn.Linear

    def __init__(
        self,
        base_layer: nn.Module,
        *,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        """Wrap `base_layer`; its weight is left as it is, `requires_grad` included."""
        super().__init__()
        inner, outer = _sides(base_layer)
        if rank > min(inner, outer):
            limit = min(inner, outer)
            raise SetupError(
                f"lora_rank {rank} is above a matrix of {inner} x {outer}; give at most {limit}."
            )
        self.base_layer = base_layer
        weight = self.base_layer.weight
        dtype = adapter_dtype or torch.promote_types(weight.dtype, torch.float32)
        self.rank = rank
        self.scaling = alpha / rank
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.lora_A = nn.Linear(inner, rank, bias=False, device=weight.device, dtype=dtype)
        self.lora_B = nn.Linear(rank, outer, bias=False, device=weight.device, dtype=dtype)
        nn.init.normal_(self.lora_A.weight, std=1 / rank)
        nn.init.zeros_(self.lora_B.weight)
        self.enabled = True
        self.merged = False
        self._original: list[nn.Parameter] = []  # in a list, so that it is no parameter of the module

    def __getattr__(self, name: str) -> Any:
        """Attributes that are not here are the base layer's: `weight`, `bias`, `out_features`, ..."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base layer's output and the update, in the base layer's dtype."""
        result: torch.Tensor = self.base_layer(x, *args, **kwargs)
        if self.merged or not self.enabled:
            return result
        # Rebound names, as in peft: the base output is freed before the sum is cast back.
        dtype = result.dtype
        if isinstance(self.base_layer, nn.Embedding):
            result = result + self._embedded(x)
        else:
            x = x.to(self.lora_A.weight.dtype)
            result = result + self.lora_B(self.lora_A(self.dropout(x))) * self.scaling
        return result.to(dtype)

    def _embedded(self, tokens: torch.Tensor) -> torch.Tensor:
        """(alpha / r) B A for one-hot inputs; no dropout, as in peft. Gemma 3 scales its embeddings."""
        base = self.base_layer
        rows = functional.embedding(tokens, self.lora_A.weight.T, padding_idx=base.padding_idx)
        update: torch.Tensor = self.lora_B(rows) * self.scaling
        scale = getattr(base, "embed_scale", None)
        if scale is None:
            return update
        return update * (scale.to(update.dtype) if isinstance(scale, torch.Tensor) else scale)

    @torch.no_grad()
    def delta(self) -> torch.Tensor:
        """(alpha / r) B A in at least fp32, in the shape of the base layer's weight."""
        dtype = torch.promote_types(self.lora_A.weight.dtype, torch.float32)
        product = (self.lora_B.weight.to(dtype) @ self.lora_A.weight.to(dtype)) * self.scaling
        return product if isinstance(self.base_layer, nn.Linear) else product.T

    @torch.no_grad()
    def merge(self, *, keep_original: bool = True) -> None:
        """Put W + (alpha / r) B A, rounded once to W's dtype, in the base layer; twice is once.

        The merged weight is a new parameter and the original one is put aside, not copied: a rounded
        sum cannot be undone by subtracting. It costs one more weight until `unmerge`, and a weight tied
        to another module stays as it is there. `keep_original=False` gives that memory back for good.
        """
        if not self.merged:
            weight = self.base_layer.weight
            if not weight.is_floating_point():
                raise SetupError(
                    f"cannot merge into a weight of {weight.dtype}; load the base in bf16 or fp32."
                )
            self._original = [weight]
            self.base_layer.weight = nn.Parameter(
                (weight + self.delta()).to(weight.dtype), requires_grad=False
            )
            self.merged = True
        if not keep_original:
            self._original = []

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the original weight back, the same tensor bit for bit; twice is once."""
        if not self.merged:
            return
        if not self._original:
            raise SetupError("merge(keep_original=False) gave the original weight up; load the model again.")
        (original,) = self._original
        original.data = original.data.to(self.base_layer.weight)  # follow a .to(...) made while merged
        self.base_layer.weight = original
        self._original = []
        self.merged = False

    def extra_repr(self) -> str:
        """Rank and scaling, for `print(model)`."""
        return f"rank={self.rank}, scaling={self.scaling:g}, merged={self.merged}"


def in_attention(name: str) -> bool:
    """Whether a module lies inside attention: a part of its path before the last says attn or attention."""
    return any("attn" in part or "attention" in part for part in name.casefold().split(".")[:-1])


def lora_targets(model: nn.Module, target_modules: tuple[str, ...]) -> dict[str, nn.Module]:
    """The modules that LoRA wraps, by name: Linear, Conv1D and Embedding.

    `("all-linear",)` is every Linear and Conv1D but the output head, as in peft;
    `("attention",)` those of them inside attention. Raises SetupError for a name that matches nothing
    (with the nearest ones) or a module of another kind.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    if len(target_modules) == 1 and target_modules[0] in PRESETS:
        found: dict[str, nn.Module] = {
            name: module
            for name, module in modules.items()
            if isinstance(module, (nn.Linear, Conv1D))
            and module is not _head(model)
            and (target_modules[0] == "all-linear" or in_attention(name))
        }
        if not found:
            raise SetupError(
                f"{target_modules[0]} finds no linear layer in {type(model).__name__}; name the modules."
            )
        return found
    for target in target_modules:
        if not any(module_matches(name, target) for name in modules):
            known = {name.rpartition(".")[2] for name, part in modules.items() if isinstance(part, _WRAPPED)}
            raise SetupError(
                f"target_modules: no module of {type(model).__name__} is named {target!r}; "
                + nearest(target, known | set(PRESETS))
            )
    return {
        name: module
        for name, module in modules.items()
        if any(module_matches(name, target) for target in target_modules)
    }


def attach_lora(model: nn.Module, settings: LoRASettings) -> None:
    """Wrap the targets in place, and set the biases that `lora_bias` trains; all else is left as it is."""
    targets = lora_targets(model, settings.target_modules)
    for name, module in targets.items():
        if not isinstance(module, _WRAPPED):
            raise SetupError(
                f"target module {name} is a {type(module).__name__}; LoRA takes Linear, Conv1D and Embedding."
            )
    narrowest = min(targets, key=lambda name: min(_sides(targets[name])))
    inner, outer = _sides(targets[narrowest])
    if settings.lora_rank > min(inner, outer):
        raise SetupError(
            f"lora_rank {settings.lora_rank} is above {narrowest} ({inner} x {outer}); "
            f"give at most {min(inner, outer)}, or other target_modules."
        )
    for name, module in targets.items():
        layer = LoRALayer(
            module,
            rank=settings.lora_rank,
            alpha=settings.lora_alpha,
            dropout=settings.lora_dropout,
            adapter_dtype=settings.adapter_dtype,
        )
        layer.train(module.training)
        model.set_submodule(name, layer)
        if settings.lora_bias == "lora_only" and isinstance(getattr(module, "bias", None), nn.Parameter):
            module.bias.requires_grad_(True)
    if settings.lora_bias == "all":
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] == "bias":
                parameter.requires_grad_(True)


def _sides(module: nn.Module) -> tuple[int, int]:
    """Input and output width; an embedding's input is its vocabulary."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    raise SetupError(f"LoRA takes Linear, Conv1D and Embedding modules, got a {type(module).__name__}.")


def _head(model: nn.Module) -> Any:
    """The output head as transformers names it, or None."""
    output_embeddings: Any = getattr(model, "get_output_embeddings", None)
    return output_embeddings() if output_embeddings else None
