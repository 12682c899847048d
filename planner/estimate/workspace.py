"""Workspaces that the matrix library takes from the same allocator and keeps."""

from __future__ import annotations

from planner.estimate.forms import ModelForm
from planner.estimate.recipes import recipe_of
from planner.spec import Setup

__all__ = ["workspace_bytes"]

# aten/src/ATen/cuda/CublasHandlePool.cpp: two buffers of 4,096 KiB and eight of 16 KiB; 32 MiB on 9.0
_CUBLAS_BYTES = 2 * 4096 * 1024 + 8 * 16 * 1024
_CUBLAS_HOPPER_BYTES = 32 * 1024 * 1024
_CUBLASLT_BYTES = 1024 * 1024  # same file: a linear layer with a bias multiplies through cublasLt


def workspace_bytes(setup: Setup, form: ModelForm | None) -> int:
    """cuBLAS once for each thread that multiplies (forward, and autograd's), cublasLt where a bias is added.

    The recomputation of a checkpoint adds biases in autograd's thread too.
    """
    capability = setup.gpu.capability if setup.gpu is not None else None
    cublas = 2 * (_CUBLAS_HOPPER_BYTES if capability == (9, 0) else _CUBLAS_BYTES)
    quantized = recipe_of(setup).quantization == "int8"  # bitsandbytes multiplies itself and adds in place
    if form is None or not _adds_biases(form, but_quantized=quantized):
        return cublas
    return cublas + _CUBLASLT_BYTES * (2 if setup.training.activation_checkpointing else 1)


def _adds_biases(form: ModelForm, *, but_quantized: bool) -> bool:
    linears = [form.head, *form.outer_linears]
    for layer, _ in (*form.encoder_runs, *form.runs):
        linears += [*layer.attention_inputs, layer.attention_output, *layer.mlp_inputs]
        linears += [layer.mlp_output] if layer.mlp_output else []
        linears += [*layer.cross_inputs, *([layer.cross_output] if layer.cross_output else [])]
        if layer.bottleneck:
            return True
    return any(
        (linear.bias and not (but_quantized and linear.quantized)) or linear.bottleneck for linear in linears
    )
