"""A mixture of experts as transformers 5 runs it: grouped products over tokens sorted by expert.

Letters: T tokens, `h` hidden, `f` an expert's inner width, `e` experts, `p` experts for each token,
S = T p token-expert pairs. Source: transformers 5.23, integrations/moe.py, `grouped_mm_experts_forward`,
and each model's router.
"""

from __future__ import annotations

from math import prod

from planner.estimate.forms import LayerForm
from planner.estimate.nodes import Tensor
from planner.estimate.operations import Operations
from planner.estimate.resident import block_bytes
from planner.model import Architecture
from planner.units import MIB

__all__ = ["experts", "router_note"]

_INDEX_BYTES = 8  # int64


def experts(ops: Operations, x: Tensor, shape: Architecture, form: LayerForm) -> Tensor:
    """The weighted sum of p experts for each token, x being [T, h].

    Keeps the weights of all experts' scores, the sorted tokens [S, h] where experts are trained, gate
    and up [S, 2 f], the activation [S, f], their product [S, f] where experts are trained, the experts'
    answers [S, h], and the orders of the sort.
    """
    h, p = shape.hidden_size, shape.experts_per_token
    tokens = x.numel // h
    pairs = tokens * p
    gate_up, down = form.experts
    scores = _router(ops, x, shape, form)
    order = Tensor(pairs, _INDEX_BYTES, False)
    base = ops.recipe.base
    trained = form.experts_trained
    sorted_scores = ops.op((scores,), pairs, scores.element, (order,))
    chosen = ops.op((x,), pairs * h, x.element, (Tensor(pairs, _INDEX_BYTES, False),))
    added = form.experts_added
    merged = [_merged(ops, gate_up, added[0])]
    wide = 2 * shape.expert_intermediate_size
    both, first_bias = _with_bias(
        ops,
        form,
        _grouped(ops, chosen, gate_up, base, outputs=wide, trained=trained, merged=merged[0]),
        wide,
    )
    inner = _gated(ops, both, shape)
    ops.hold(both)
    merged.append(_merged(ops, down, added[1]))
    answers, bias = _with_bias(
        ops, form, _grouped(ops, inner, down, base, outputs=h, trained=trained, merged=merged[1]), h
    )
    if form.experts_biased:
        ops.hold(first_bias)
    weighted = _weighted(ops, answers, sorted_scores)
    inverse = ops.op((), pairs, _INDEX_BYTES)
    restored = ops.op((weighted, inverse), pairs * h, weighted.element, (inverse,))
    total = ops.cast(ops.op((restored,), x.numel, restored.element), x.element)
    ops.hold(x, chosen, answers, bias, *[weight for weight in merged if weight])
    return ops.bottleneck(total, h, form.bottleneck) if form.bottleneck else total


def router_note(shape: Architecture, tokens: int, element: int) -> str:
    """What the router's choice changes: nothing in grouped products, one expert's own tensors in a loop.

    The fullest expert has T p / e tokens where all are alike and T at most, since a token chooses p different
    ones; its own tensors are gate and up [n, 2 f] and its answer [n, h], `element` bytes each.
    """
    pairs = tokens * shape.experts_per_token
    even = -(-pairs // shape.num_experts)
    row_bytes = (2 * shape.expert_intermediate_size + shape.hidden_size) * element
    smallest, largest = (f"{count * row_bytes / MIB:,.1f} MiB" for count in (even, tokens))
    return (
        f"Router: {pairs:,} token-expert pairs are computed in each layer whichever experts take them, so an "
        "uneven router changes nothing here; where experts run one by one, the fullest one's tensors grow "
        f"from {smallest} ({even:,} tokens, even) to {largest} (all {tokens:,} tokens)."
    )


def _merged(ops: Operations, weight: tuple[int, ...], added: tuple[int, int]) -> Tensor | None:
    """LoRA on the experts' parameter: W + B A alpha / r for all experts at once, as large as W.

    peft/tuners/lora/layer.py, `_LoraFactorsProxy`: A and B in W's type, one baddbmm, held while the layer
    runs (torch/nn/utils/parametrize.py, `cached`). The product keeps it for its input's gradient.
    """
    if not any(added):
        return None
    recipe = ops.recipe
    sizes = [block_bytes(numel * recipe.adapter) for numel in added]
    if recipe.adapter == recipe.base:
        return ops.op((), prod(weight), recipe.base, weight_bytes=sum(sizes))
    a, b = (
        ops.op((), numel, recipe.base, weight_bytes=size) for numel, size in zip(added, sizes, strict=True)
    )
    return ops.op((a, b), prod(weight), recipe.base, (a, b))


def _grouped(
    ops: Operations,
    x: Tensor,
    weight: tuple[int, ...],
    element: int,
    *,
    outputs: int,
    trained: bool,
    merged: Tensor | None,
) -> Tensor:
    """x [S, in] by the weights [e, out, in] of the experts; x is kept where they are trained or `merged`."""
    numbers = prod(weight)
    inputs = numbers // weight[0] // outputs
    kept = (x,) if trained or merged else ()
    if merged and x.needs_grad:
        kept = (*kept, merged)
    return ops.op(
        (x, merged) if merged else (x,),
        x.numel // inputs * outputs,
        x.element,
        kept,
        weight_bytes=block_bytes(numbers * element) if trained else 0,
        reads_weight=x.needs_grad,
    )


def _with_bias(ops: Operations, form: LayerForm, x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """x [S, width] with each expert's bias added in place, and the biases [S, width] that were taken for it.

    Backward where they are trained: their gradients are added at sorted places (Indexing.cu).
    """
    if not form.experts_biased:
        return x, x
    bias = ops.recipe.base
    numbers = x.numel // width
    gradient = block_bytes(form.experts[0][0] * width * bias) if form.experts_trained else 0
    places = 4 * block_bytes(_INDEX_BYTES * numbers) if gradient else 0
    biases = ops.op((), x.numel, bias, weight_bytes=gradient, scratch_bytes=places)
    return ops.in_place(x, biases), biases


def _gated(ops: Operations, both: Tensor, shape: Architecture) -> Tensor:
    """act(gate) up from both [S, 2 f]; gpt-oss: (up + 1) gate sigmoid(alpha gate), both clamped before.

    Keeps of gpt-oss gate and up as they came, the clamped gate, its sigmoid, their product and up + 1.
    Backward: masks of a byte say what the clamps let through.
    """
    count = both.numel // 2
    if not ops.traits.clamped_gate:
        gate, up = ops.split(both, (count, count))
        return ops.product(ops.activation(gate, shape.activation), up)
    columns = [ops.view(both, count) for _ in range(2)]
    gate, up = (
        ops.op((side,), count, side.element, (side,), scratch_bytes=masks * block_bytes(count))
        for masks, side in enumerate(columns, 1)
    )
    share = ops.op((ops.scaled(gate),), count, gate.element, keeps_output=True)
    turned = ops.product(gate, share)
    inner = ops.product(ops.op((up,), count, up.element, aliases=True), turned)
    ops.hold(up)
    return inner


def _weighted(ops: Operations, answers: Tensor, scores: Tensor) -> Tensor:
    """Each answer by its score: both are kept, the scores' gradient is summed from a product as large."""
    element = max(answers.element, scores.element)
    kept = tuple([t for t, other in ((answers, scores), (scores, answers)) if other.needs_grad])
    scratch = block_bytes(answers.numel * element) if scores.needs_grad else 0
    return ops.op((answers, scores), answers.numel, element, kept, scratch_bytes=scratch)


def _router(ops: Operations, x: Tensor, shape: Architecture, form: LayerForm) -> Tensor:
    """Scores of the p best experts of each token [T, p], from a softmax over all e in fp32 (kept).

    gpt-oss takes the softmax of the p best alone, in their own type.
    """
    h, e, p = shape.hidden_size, shape.num_experts, shape.experts_per_token
    tokens = x.numel // h
    assert form.router is not None  # experts have one
    logits = ops.linear(x, form.router)
    if ops.traits.shares_of_chosen:
        places = Tensor(tokens * p, _INDEX_BYTES, False)
        best = ops.op((logits,), tokens * p, logits.element, (places,))
        return ops.op((best,), best.numel, best.element, keeps_output=True, scratch_bytes=best.size_bytes)
    shares = ops.op((ops.cast(logits, 4),), tokens * e, 4, keeps_output=True)
    best = ops.op((shares,), tokens * p, 4, (Tensor(tokens * p, _INDEX_BYTES, False),))
    normalized = ops.op((best,), tokens * p, 4, keeps_output=True)
    return normalized if shape.family == "mixtral" else ops.cast(normalized, logits.element)
