"""Liger's experts: grouped products inside kernels, over token-expert pairs sorted by expert.

Letters: T tokens, `p` experts for each, S = T p pairs, `h` hidden, `f` an expert's inner width, `e` experts.
Source: liger_kernel 0.8.5, ops/fused_moe.py and transformers/swiglu.py, `LigerExperts.forward`. The tensors
in its order; on the CPU the products are made expert by expert.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

__all__ = ["fused_experts", "tuned"]

_TILE_ROWS = 64  # BLOCK_M_TOKEN
_TILE_PAIRS = 1024  # of which a tile of the histogram has the tokens


def fused_experts(self: Any, hidden_states: torch.Tensor, top_k_index: Any, top_k_weights: Any) -> Any:
    """The forward pass of a module with `gate_up_proj` [e, 2 f, h] and `down_proj` [e, h, f]."""
    shape = hidden_states.shape
    tokens = hidden_states.view(-1, shape[-1])
    index = top_k_index.view(-1, top_k_index.shape[-1]).to(torch.int32)
    shares = top_k_weights.view(-1, top_k_weights.shape[-1])
    apply: Any = _Experts.apply
    return apply(tokens, self.gate_up_proj, self.down_proj, index, shares).view(shape)


def tuned(kernel: str, device: torch.device) -> None:
    """A kernel that is launched in several forms the first time, to keep the fastest."""


class _Experts(torch.autograd.Function):
    """Keeps x, gate and up [S, 2 f] and the order; both weights' gradients are made, wanted or not."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        index: torch.Tensor,
        shares: torch.Tensor,
    ) -> torch.Tensor:
        x, index, shares = x.contiguous(), index.contiguous(), shares.contiguous()
        pairs, inner, device = index.numel(), gate_up.shape[1] // 2, x.device
        counts, order = _order(index, len(gate_up))
        both = torch.empty(pairs, 2 * inner, dtype=x.dtype, device=device)
        active = torch.empty(pairs, inner, dtype=x.dtype, device=device)
        tuned("up", device)
        answers = torch.empty(pairs, x.shape[1], dtype=x.dtype, device=device)
        tuned("down", device)
        flat = shares.flatten().contiguous()
        out = torch.empty(x.shape, dtype=x.dtype, device=device)
        tuned("sum", device)
        if device.type != "meta":
            for place, expert in _by_expert(index):
                both[place] = (x[place // index.shape[1]] @ gate_up[expert].t()).to(x.dtype)
                active[place] = F.silu(both[place, :inner]) * both[place, inner:]
                answers[place] = (active[place] @ down[expert].t()).to(x.dtype)
            weighted = answers * flat.unsqueeze(1)
            out.copy_(weighted.view(len(x), index.shape[1], -1).sum(1))
        del counts, active, answers
        ctx.save_for_backward(x, gate_up, down, both, flat, *order)
        ctx.index = index if device.type == "cpu" else None
        ctx.mark_non_differentiable(index)
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor | None) -> Any:
        if gradient is None:
            return None, None, None, None, None
        gradient = gradient.contiguous()
        x, gate_up, down, both, flat, *_order = ctx.saved_tensors
        pairs, dtype, device = len(flat), gradient.dtype, gradient.device
        of_both = torch.empty(both.shape, dtype=dtype, device=device)
        active = torch.empty(pairs, both.shape[1] // 2, dtype=dtype, device=device)
        of_shares = torch.zeros(pairs, dtype=dtype, device=device)
        tuned("of_down", device)
        of_down = torch.zeros_like(down)
        tuned("of_down_weight", device)
        expanded = torch.empty(pairs, x.shape[1], dtype=dtype, device=device)
        tuned("of_up", device)
        of_x = torch.zeros(x.shape, dtype=dtype, device=device)
        tuned("of_sum", device)
        of_gate_up = torch.zeros_like(gate_up)
        tuned("of_up_weight", device)
        if device.type != "meta":
            made = _gradients(gradient, x, gate_up, down, both, flat, ctx.index)
            for tensor, value in zip((of_x, of_gate_up, of_down, of_shares), made, strict=True):
                tensor.copy_(value)
        del of_both, active, expanded
        return of_x, of_gate_up, of_down, None, of_shares.view(len(x), -1)


def _order(index: torch.Tensor, experts: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """How many pairs each expert has, and where it begins, its tiles, and the order of the pairs (int32).

    The number of tiles follows from the router's choice; here all experts are taken to have alike.
    """
    tokens, each = index.shape
    device, pairs = index.device, index.numel()
    rows = max(1, _TILE_PAIRS // (1 << (each - 1).bit_length()))
    histogram = torch.empty(experts, -(-tokens // rows), dtype=torch.int32, device=device)
    counts = histogram.sum(dim=1, dtype=torch.int32)
    starts = torch.empty(experts + 1, dtype=torch.int32, device=device)
    offsets = torch.empty(experts + 1, dtype=torch.int32, device=device)
    busy = min(experts, pairs)
    tiles = busy * -(-pairs // (busy * _TILE_ROWS))
    tile_rows, tile_experts = (torch.empty(tiles, dtype=torch.int32, device=device) for _ in range(2))
    scatter, reverse, gather = (torch.empty(pairs, dtype=torch.int32, device=device) for _ in range(3))
    del histogram, offsets
    return counts, [starts, gather, scatter, reverse, tile_rows, tile_experts]


def _by_expert(index: torch.Tensor) -> list[tuple[torch.Tensor, int]]:
    """The pairs of each expert that has any."""
    flat = index.flatten()
    return [((flat == expert).nonzero().squeeze(1), int(expert)) for expert in flat.unique()]


def _gradients(
    gradient: torch.Tensor,
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    both: torch.Tensor,
    flat: torch.Tensor,
    index: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Of x, both weights and the shares, expert by expert."""
    of_x, of_gate_up, of_down = torch.zeros_like(x), torch.zeros_like(gate_up), torch.zeros_like(down)
    of_shares = torch.zeros_like(flat)
    for place, expert in _by_expert(index):
        token = place // index.shape[1]
        incoming = gradient[token]
        with torch.enable_grad():
            gates = both[place].detach().requires_grad_()
            first, second = gates.chunk(2, -1)
            active = F.silu(first) * second
        of_shares[place] = (incoming * (active.detach() @ down[expert].t())).sum(1).to(flat.dtype)
        weighted = incoming * flat[place].to(incoming.dtype).unsqueeze(1)
        of_down[expert] = weighted.t() @ active.detach()
        (of_gates,) = torch.autograd.grad(active, gates, weighted @ down[expert])
        of_gate_up[expert] = of_gates.t() @ x[token]
        of_x.index_add_(0, token, of_gates @ gate_up[expert])
    return of_x, of_gate_up, of_down, of_shares
