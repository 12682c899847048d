"""DoRA and IA3 as peft runs them, as rules on a tape.

Letters: T tokens, W [out, in], r rank. Source: peft 0.21, tuners/lora/dora.py and variants.py,
tuners/ia3/layer.py; torch's autograd keeps both factors of a product and hands back full-size gradients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from planner.estimate.forms import LinearForm
from planner.estimate.nodes import Tensor
from planner.estimate.rounding import block_bytes

if TYPE_CHECKING:
    from planner.estimate.operations import Operations

__all__ = ["dora", "scaled_by_vector"]


def dora(ops: Operations, x: Tensor, result: Tensor, form: LinearForm) -> Tensor:
    """result + (m / |W + B A| - 1) W x + m / |W + B A| B A x alpha / r.

    Keeps what LoRA keeps, and [T, out] twice: W x in its type and B A x in fp32, for the gradient of m. The
    norm is made from B A of an identity [in, in] and a copy of W, in fp32 and gone at the end; the identity
    is gone before where no graph keeps it. With dropout
    W x is made again from fp32 copies of the dropped x and of W, which are kept; without, W x loses its bias,
    which is fp32 under autocast.
    """
    recipe = ops.recipe
    element = recipe.adapter
    numbers = form.inputs * form.outputs
    full = block_bytes(numbers * element)
    single = ops.cast(x, element)
    dropped = ops.dropout(single, form.lora_dropout)
    multiplied = recipe.compute if recipe.autocast else element
    copied = recipe.base != element
    kept = copied and form.lora_dropout > 0  # W x is made from that copy, which counts there
    eye = ops.op((), form.inputs**2, element)
    seen = ops.cast(eye, multiplied)
    low = ops.op((seen,), form.inputs * form.rank, multiplied)
    product = ops.op((low,), numbers, multiplied)
    ops.hold(eye)
    product = ops.cast(product, element)
    held = (product, ops.op((), numbers, element)) if copied and not kept else (product,)
    ops.op((product,), 0, element, work_bytes=(3 if kept else 2) * full)
    down = ops.trained(dropped, form.inputs, form.rank)
    up = ops.trained(down, form.rank, form.outputs)
    if form.lora_dropout:
        base = _made_again(ops, dropped, form, copied=copied)
    elif form.bias:
        wide = max(result.element, recipe.base)
        base = ops.op((result,), result.numel, wide, aliases=wide == result.element)
    else:
        base = result
    magnitude = block_bytes(form.outputs * element)
    first = _by_vector(ops, base, element, magnitude)
    second = ops.scaled(_by_vector(ops, up, element, 0))
    out = ops.add(result, ops.add(first, second))
    ops.hold(*held, single, dropped, up, base)
    ops.hold_by_graph(seen, low)
    answer = ops.cast(out, result.element)
    ops.hold(x, result)
    return answer


def _made_again(ops: Operations, x: Tensor, form: LinearForm, *, copied: bool) -> Tensor:
    """x W in fp32, or under autocast in its type; the copy of W is kept where x needs a gradient.

    A transposed weight that needs no copy becomes a new parameter (peft, utils/other.py, `transpose`), which
    asks for a gradient: x is kept for it, and nothing frees it before the graph.
    """
    outputs = x.numel // form.inputs * form.outputs
    if ops.recipe.autocast:
        x = ops.cast(x, ops.recipe.compute)
    weight = Tensor(form.inputs * form.outputs, x.element, False)
    kept = (weight,) if x.needs_grad and (copied or ops.recipe.autocast) else ()
    if copied or not form.transposed:
        return ops.op((x,), outputs, x.element, kept, reads_weight=x.needs_grad)
    gradient = block_bytes(form.inputs * form.outputs * ops.recipe.base)
    ops.stray_bytes += gradient
    return ops.op((x,), outputs, x.element, (*kept, x), weight_bytes=gradient, reads_weight=True)


def scaled_by_vector(ops: Operations, x: Tensor, element: int) -> Tensor:
    """x times IA3's vector in fp32, as numbers of `element` bytes. Keeps x."""
    vector = block_bytes(x.numel // ops.tokens * ops.recipe.adapter)
    out = ops.cast(_by_vector(ops, x, ops.recipe.adapter, vector), element)
    ops.hold(x)
    return out


def _by_vector(ops: Operations, x: Tensor, element: int, vector_bytes: int) -> Tensor:
    """x [T, n] times a trained vector [n] in the wider type: x is kept.

    Backward: the products for both gradients, as large as the output, before that of the vector is summed
    and that of x converted.
    """
    size = block_bytes(x.numel * max(x.element, element))
    return ops.op(
        (x,),
        x.numel,
        max(x.element, element),
        (x,),
        weight_bytes=vector_bytes,
        scratch_bytes=size + (size - x.size_bytes if x.needs_grad else 0),
        trained=True,
    )
