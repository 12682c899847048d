"""Sparse matrices (COO) on `meta`, which has no kernels for them: what CUDA's kernels make and take.

A sparse tensor is its places `[dims, n]` (int64) and its values `[n]`; its dense operations are counted as
aten/src/ATen/native/sparse/cuda/SparseCUDATensorMath.cu and SparseCUDATensor.cpp run them. All n places are
distinct. Left out: cuSPARSE's own workspace of a product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from planner.sorting import radix_sort_bytes

__all__ = ["SPARSE", "parts_of"]

aten = torch.ops.aten
Made = tuple[torch.Tensor, list[int]]  # the result, and the sizes in bytes of blocks taken next to it


def parts_of(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    """The dense tensors that hold a tensor's storages."""
    if tensor.layout is not torch.sparse_coo:
        return (tensor,)
    return tensor._indices(), tensor._values()


def _count(sparse: torch.Tensor) -> int:
    return int(sparse._values().shape[0])


def _coalesce(args: Sequence[Any]) -> Made:
    """Places as one number each, their order, where a new one begins; sorted. New places and values."""
    given = args[0]
    count = _count(given)
    indices, values = torch.empty_like(given._indices()), torch.empty_like(given._values())
    out = torch.sparse_coo_tensor(indices, values, given.shape, is_coalesced=True, check_invariants=False)
    return out, [count * 8] * 3 + [radix_sort_bytes(count, 8)]


def _dense(args: Sequence[Any]) -> Made:
    """A matrix of zeros; where places may repeat, each is made one number first."""
    given = args[0]
    out = torch.empty(given.shape, dtype=given.dtype, device="meta")
    return out, [] if given.is_coalesced() else [_count(given) * 8]


def _add(args: Sequence[Any]) -> Made:
    """add_out_dense_sparse_cuda: into a copy of the matrix where the two types are not the same."""
    matrix, sparse = args[0], args[1]
    wide = torch.promote_types(matrix.dtype, sparse.dtype)
    buffer = [matrix.numel() * wide.itemsize] if wide != matrix.dtype else []
    return matrix, buffer + ([] if sparse.is_coalesced() else [_count(sparse) * 8])


def _mask(args: Sequence[Any]) -> Made:
    """The matrix at the places of the mask: new values, the mask's places."""
    matrix, mask = args[0], args[1]
    values = torch.empty(_count(mask), dtype=matrix.dtype, device="meta")
    out = torch.sparse_coo_tensor(
        mask._indices(), values, mask.shape, is_coalesced=mask.is_coalesced(), check_invariants=False
    )
    return out, [_count(mask) * 8]


def _product(args: Sequence[Any]) -> Made:
    """`_sparse_addmm`: a dense matrix."""
    return torch.empty_like(args[0]), []


SPARSE: dict[Any, Callable[[Sequence[Any]], Made]] = {
    aten._coalesce.default: _coalesce,
    aten._to_dense.default: _dense,
    aten.add_.Tensor: _add,
    aten.sparse_mask.default: _mask,
    aten._sparse_addmm.default: _product,
}
