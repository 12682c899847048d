"""A frozen linear layer whose weight bitsandbytes holds in 4 or 8 bits.

Letters: T tokens, W [out, in]. Source: bitsandbytes 0.50, nn/modules.py (Linear4bit, Linear8bitLt),
autograd/_functions.py (MatMul4Bit, MatMul8bitLt), backends/cuda/ops.py; peft 0.21, tuners/lora/bnb.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from planner.estimate.forms import LinearForm
from planner.estimate.nodes import Tensor
from planner.estimate.resident import block_bytes

if TYPE_CHECKING:
    from planner.estimate.operations import Operations

__all__ = ["quantized_product"]

_FUSED_ROWS = 4  # _GEMM_4BIT_CUSTOM_FLOOR_M: so few rows multiply without a dequantized weight
_BLOCK = 64


def quantized_product(ops: Operations, x: Tensor, form: LinearForm) -> Tensor:
    """W x, in x's type. peft copies the answer of a 4-bit layer that it adapts."""
    if ops.recipe.quantization == "int8":
        return _eight_bits(ops, x, form)
    out = _four_bits(ops, x, form)
    return ops.op((out,), out.numel, out.element, aliases=True) if form.rank else out


def _four_bits(ops: Operations, x: Tensor, form: LinearForm) -> Tensor:
    """x in the compute type, W dequantized for the time of the product, forward and backward.

    Keeps nothing. Double quantization unpacks the scales first, fp32 [W / 64] twice.
    """
    element = ops.recipe.compute
    numbers = form.inputs * form.outputs
    weight = block_bytes(numbers * element)
    if ops.recipe.quantization == "nf4-double":
        weight += 2 * block_bytes(-(-numbers // _BLOCK) * 4)
    rows = x.numel // form.inputs
    few = rows <= _FUSED_ROWS and form.inputs % _BLOCK == 0
    single = ops.cast(x, element)
    out = ops.op(
        (single,),
        rows * form.outputs,
        element,
        scratch_bytes=weight,
        work_bytes=0 if few else weight,
    )
    answer = ops.cast(out, x.element)
    ops.hold(x, single)
    return answer


def _eight_bits(ops: Operations, x: Tensor, form: LinearForm) -> Tensor:
    """x quantized row by row, the product as int32 and fp16; W in x's type for the gradient of x.

    The node refers to x itself: a checkpoint does not free it, and it lives as long as the graph.
    """
    outputs = x.numel // form.inputs * form.outputs
    row_bytes = block_bytes(x.numel)
    quantizing = 2 * block_bytes(2 * x.numel) + 2 * row_bytes  # fp16, absolute values, codes, outliers
    multiplying = row_bytes + block_bytes(4 * outputs) + block_bytes(2 * outputs)
    return ops.op(
        (x,),
        outputs,
        x.element,
        scratch_bytes=block_bytes(form.inputs * form.outputs * x.element),
        work_bytes=max(quantizing - block_bytes(outputs * x.element), multiplying),
        pinned=(x,),
    )
