"""What kernels and libraries take for themselves: by hand, from the sources that the kernels' model names."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from planner.simulate.kernels import flash_backward
from planner.sorting import radix_sort_bytes
from planner.units import MIB
from tests.simulate.watched import meta, watched

CUBLAS = 4096 * 1024 * 2 + 16 * 1024 * 8  # CublasHandlePool.cpp, parseChosenWorkspaceSize: :4096:2:16:8
HOPPER = 4096 * 8 * 1024
CUBLASLT = MIB


def workspaces(bias: bool, gpu: str | None = None, rows: int = 8) -> list[int]:
    """What is taken beyond the products' own results, in order."""
    weight, shift = meta(64, 64, grad=True), meta(64, grad=True)
    x = meta(rows, 64, grad=True)

    def run() -> torch.Tensor:
        out = F.linear(x, weight, shift if bias else None)
        return F.linear(out, weight, shift if bias else None).sum()

    sizes = [each.size_bytes for each in watched(run, gpu=gpu, backward=True).taken]
    return [size for size in sizes if size >= 512 * 1024]


@pytest.mark.parametrize("gpu", [None, "t4", "a100-40gb", "rtx-4090", "b200"])
def test_each_thread_takes_cublas_workspace_once(gpu: str | None) -> None:
    assert workspaces(False, gpu) == [CUBLAS, CUBLAS]  # the forward thread and autograd's


@pytest.mark.parametrize("gpu", ["h100", "h200"])
def test_hopper_takes_thirty_two_mebibytes(gpu: str) -> None:
    assert workspaces(False, gpu) == [HOPPER, HOPPER]


def test_a_bias_takes_cublaslt_in_the_forward_thread_alone() -> None:
    assert workspaces(True) == [CUBLAS, CUBLASLT, CUBLAS]  # gradients of a linear layer are plain products
    assert workspaces(True, rows=1) == [CUBLAS, CUBLAS]  # Blas.cpp: more than one row


def test_a_workspace_is_taken_after_the_result() -> None:
    x, y = meta(8, 64), meta(64, 8)
    assert [each.size_bytes for each in watched(lambda: x @ y).taken] == [8 * 8 * 4, CUBLAS]


def test_no_product_takes_no_workspace() -> None:
    x = meta(8, 64)
    assert not [each for each in watched(lambda: x * 2 + x).taken if each.size_bytes > 8 * 64 * 4]


def test_softmax_backward_hides_a_product_as_large_as_the_gradient() -> None:
    x = meta(64, 1024, grad=True)
    size = 64 * 1024 * 4
    soft = watched(lambda: x.softmax(-1).sum(), backward=True)
    assert soft.by("_softmax_backward_data.default") == [size, size]  # SoftMax.cu: grad_input, grad * output
    log = watched(lambda: x.log_softmax(-1).sum(), backward=True)
    assert log.by("_log_softmax_backward_data.default") == [size]
    # alive at that moment: output, grad (one number, expanded), grad_input, the product
    assert soft.peak_bytes - log.peak_bytes == size


def embedding(count: int, rows: int = 1000, dtype: torch.dtype = torch.float32) -> list[int]:
    table = meta(rows, 64, dtype=dtype, grad=True)
    indices = meta(count, dtype=torch.int64)
    seen = watched(lambda: F.embedding(indices, table).sum(), backward=True)
    return seen.by("embedding_dense_backward.default")


def test_a_few_indices_are_added_in_place() -> None:
    assert embedding(3072) == [1000 * 64 * 4]  # Embedding.cu: num_indices <= 3072


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1000, 100_000])
def test_many_indices_are_sorted_and_summed_by_row(dtype: torch.dtype, rows: int) -> None:
    count, hit = 4000, min(4000, rows)
    partial = count // 10 + hit  # EmbeddingBackwardKernel.cu: NROWS_PER_THREAD
    gradient = rows * 64 * dtype.itemsize
    sizes = embedding(count, rows, dtype)
    assert sizes[0] == gradient
    assert sorted(sizes[1:]) == sorted(
        [*[count * 8] * 3, *[hit * 8] * 2, partial * 8, 8, 8, partial * 64 * 4]  # the partial sums in fp32
    )


def test_adding_at_indices_sorts_them_and_writing_does_not() -> None:
    values, indices = meta(5000, 64), meta(5000, dtype=torch.int64)
    sorting = [5000 * 8] * 4 + [radix_sort_bytes(5000, 8)]
    for accumulate in (True, False):
        seen = watched(lambda a=accumulate: meta(100, 64).index_put_((indices,), values, accumulate=a))
        assert seen.by("index_put_.default") == (sorting if accumulate else [])


def test_the_gradient_of_indexing_adds_at_indices() -> None:
    source, indices = meta(100, 64, grad=True), meta(2, 2500, dtype=torch.int64)
    seen = watched(lambda: source[indices].sum(), backward=True)
    assert seen.by("new_zeros.default") == [100 * 64 * 4]
    spread = [5000 * 64 * 4]  # the sum's gradient is one number: spread out before it is added
    assert seen.by("index_put.default") == spread + [5000 * 8] * 4 + [radix_sort_bytes(5000, 8)]


def test_a_short_row_is_sorted_in_place_and_a_long_one_is_not() -> None:
    short, long = meta(4096, dtype=torch.int64), meta(4097, dtype=torch.int64)
    assert watched(lambda: short.sort()).by("sort.default") == [4096 * 8] * 2
    seen = watched(lambda: long.sort(stable=True)).by("sort.stable")
    assert seen == [4097 * 8] * 2 + [4097 * 8, radix_sort_bytes(4097, 8)]


def test_a_radix_sort_has_a_second_pair_of_arrays_and_little_more() -> None:
    assert radix_sort_bytes(2304, 8) == 1  # one tile
    assert 0 < radix_sort_bytes(100_000, 8) - 100_000 * 16 < 0.05 * 100_000 * 16
    assert 0 < radix_sort_bytes(100_000, 4) - 100_000 * 12 < 0.05 * 100_000 * 12


@pytest.mark.parametrize(
    ("head", "width"), [(64, 64), (80, 96), (128, 128), (136, 192), (160, 192), (200, 256)]
)
def test_flash_sums_the_queries_gradient_over_rounded_heads(head: int, width: int) -> None:
    """flash_api.cpp, mha_bwd: head_size_rounded is a multiple of 32, above 128 of 64."""
    query = torch.empty(2, 100, 4, head, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    sizes = flash_backward((query, query, query, query, query), None)
    assert sizes == [4 * 2 * 4 * 128, 4 * 2 * 128 * 4 * width]


def test_flash_copies_an_output_that_lies_by_heads() -> None:
    """attention_backward.cu, _flash_attention_backward: the kernel takes [b, s, heads, d] as it lies."""
    by_token = torch.empty(2, 128, 4, 64, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    by_head = torch.empty(2, 4, 128, 64, dtype=torch.bfloat16, device="meta")
    plain = flash_backward((by_token, by_token, by_token, by_token, by_token), None)
    copied = flash_backward((by_token, by_head, by_head, by_head, by_head), None)
    assert copied == [2 * by_head.numel(), *plain]
