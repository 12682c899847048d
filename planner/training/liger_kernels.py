"""Liger's norms, gated activations, rotary positions and experts in place of a model's own.

On a CUDA device the library itself runs. Elsewhere its steps are written out in torch: the same tensors in
the same order, with kernels in torch's words on the CPU and none on `meta`, where
`planner.simulate.liger_forms` says what a card decides. Source: liger_kernel 0.8.5, ops/rms_norm.py,
swiglu.py, geglu.py and rope.py; which module gets which, planner/liger.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import MethodType, ModuleType
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers.trainer_utils import unwrap_peft_model

from planner.liger import Replaced, adapted_experts, adapted_norm, liger_switches, replaced
from planner.model import Model
from planner.training.liger_experts import fused_experts

__all__ = ["gated", "multiprocessors", "rms_norm", "rotated", "with_kernels"]

Positions = Callable[[], AbstractContextManager[Any]]


def with_kernels(net: nn.Module, model: Model, device: torch.device) -> Positions:
    """Replace norms, activations and experts of a model with its method attached, in place.

    What comes back is entered around each step: there the model's module turns positions by Liger's function,
    which the library puts there for the whole process. Raises SetupError where a method has wrapped what a
    kernel would pass over.
    """
    base: Any = unwrap_peft_model(net)
    what = replaced("liger", model)
    assert what is not None  # the setup has refused others
    body = getattr(base, base.base_model_prefix, base)
    _refuse_wrapped(body, what, model)
    modeling = sys.modules[type(base).__module__]
    if device.type == "cuda":
        return _library(base, modeling)
    _replace_norm(body.norm, what, in_place=what.last_in_place)
    for layer in body.layers:
        for name in what.norms:
            _replace_norm(layer.get_submodule(name), what, in_place=what.in_place)
        if what.gate == "experts":
            layer.mlp.experts.forward = MethodType(fused_experts, layer.mlp.experts)
        elif what.gate:
            layer.mlp.forward = MethodType(_MLPS[what.gate, what.fused_gate_up], layer.mlp)
    return _turning(modeling, rotated) if what.rotary else nullcontext


def _library(base: Any, modeling: ModuleType) -> Positions:
    """liger_kernel's own modules; what it puts into transformers' module is taken out again until a step."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    before = dict(vars(modeling))
    _apply_liger_kernel_to_instance(model=base, **liger_switches("liger", "full"))
    turned = vars(modeling)["apply_rotary_pos_emb"]
    vars(modeling).update(before)
    return _turning(modeling, turned)


def _turning(modeling: ModuleType, function: Any) -> Positions:
    return lambda: mock.patch.object(modeling, "apply_rotary_pos_emb", function)


def _refuse_wrapped(body: Any, what: Replaced, model: Model) -> None:
    """A wrapper's norm would read the frozen weight, and experts would not be found. Raises SetupError."""
    for layer in body.layers:
        if what.gate == "experts" and isinstance(layer.mlp.experts, BaseTunerLayer):
            raise adapted_experts(model.id)
        if any(isinstance(layer.get_submodule(name), BaseTunerLayer) for name in what.norms):
            raise adapted_norm(model.id)
    if isinstance(body.norm, BaseTunerLayer):
        raise adapted_norm(model.id)


def _replace_norm(module: Any, what: Replaced, *, in_place: bool) -> None:
    """The norm, or both of its copies where peft trains one (modules_to_save)."""
    wrapped = isinstance(module, ModulesToSaveWrapper)
    for norm in (*module.modules_to_save.values(), module.original_module) if wrapped else (module,):
        eps = getattr(norm, "variance_epsilon", None) or norm.eps

        def forward(self: Any, hidden_states: torch.Tensor, eps: float = eps) -> torch.Tensor:
            return rms_norm(
                hidden_states, self.weight, eps, offset=what.offset, single=what.single, in_place=in_place
            )

        norm.forward = MethodType(forward, norm)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, offset: float, single: bool, in_place: bool
) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) (weight + offset) in x's type; `single`: the weight's product in fp32."""
    apply: Any = _RMSNorm.apply
    out: torch.Tensor = apply(x, weight, eps, offset, single, in_place)
    return out


def multiprocessors(device: torch.device) -> int:
    """How many partial sums the weight's gradient is made of: one for each multiprocessor of a card."""
    return 1


class _RMSNorm(torch.autograd.Function):
    """Keeps x and 1 / sqrt(...) of each row in fp32; nothing of x is computed in fp32 tensors."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        offset: float,
        single: bool,
        in_place: bool,
    ) -> torch.Tensor:
        shape = x.shape
        rows = x.contiguous().view(-1, shape[-1])
        out = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
        inverse = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
        if rows.device.type != "meta":
            wide = rows.float()
            inverse.copy_(torch.rsqrt(wide.square().mean(1) + eps))
            normed = wide * inverse.unsqueeze(1)
            factor = weight + offset
            out.copy_(normed * factor.float() if single else normed.to(rows.dtype) * factor)
        ctx.save_for_backward(rows, weight, inverse)
        ctx.offset, ctx.in_place = offset, in_place
        return out.view(shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        rows, weight, inverse = ctx.saved_tensors
        shape = gradient.shape
        gradient = gradient.contiguous().view(-1, shape[-1])
        parts = None
        if ctx.needs_input_grad[1]:
            count = multiprocessors(rows.device)
            parts = torch.empty((count, shape[-1]), dtype=torch.float32, device=rows.device)
        answer = gradient if ctx.in_place else torch.zeros_like(gradient)
        if rows.device.type != "meta":
            down = gradient.float()
            normed = rows.float() * inverse.unsqueeze(1)
            if parts is not None:
                parts.zero_()[0] = (down * normed).sum(0)
            down = down * (weight.float() + ctx.offset)
            change = down - normed * (down * normed).mean(1, keepdim=True)
            answer.copy_(change * inverse.unsqueeze(1))
        of_weight = None if parts is None else parts.sum(dim=0).to(weight.dtype)
        return answer.view(shape), of_weight, None, None, None, None


def gated(gate: torch.Tensor, up: torch.Tensor, name: str) -> torch.Tensor:
    """act(gate) up, act being silu, or gelu by tanh; of one type."""
    apply: Any = _Gated.apply
    out: torch.Tensor = apply(gate, up, name)
    return out


class _Gated(torch.autograd.Function):
    """Keeps gate and up, over which the backward pass writes their gradients."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, name: str) -> torch.Tensor:
        shape = gate.shape
        gate, up = gate.contiguous(), up.contiguous()
        gate, up = gate.view(-1, shape[-1]), up.view(-1, shape[-1])
        out = torch.empty_like(gate)
        if gate.device.type != "meta":
            out.copy_(_activation(gate.float(), name).to(up.dtype) * up)
        ctx.save_for_backward(gate, up)
        ctx.name = name
        return out.view(shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        gate, up = ctx.saved_tensors
        shape = gradient.shape
        gradient = gradient.contiguous().view(-1, shape[-1])
        if gate.device.type != "meta":
            down = gradient.float()
            with torch.enable_grad():
                wide = gate.detach().float().requires_grad_()
                active = _activation(wide, ctx.name)
            (of_gate,) = torch.autograd.grad(active, wide, down * up.float())
            gate.copy_(of_gate)
            up.copy_(down * active.detach())
        return gate.view(shape), up.view(shape), None


def _activation(x: torch.Tensor, name: str) -> torch.Tensor:
    return F.silu(x) if name == "silu" else F.gelu(x, approximate="tanh")


def _silu_mlp(self: Any, x: torch.Tensor) -> Any:
    return self.down_proj(gated(self.gate_proj(x), self.up_proj(x), "silu"))


def _gelu_mlp(self: Any, x: torch.Tensor) -> Any:
    return self.down_proj(gated(self.gate_proj(x), self.up_proj(x), "gelu"))


def _fused_silu_mlp(self: Any, x: torch.Tensor) -> Any:
    """Gate and up are halves of one tensor, which the variables hold to the end."""
    gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
    return self.down_proj(gated(gate, up, "silu"))


_MLPS: dict[tuple[str, bool], Callable[..., Any]] = {
    ("silu", False): _silu_mlp,
    ("gelu", False): _gelu_mlp,
    ("silu", True): _fused_silu_mlp,
}


def rotated(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [b, a, s, d] and k [b, k, s, d] turned by cos and sin [1 or b, s, d or less], in their own storage
    where a token's heads lie side by side."""
    apply: Any = _Rotary.apply
    turned: tuple[torch.Tensor, torch.Tensor] = apply(q, k, cos, sin)
    return turned


class _Rotary(torch.autograd.Function):
    """Keeps cos and sin alone; the backward pass turns the gradients back, in their storage again."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        return _turned(q, k, cos, sin)

    @staticmethod
    def backward(ctx: Any, of_q: torch.Tensor, of_k: torch.Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return *_turned(of_q, of_k, cos, -sin if sin.device.type != "meta" else sin), None, None


def _turned(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    q, k = q.contiguous(), k.contiguous()
    if q.device.type != "meta":
        for each in (q, k):
            part = each.data[..., : cos.shape[-1]]
            first, second = part.float().chunk(2, dim=-1)
            wide = torch.cat((first, second), -1) * cos.float().unsqueeze(2)
            part.copy_(wide + torch.cat((-second, first), -1) * sin.float().unsqueeze(2))
    return q.transpose(1, 2), k.transpose(1, 2)
