"""Packed attention in Triton: in the interpreter on a CPU, compiled on a GPU."""

import pytest
import torch
from interpreter import interpreted
from packings import PLAIN, SHARED, check_accuracy, check_copies, check_definition, check_isolation, make_packing

from groupwise.kernels import segments

LENGTHS, PREFIX = SHARED[0]


@pytest.mark.parametrize(("lengths", "prefix"), [*PLAIN[2:], *SHARED])
def test_by_its_definition(lengths: list[int], prefix: list[int] | None) -> None:
    interpreted(check_definition, "triton", lengths, prefix, (2, 1) if len(lengths) < 10 else (1, 1), 8)


@pytest.mark.parametrize(
    ("lengths", "prefix", "heads", "size", "dtype"),
    [
        (LENGTHS, PREFIX, (1, 1), 16, torch.float32),
        pytest.param(LENGTHS, PREFIX, (2, 1), 20, torch.float16, marks=pytest.mark.slow),
        ([33, 1, 50], None, (3, 1), 64, torch.float16),
    ],
)
def test_accuracy(
    lengths: list[int], prefix: list[int] | None, heads: tuple[int, int], size: int, dtype: torch.dtype
) -> None:
    interpreted(check_accuracy, "triton", lengths, prefix, heads, size, dtype)


def check_tiles(rows: int, columns: int) -> None:
    usual, segments.INTERPRETER_TILES = segments.INTERPRETER_TILES, segments.Tiles(rows, columns, 4, 1)
    try:
        check_accuracy("triton", LENGTHS, PREFIX, (2, 1), 8, torch.float32)
    finally:
        segments.INTERPRETER_TILES = usual


def test_tiles_of_more_columns_than_rows() -> None:
    interpreted(check_tiles, 16, 64)


def test_a_shared_prefix_equals_its_copies() -> None:
    interpreted(check_copies, "triton", LENGTHS, PREFIX, (2, 1), 8)


def test_segments_do_not_see_each_other() -> None:
    interpreted(check_isolation, "triton", [3, 2, 18, 4, 5], [-1, 0, 0, -1, 3], 8)


def check_no_tokens() -> None:
    for lengths in ([], [0, 0]):
        q, k, v = make_packing(lengths, (4, 2))
        bounds = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        out = segments.SegmentAttention.apply(q, k, v, bounds, 0, None)
        assert [x.shape for x in torch.autograd.grad(out, (q, k, v), out.detach())] == [q.shape, k.shape, v.shape]


def test_no_tokens() -> None:
    interpreted(check_no_tokens)


def test_too_many_elements() -> None:
    q = torch.empty(1, device="meta").expand(1 << 20, 16, 128)
    with pytest.raises(ValueError, match="2147483648 elements"):
        segments.SegmentAttention.apply(q, q, q, torch.tensor([0, 1 << 20], dtype=torch.int32), 1 << 20, None)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("heads", "size"), [((4, 2), 16), ((3, 1), 20), ((12, 2), 64), ((4, 2), 80), ((12, 2), 128), ((2, 1), 256)]
)
def test_on_the_gpu(heads: tuple[int, int], size: int, dtype: torch.dtype) -> None:
    lengths = [300, 1, 129, 0, 513, 64, 257, 10, 5, 130]
    for prefix in ([-1] * 10, [-1, 0, 0, 0, -1, -1, 5, -1, 7, 7]):
        check_accuracy("triton", lengths, prefix, heads, size, dtype, "cuda")
    check_isolation("triton", lengths, prefix, size, "cuda")


@pytest.mark.gpu
def test_copies_on_the_gpu() -> None:
    check_copies("triton", [300, 1, 129, 0, 513], [-1, 0, 0, 0, -1], (12, 2), 128, "cuda")
