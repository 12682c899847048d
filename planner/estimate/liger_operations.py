"""Operations of a model whose norms, gated activations, rotary positions and experts are Liger's.

Letters: T tokens, `h` hidden, `f` inner width, `p` experts for each token, S = T p pairs. Source:
liger_kernel 0.8.5, ops/rms_norm.py, swiglu.py, geglu.py, rope.py and fused_moe.py, written out in
planner/training/liger_kernels.py and liger_experts.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from planner.estimate.attention_plan import AttentionPlan
from planner.estimate.forms import LayerForm, NormForm
from planner.estimate.nodes import Node, Tensor
from planner.estimate.operations import Operations
from planner.estimate.resident import block_bytes
from planner.liger import Replaced

__all__ = ["LigerOperations"]


class LigerOperations(Operations):
    """`what` is replaced; `multiprocessors` are the card's."""

    __slots__ = ("multiprocessors", "what")

    def __init__(self, *args: Any, what: Replaced, multiprocessors: int, **kwargs: Any) -> None:
        """All others as in `Operations`."""
        super().__init__(*args, **kwargs)
        self.what = what
        self.multiprocessors = multiprocessors
        if what.rotary:  # heads are turned where they lie, and lie as [b, s, a, d]
            self.traits = replace(self.traits, rotary_cats=False)

    def norm(self, x: Tensor, form: NormForm, kind: str) -> Tensor:
        """RMSNorm of a layer."""
        return self._norm(x, form, in_place=self.what.in_place)

    def last_norm(self, x: Tensor, form: NormForm, kind: str) -> Tensor:
        """RMSNorm before the head."""
        return self._norm(x, form, in_place=self.what.last_in_place)

    def head_norm(self, x: Tensor, form: NormForm, kind: str) -> Tensor:
        """Of queries or keys: some models keep their own."""
        return self.norm(x, form, kind) if self.what.head_norms else self.rms_norm(x, form)

    def _norm(self, x: Tensor, form: NormForm, *, in_place: bool) -> Tensor:
        """Keeps x in its own type and 1 / sqrt(...) [T] in fp32, whether or not anything is trained.

        Backward: x's gradient in the place of the output's, or a new one; where w is trained partial sums [m,
        h] in fp32, one for each of m multiprocessors, and their sum.
        """
        inverse = Tensor(x.numel // form.width, 4, False)
        gradient = sums = 0
        if form.weight_trained:
            gradient = block_bytes(form.width * self.recipe.base)
            sums = block_bytes(4 * form.width * self.multiprocessors)
            sums += block_bytes(4 * form.width) if self.recipe.base != 4 else 0
        return self.op(
            (x,),
            x.numel,
            x.element,
            (x, inverse),
            aliases=in_place,
            weight_bytes=gradient,
            scratch_bytes=sums,
            keeps_late=True,
        )

    def gated(
        self, x: Tensor, form: LayerForm, activation: str, *, fused: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """act(gate) up. Keeps gate and up [T, f], which become their gradients.

        Halves of one tensor are copied first, and the model's variables hold it (phi3).
        """
        if not fused:
            gate, up = (self.linear(x, linear) for linear in form.mlp_inputs)
            return self._over_both(gate, up), ()
        both = self.linear(x, form.mlp_inputs[0])
        halves = self.split(both, (both.numel // 2, both.numel // 2))
        gate, up = (self.op((half,), half.numel, half.element, aliases=True) for half in halves)
        return self._over_both(gate, up), (both,)

    def _over_both(self, gate: Tensor, up: Tensor) -> Tensor:
        overwritten = sum([side.size_bytes for side in (gate, up) if side.needs_grad])
        kept = gate, up
        return self.op(kept, gate.numel, gate.element, kept, freed_bytes=overwritten, keeps_late=True)

    def turned(self, q: Tensor, k: Tensor, share: float, plan: AttentionPlan) -> tuple[Tensor, Tensor]:
        """Queries and keys turned in place, in their own type; slices of one tensor (phi3) are copied.

        The gradients are turned in place too, but copied where an attention kernel hands them back by heads:
        keys that were repeated to all heads, both after products of matrices.
        """
        if not self.what.rotary:
            return super().turned(q, k, share, plan)
        if self.traits.fused_qkv == "slices":
            q, k = (self.op((t,), t.numel, t.element, aliases=True) for t in (q, k))
        of_q, of_k = (Tensor(t.numel, t.element, t.needs_grad, t.owner) for t in (q, k))
        by_heads = plan.kernel in ("math", "eager")
        if by_heads and plan.a > 1:
            self.nodes.append(Node((q, k), (of_q, of_k)))
        else:
            self.nodes.append(Node((q,), (of_q,), aliases=True))
            self.nodes.append(Node((k,), (of_k,), aliases=not (plan.repeated and plan.k > 1)))
        return of_q, of_k
