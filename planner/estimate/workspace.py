"""Workspaces that the matrix library takes from the same allocator and keeps."""

from __future__ import annotations

from dataclasses import dataclass

from planner.estimate.forms import ModelForm
from planner.estimate.recipes import recipe_of
from planner.estimate.traits import TRAITS
from planner.spec import Setup

__all__ = ["Workspaces", "workspace_bytes", "workspaces"]

# aten/src/ATen/cuda/CublasHandlePool.cpp: two buffers of 4,096 KiB and eight of 16 KiB; 32 MiB on 9.0
_CUBLAS_BYTES = 2 * 4096 * 1024 + 8 * 16 * 1024
_CUBLAS_HOPPER_BYTES = 32 * 1024 * 1024
_CUBLASLT_BYTES = 1024 * 1024  # same file: a linear layer with a bias multiplies through cublasLt


@dataclass(frozen=True, kw_only=True, slots=True)
class Workspaces:
    """Bytes that the step's own thread takes in the first forward pass, autograd's in the first backward."""

    forward_bytes: int = 0
    backward_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Both, from the first backward pass on."""
        return self.forward_bytes + self.backward_bytes


def workspace_bytes(setup: Setup, form: ModelForm | None) -> int:
    """What both threads have taken in the end."""
    return workspaces(setup, form).total_bytes


def workspaces(setup: Setup, form: ModelForm | None) -> Workspaces:
    """cuBLAS once for each thread that multiplies, cublasLt where a bias is added.

    The recomputation of a checkpoint adds biases in autograd's thread too.
    """
    capability = setup.gpu.capability if setup.gpu is not None else None
    cublas = _CUBLAS_HOPPER_BYTES if capability == (9, 0) else _CUBLAS_BYTES
    quantized = recipe_of(setup).quantization == "int8"  # bitsandbytes multiplies itself and adds in place
    shape = setup.model.architecture
    apart = shape is not None and form is not None and TRAITS[shape.family].bias_added_apart
    if form is None or not _adds_biases(form, but_quantized=quantized, apart=apart):
        return Workspaces(forward_bytes=cublas, backward_bytes=cublas)
    again = setup.training.activation_checkpointing
    return Workspaces(
        forward_bytes=cublas + _CUBLASLT_BYTES, backward_bytes=cublas + (_CUBLASLT_BYTES if again else 0)
    )


def _adds_biases(form: ModelForm, *, but_quantized: bool, apart: bool) -> bool:
    """`apart`: the model's own layers multiply first and add then, which cublasLt has no part in."""
    linears = [form.head, *form.outer_linears]
    for layer, _ in (*form.encoder_runs, *form.runs):
        linears += [*layer.attention_inputs, layer.attention_output, *layer.mlp_inputs]
        linears += [linear for linear in (layer.mlp_output, layer.router) if linear]
        linears += [*layer.cross_inputs, *([layer.cross_output] if layer.cross_output else [])]
        if layer.bottleneck:
            return True
    return any(
        (linear.bias and not apart and not (but_quantized and linear.quantized)) or linear.bottleneck
        for linear in linears
    )
