"""What CUDA kernels allocate for themselves, and the libraries' workspaces; nothing of it shows on `meta`.

Each function takes the operation's arguments and its output and returns the sizes in bytes of the
blocks that are alive together, next to the output, while the kernel runs. Not modelled: what a reduction
over several thread blocks shares (Reduce.cuh), the tile states of a scan (ScanUtils.cuh), the pointers of a
grouped product (GroupMM.cu). Scatter, gather, nll_loss and top-k of up to 256 numbers a row take nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from planner.sorting import index_put_bytes, radix_sort_bytes

__all__ = ["PRODUCTS", "SCRATCH", "Workspaces", "takes_cublaslt"]

aten = torch.ops.aten

CUBLAS_WORKSPACE_BYTES = 4096 * 1024 * 2 + 16 * 1024 * 8  # CublasHandlePool.cpp: :4096:2:16:8
CUBLAS_WORKSPACE_HOPPER_BYTES = 4096 * 8 * 1024  # CublasHandlePool.cpp: capability 9.0 only
CUBLASLT_WORKSPACE_BYTES = 1024 * 1024  # CublasHandlePool.cpp: parseCUDABlasLtWorkspaceSize

PRODUCTS = frozenset(
    {
        aten.mm.default,
        aten.mm.out,
        aten.bmm.default,
        aten.addmm.default,
        aten.baddbmm.default,
        aten.mv.default,
        aten.dot.default,
        aten.addmv.default,
        aten._grouped_mm.default,
    }
)
_LT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def takes_cublaslt(func: Any, args: Sequence[Any]) -> bool:
    """Whether `addmm` fuses its bias through cublasLt (aten/src/ATen/native/cuda/Blas.cpp).

    A one-dimensional contiguous bias as long as the output is wide, matrices of more than one row and
    column.
    """
    if func is not aten.addmm.default:
        return False
    bias, left, right = args[0], args[1], args[2]
    return bool(
        bias.dim() == 1
        and bias.size(0) == right.size(1)
        and bias.is_contiguous()
        and left.size(0) > 1
        and left.size(1) > 1
        and right.size(1) > 1
        and left.dtype in _LT_DTYPES
    )


@dataclass
class Workspaces:
    """Which workspaces each thread has taken so far: cuBLAS and cublasLt keep one a thread."""

    capability: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """No thread has multiplied yet."""
        self._taken: set[tuple[str, str]] = set()

    @property
    def cublas_bytes(self) -> int:
        """cuBLAS's workspace for the device's capability."""
        return CUBLAS_WORKSPACE_HOPPER_BYTES if self.capability == (9, 0) else CUBLAS_WORKSPACE_BYTES

    def taken_by(self, func: Any, args: Sequence[Any], *, thread: str) -> list[int]:
        """Sizes of the workspaces that this product is the first in its thread to need."""
        wanted = [("cublas", self.cublas_bytes)]
        if takes_cublaslt(func, args):
            wanted.append(("cublasLt", CUBLASLT_WORKSPACE_BYTES))
        new = [(name, size) for name, size in wanted if (name, thread) not in self._taken]
        self._taken.update((name, thread) for name, _ in new)
        return [size for _, size in new]


def _numel_bytes(shape: Sequence[int], item_bytes: int) -> int:
    return math.prod(shape) * item_bytes


def _rounded(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def softmax_backward(args: Sequence[Any], out: Any) -> list[int]:
    """SoftMax.cu, softmax_backward_cuda_out: the product grad * output, as large as the gradient."""
    grad = args[0]
    return [grad.numel() * grad.element_size()]


def flash_backward(args: Sequence[Any], out: Any) -> list[int]:
    """flash_api.cpp, mha_bwd: row sums, dQ in fp32, and dK and dV of all heads where heads are grouped.

    q, k, v are `[b, heads, s, d]`; rows round up to 128, the head to 32, above 128 to 64. Gradient and output
    are copied first where they do not lie as `[b, s, heads, d]` (attention_backward.cu).
    """
    query, key = args[1], args[2]
    batch, heads, rows, head = query.shape
    rows_rounded = _rounded(rows, 128)
    sizes = [
        *_copied(args[0].transpose(1, 2), args[4].transpose(1, 2)),
        _numel_bytes((batch, heads, rows_rounded), 4),
        _numel_bytes((batch, rows_rounded, heads, _flash_width(head)), 4),
    ]
    if key.shape[1] != heads:
        expanded = _numel_bytes((batch, key.shape[2], heads, head), key.element_size())
        sizes += [expanded, expanded]
    return sizes


def varlen_flash_backward(args: Sequence[Any], out: Any) -> list[int]:
    """flash_api.cpp, mha_varlen_bwd, of samples in a row `[T, heads, d]`; as `flash_backward` but for rows.

    Each sample's rows lie 128 apart from the next one's.
    """
    query, key, samples = args[1], args[2], args[6].numel() - 1
    tokens, heads, head = query.shape
    rows = tokens + 128 * samples
    copied = _copied(args[0], args[4])
    sums = [_numel_bytes((heads, rows), 4), _numel_bytes((rows, heads, _flash_width(head)), 4)]
    if key.shape[1] == heads:
        return [*copied, *sums]
    return [*copied, *sums, *[_numel_bytes((key.shape[0], heads, head), key.element_size())] * 2]


def _copied(*tensors: torch.Tensor) -> list[int]:
    """attention_backward.cu, _flash_attention_backward: `contiguous()` of gradient and output."""
    return [t.numel() * t.element_size() for t in tensors if not t.is_contiguous()]


def _flash_width(head: int) -> int:
    return _rounded(head, 32 if head <= 128 else 64)


def cudnn_backward(args: Sequence[Any], out: Any) -> list[int]:
    """cudnn-frontend, CompositeSDPABackwardNode, cuDNN 9: fp32 sums `[b, heads, s]`, dQ `[b, heads, s, d]`.

    MHA.cpp takes both as one block. What the engine itself asks for on top is not published.
    """
    batch, heads, rows, head = args[1].shape
    sums, queries = _numel_bytes((batch, heads, rows), 4), _numel_bytes((batch, heads, rows, head), 4)
    return [_rounded(sums, 16) + _rounded(queries, 16)]


def efficient_backward(args: Sequence[Any], out: Any) -> list[int]:
    """attention_backward.cu and kernel_backward.h: delta `[b, heads, s]` in fp32, dQ's accumulators.

    A 16-bit kernel computes delta itself; the fp32 path multiplies grad and output first. The kernel
    with 64 x 64 tiles serves heads up to 64 (cutlassB.h), larger heads take 128 rows.
    """
    grad_out, query = args[0], args[1]
    batch, heads, rows, head = query.shape
    tile = 64 if head <= 64 else 128
    delta = _numel_bytes((batch, heads, rows), 4)
    accumulators = -(-rows // tile) * -(-head // tile) * (16 + 4 * tile * tile)
    workspace = batch * heads * accumulators
    if query.dtype == torch.float32:
        return [grad_out.numel() * 4, delta, workspace]
    return [delta, workspace]


def embedding_backward(args: Sequence[Any], out: Any) -> list[int]:
    """Embedding.cu and EmbeddingBackwardKernel.cu: above 3,072 indices they are sorted and summed by row.

    Of n indices into v rows of h numbers at most min(n, v) rows are hit; each has one partial sum for every
    10 indices (NROWS_PER_THREAD), kept in fp32. The sort itself needs less and is over by then.
    """
    grad, indices, rows = args[0], args[1], args[2]
    count = indices.numel()
    if count <= 3072 and not args[4]:  # embedding_backward_feature_kernel adds in place
        return []
    width = indices.element_size()
    hit = min(count, rows)
    partial = count // 10 + hit
    partial_sum_bytes = max(4, grad.element_size()) * grad.shape[-1]
    by_index = [count * width] * (4 if args[4] else 3)  # sorted, original, where a row begins; their counts
    return [*by_index, 8, hit * width, hit * width, 8, partial * width, partial * partial_sum_bytes]


def index_put(args: Sequence[Any], out: Any) -> list[int]:
    """What adding takes, and `values` where it is not contiguous. Without `accumulate` nothing is sorted."""
    accumulates = len(args) > 3 and args[3]
    shapes = [index.shape for index in args[1] if index is not None]
    if not accumulates or not shapes:
        return []
    count = math.prod(torch.broadcast_shapes(*shapes))
    values = args[2]
    copied = [] if values.is_contiguous() else [values.numel() * values.element_size()]
    return [*copied, *index_put_bytes(count)]


def sort(args: Sequence[Any], out: Any) -> list[int]:
    """Sort.cpp and SortStable.cu: up to 4,096 numbers are sorted in place; a longer row takes more.

    For the one row that is sorted here: its places (int64) and the sort's own block.
    """
    given = args[0]
    if not given.dim() or given.shape[-1] <= 4096 or given.numel() != given.shape[-1]:
        return []
    return [given.numel() * 8, radix_sort_bytes(given.numel(), given.element_size())]


SCRATCH: dict[Any, Callable[[Sequence[Any], Any], list[int]]] = {
    aten._softmax_backward_data.default: softmax_backward,
    aten._scaled_dot_product_flash_attention_backward.default: flash_backward,
    aten._flash_attention_backward.default: varlen_flash_backward,
    aten._scaled_dot_product_efficient_attention_backward.default: efficient_backward,
    aten._scaled_dot_product_cudnn_attention_backward.default: cudnn_backward,
    aten.embedding_dense_backward.default: embedding_backward,
    aten.index_put_.default: index_put,
    aten.index_put.default: index_put,
    aten._index_put_impl_.default: index_put,
    aten.sort.default: sort,
    aten.sort.stable: sort,
}
