"""Attention over packed segments and over a paged cache, against a softmax written out for each query."""

import random
from functools import partial
from typing import Any

import pytest
import torch
from packings import (
    PLAIN,
    SHARED,
    as_index,
    bounds_of,
    by_the_query,
    check_accuracy,
    check_copies,
    check_definition,
    check_isolation,
    make_packing,
    passes,
    served,
    slopes,
)
from torch import Tensor

from groupwise.kernels import dispatch, eager, packed_attention, paged_attention

BLOCK_SIZE = 4
HEADS = [(1, 1), (4, 2), (10, 5)]  # query heads, key/value heads


def paged(k: Tensor, v: Tensor, lengths: list[int], device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Caches with the segments' keys and values in shuffled blocks, other numbers elsewhere, and the block tables."""
    num_blocks = [-(-length // BLOCK_SIZE) for length in lengths]
    order = random.Random(0).sample(range(sum(num_blocks) + 2), sum(num_blocks))
    tables = torch.full((len(lengths), max(num_blocks) + 1), -1, dtype=torch.int32)
    caches = [torch.full((sum(num_blocks) + 2, BLOCK_SIZE, *x.shape[1:]), 1e4, device=device) for x in (k, v)]
    start = 0
    for n, length in enumerate(lengths):
        for i in range(num_blocks[n]):
            tables[n, i] = block = order.pop()
            first, stop = start + i * BLOCK_SIZE, start + min((i + 1) * BLOCK_SIZE, length)
            for cache, x in zip(caches, (k, v), strict=True):
                cache[block, : stop - first] = x[first:stop].detach()
        start += length
    return caches[0], caches[1], tables.to(device)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("lengths", "prefix"), PLAIN + SHARED)
def test_packed_by_its_definition(lengths: list[int], prefix: list[int] | None, heads: tuple[int, int]) -> None:
    check_definition("sdpa", lengths, prefix, heads, 8)


@pytest.mark.parametrize(("lengths", "prefix"), PLAIN + SHARED)
def test_the_mask_by_its_definition(lengths: list[int], prefix: list[int] | None) -> None:
    tensors = make_packing(lengths, (4, 2))
    mask = partial(eager.masked_attention, cu_seqlens=bounds_of(lengths), prefix=as_index(prefix))
    loop = partial(by_the_query, lengths=lengths, prefix=prefix)
    for got, true in zip(*(passes(form, tensors, slopes(tensors[0])) for form in (mask, loop)), strict=True):
        torch.testing.assert_close(got, true, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("lengths", "prefix"), [SHARED[0], ([70, 150, 90], None), ([70, 150, 90], [-1, 0, 0])])
def test_packed_accuracy(lengths: list[int], prefix: list[int] | None, dtype: torch.dtype) -> None:
    check_accuracy("sdpa", lengths, prefix, (4, 2), 16, dtype)


@pytest.mark.parametrize(("lengths", "prefix"), SHARED)
def test_a_shared_prefix_equals_its_copies(lengths: list[int], prefix: list[int]) -> None:
    check_copies("sdpa", lengths, prefix, (4, 2), 8)


@pytest.mark.parametrize(("lengths", "prefix"), [SHARED[0], ([9, 30, 4], None)])
def test_packed_segments_do_not_see_each_other(lengths: list[int], prefix: list[int] | None) -> None:
    check_isolation("sdpa", lengths, prefix, 8)


@pytest.mark.parametrize(("lengths", "prefix"), [([2, 1, 3], None), ([2, 1, 0, 3], [-1, 0, 0, -1])])
def test_packed_gradients_by_finite_differences(lengths: list[int], prefix: list[int] | None) -> None:
    tensors = make_packing(lengths, (2, 1), 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(served("sdpa", lengths, prefix, tensors), tensors)


@pytest.mark.parametrize(("lengths", "prefix"), [([], None), ([0, 0], [-1, 0])])
def test_no_tokens(lengths: list[int], prefix: list[int] | None) -> None:
    tensors = make_packing(lengths, (4, 2))
    out, *gradients = passes(served("sdpa", lengths, prefix, tensors), tensors, slopes(tensors[0]))
    assert out.shape == (0, 4, 8)
    assert [x.shape for x in gradients] == [x.shape for x in tensors]


def check_paged(lengths: list[int], new: list[int], heads: tuple[int, int], device: str = "cpu") -> None:
    """The last ``new`` tokens of each segment, attending to a cache, equal the same rows of the packed form."""
    q, k, v = make_packing(lengths, heads, device=device)
    bounds = bounds_of(lengths)
    expected = packed_attention(q, k, v, bounds.to(device), max(lengths))
    rows = torch.cat([torch.arange(stop - n, stop) for stop, n in zip(bounds[1:].tolist(), new, strict=True)])
    k_cache, v_cache, tables = paged(k, v, lengths, device)
    out = paged_attention(
        q[rows], k_cache, v_cache, tables, torch.tensor(lengths, device=device).int(),
        torch.tensor([0, *new], device=device).cumsum(0).int(), max(new),
    )  # fmt: skip
    assert not out.requires_grad
    torch.testing.assert_close(out, expected[rows].detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(
    "new",
    [[1] * 7, [40, 1, 7, 3, 23, 8, 2], [33, 1, 1, 2, 1, 8, 2], [0, 1, 0, 3, 2, 0, 0]],
    ids=["decode", "prefill", "mixed", "some idle"],
)
def test_paged_equals_packed(new: list[int], heads: tuple[int, int]) -> None:
    check_paged([40, 1, 7, 3, 23, 8, 2], new, heads)


def test_paged_decode_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("groupwise.kernels.eager_attention.GATHER_ELEMENTS", 200)
    monkeypatch.setattr("groupwise.kernels.eager_attention.SCORE_ELEMENTS", 100)
    lengths = random.Random(1).choices(range(1, 50), k=30)
    check_paged(lengths, [1] * 30, (4, 2))
    check_paged(lengths, lengths, (4, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(6, 3, 8)}, "Hkv dividing Hq"),
        ({"q": torch.zeros(6, 4, 9)}, "differ in tokens or head size"),
        ({"k": torch.zeros(6, 2, 8, dtype=torch.float16)}, "one floating-point dtype"),
        ({"cu_seqlens": torch.tensor([0, 6])}, "int32"),
        ({"v": torch.zeros(5, 2, 8)}, "shapes"),
        ({"prefix": torch.tensor([-1])}, "prefix is a 1-dimensional torch.int64 tensor"),
        ({"prefix": torch.tensor([[-1]], dtype=torch.int32)}, "expected 1 dimensions of int32"),
        ({"prefix": torch.tensor([-1], dtype=torch.int32, device="meta")}, "on meta; expected 1 dimensions"),
        ({"prefix": torch.tensor([-1, 0], dtype=torch.int32)}, "2 entries for 1 segments"),
    ],
)
def test_packed_errors(change: dict[str, Any], message: str) -> None:
    q, k, v = make_packing([6], (4, 2))
    arguments: dict[str, Any] = {"q": q, "k": k, "v": v, "cu_seqlens": bounds_of([6]), "max_seqlen": 6}
    with pytest.raises(ValueError, match=message):
        packed_attention(**(arguments | change))


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ([0, -1, -1, -1], r"prefix\[0\] is 0; expected -1,"),
        ([-1, 2, -1, -1], r"prefix\[1\] is 2; expected 0 or -1"),
        ([-1, 0, 1, -1], r"prefix\[2\] is 1; expected 0 or -1"),
        ([-1, -1, -1, 0], r"prefix\[3\] is 0; expected 2 or -1"),
        ([-1, 0, -2, -1], r"prefix\[2\] is -2"),
    ],
)
def test_a_prefix_stands_before_those_that_see_it(prefix: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        packed_attention(*make_packing([2, 2, 2, 2], (4, 2)), bounds_of([2, 2, 2, 2]), 2, as_index(prefix))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k_cache": torch.zeros(3, 4, 2, 9), "v_cache": torch.zeros(3, 4, 2, 9)}, "with D 8"),
        ({"v_cache": torch.zeros(3, 2, 4, 8).transpose(1, 2)}, "not contiguous"),
        ({"block_tables": torch.zeros(1, 2)}, "int32"),
        ({"context_lens": torch.ones(2, dtype=torch.int32)}, "N, N and N"),
    ],
)
def test_paged_errors(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "q": torch.zeros(1, 4, 8),
        "k_cache": torch.zeros(3, 4, 2, 8),
        "v_cache": torch.zeros(3, 4, 2, 8),
        "block_tables": torch.zeros(1, 2, dtype=torch.int32),
        "context_lens": torch.ones(1, dtype=torch.int32),
        "cu_seqlens_q": torch.tensor([0, 1], dtype=torch.int32),
        "max_seqlen_q": 1,
    }
    paged_attention(**arguments)
    with pytest.raises(ValueError, match=message):
        paged_attention(**(arguments | change))


@pytest.mark.gpu
@pytest.mark.parametrize("name", dispatch.IMPLEMENTATIONS["packed_attention"])
@pytest.mark.parametrize(("heads", "size"), [((12, 2), 128), ((7, 1), 64), ((2, 2), 256), ((4, 2), 72)])
def test_packed_on_the_gpu(name: str, heads: tuple[int, int], size: int) -> None:
    if name not in dispatch.available("cuda", "packed_attention"):
        pytest.skip(f"{name} is not available")
    dispatch.force("packed_attention", name, "cuda")
    try:
        for lengths in ([1, 127, 300, 0, 65], [513]):
            for dtype in (torch.bfloat16, torch.float16):
                check_accuracy(name, lengths, None, heads, size, dtype, "cuda", repeatable=name == "triton")
    finally:
        dispatch.force("packed_attention", "auto", "cuda")


@pytest.mark.gpu
def test_paged_on_the_gpu() -> None:
    lengths = [40, 1, 7, 3, 23, 8, 2]
    check_paged(lengths, [33, 1, 1, 2, 1, 8, 2], (4, 2), "cuda")
    check_paged(lengths, [1] * 7, (4, 2), "cuda")
