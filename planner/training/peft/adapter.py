"""Bottleneck adapters: x + up(f(down(x))) after the sub-layers of a frozen transformer.

Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", figure 2; Pfeiffer et al. 2020,
"AdapterFusion" (one adapter a layer, after the MLP). Left out: cross-attention, adapters' own norms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from planner.catalog.outputs import takes_adapter
from planner.errors import SetupError, nearest
from planner.targets import module_matches
from planner.training.peft.methods import ACTIVATIONS, AdapterSettings

__all__ = ["BottleneckAdapter", "adapter_targets", "attach_adapters"]

_DOWN_STD = 1e-2  # Houlsby et al. 2019, section 3.6: robust for standard deviations up to 1e-2
_FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "tanh": torch.tanh,
}


class BottleneckAdapter(nn.Module):
    """h -> m -> h with biases and a residual connection: 2 h m + m + h parameters.

    `down` is a Gaussian truncated at two standard deviations of 1e-2 (Houlsby et al. 2019, section
    3.6); `up` and both biases are zero, so the adapter starts as the identity, bit for bit. It
    computes in its own dtype and answers in the input's.
    """

    def __init__(
        self,
        hidden_size: int,
        adapter_size: int,
        activation: str = "relu",
        *,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Make the two layers. Raises SetupError for an unknown activation or m above h."""
        super().__init__()
        if activation not in ACTIVATIONS:
            raise SetupError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}.")
        if not 1 <= adapter_size <= hidden_size:
            raise SetupError(f"adapter_size must be from 1 to the width {hidden_size}, got {adapter_size}.")
        self.down = nn.Linear(hidden_size, adapter_size, device=device, dtype=dtype)
        self.up = nn.Linear(adapter_size, hidden_size, device=device, dtype=dtype)
        self.activation = activation
        self.enabled = True
        nn.init.trunc_normal_(self.down.weight, std=_DOWN_STD, a=-2 * _DOWN_STD, b=2 * _DOWN_STD)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., h] and what the bottleneck adds, in x's dtype."""
        if not self.enabled:
            return x
        act = _FUNCTIONS[self.activation]
        adapted: torch.Tensor = x + self.up(act(self.down(x.to(self.down.weight.dtype))))
        return adapted.to(x.dtype)


def adapter_targets(model: nn.Module, settings: AdapterSettings) -> dict[str, nn.Module]:
    """The modules whose output is adapted, by name. Raises SetupError where an output names no module."""
    modules = {name: module for name, module in model.named_modules() if name}
    wanted = settings.mlp_outputs
    if settings.adapter_kind == "houlsby":
        wanted = settings.attention_outputs + wanted
    for output in wanted:
        if not any(module_matches(name, output) for name in modules):
            known = {name.rpartition(".")[2] for name in modules if not name.rpartition(".")[2].isdigit()}
            raise SetupError(
                f"{type(model).__name__} has no output named {output!r}; {nearest(output, known)}"
            )
    return {
        name: module
        for name, module in modules.items()
        if takes_adapter(name, settings.adapter_kind, settings.attention_outputs, settings.mlp_outputs)
    }


def attach_adapters(model: nn.Module, settings: AdapterSettings) -> None:
    """Give each target a child `adapter` and a forward hook that applies it to the output.

    A hook and not a wrapper: the base model's parameter names and module paths stay as they are, and
    transformers looks some up (a mixture of experts' router by `mlp.gate`). Of a tuple the first is adapted.
    """
    targets = adapter_targets(model, settings)
    for name, module in targets.items():
        if hasattr(module, "adapter") or isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            raise SetupError(
                f"{name} ({type(module).__name__}) cannot take an adapter; name a layer without one."
            )
    adapters = {}
    for name, module in targets.items():
        anchor = next(module.parameters())
        adapter = BottleneckAdapter(
            _width(model, module),
            settings.adapter_size,
            settings.activation,
            device=anchor.device,
            dtype=settings.adapter_dtype or torch.promote_types(anchor.dtype, torch.float32),
        )
        adapters[name] = adapter.train(module.training)
    for name, module in targets.items():
        module.add_module("adapter", adapters[name])
        module.register_forward_hook(_adapted)


def _adapted(module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> Any:
    """The forward hook. A plain function: copies and pickles of the model keep it."""
    adapter: nn.Module = module.adapter  # type: ignore[assignment]
    if isinstance(output, tuple):
        return (adapter(output[0]), *output[1:])
    return adapter(output)


def _width(model: nn.Module, module: nn.Module) -> int:
    """Width of a module's output: a linear layer's own, else the model's hidden size."""
    for name in ("out_features", "nf"):  # Linear, transformers' Conv1D
        if isinstance(width := getattr(module, name, None), int):
            return width
    config: Any = model.config
    return int(config.get_text_config(decoder=True).hidden_size)
