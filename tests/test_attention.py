"""Attention over packed segments and over a paged cache, against a softmax written out for each query."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from groupwise.kernels import packed_attention, paged_attention

BLOCK_SIZE = 4
HEADS = [(1, 1), (4, 2), (10, 5)]  # query heads, key/value heads
LENGTHS = [[1], [5, 5, 5], [40, 1, 7, 3, 23, 8, 2], [3, 0, 60, 0]]


def make_heads(lengths: list[int], heads: tuple[int, int], size: int = 8, device: str = "cpu") -> list[Tensor]:
    """q, k, v and the bounds of the segments."""
    generator = torch.Generator().manual_seed(sum(lengths))
    shapes = [(sum(lengths), count, size) for count in (heads[0], heads[1], heads[1])]
    tensors = [torch.randn(shape, generator=generator).mul(1.5).to(device).requires_grad_() for shape in shapes]
    return [*tensors, torch.tensor([0, *lengths], device=device).cumsum(0).int()]


def by_the_query(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """Each query's softmax over the keys of its own segment up to itself, one head after the other."""
    rows = []
    start = 0
    for length in lengths:
        for i in range(length):
            for head in range(q.shape[1]):
                kv_head = head * k.shape[1] // q.shape[1]
                keys, values = (x[start : start + i + 1, kv_head] for x in (k, v))
                rows.append((keys @ q[start + i, head] / q.shape[2] ** 0.5).softmax(0) @ values)
        start += length
    return torch.stack(rows).view_as(q)


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
@pytest.mark.parametrize("lengths", LENGTHS)
def test_packed_values_and_gradients(lengths: list[int], heads: tuple[int, int]) -> None:
    q, k, v, bounds = make_heads(lengths, heads)
    out = packed_attention(q, k, v, bounds, max(lengths))
    expected = by_the_query(q, k, v, lengths)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    d_out = torch.randn(out.shape)
    for got, true in zip(
        torch.autograd.grad(out, (q, k, v), d_out), torch.autograd.grad(expected, (q, k, v), d_out), strict=True
    ):
        torch.testing.assert_close(got, true, rtol=1e-4, atol=1e-5)


def test_packed_segments_do_not_see_each_other() -> None:
    lengths = [9, 30, 4]
    q, k, v, bounds = make_heads(lengths, (4, 2))
    out = packed_attention(q, k, v, bounds, 30)
    changed = [x.detach().clone() for x in (q, k, v)]
    for x in changed:
        x[9:39] = float("nan")
    again = packed_attention(*changed, bounds, 30)
    assert torch.equal(again[:9], out[:9])
    assert torch.equal(again[39:], out[39:])


def test_packed_gradients_by_finite_differences() -> None:
    q, k, v, bounds = (x.detach().double() if x.is_floating_point() else x for x in make_heads([3, 1, 30], (2, 1), 3))
    q, k, v = (x[:6].requires_grad_() for x in (q, k, v))
    bounds = torch.tensor([0, 2, 3, 6], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda *x: packed_attention(*x, bounds, 3), (q, k, v))


def check_paged(lengths: list[int], new: list[int], heads: tuple[int, int], device: str = "cpu") -> None:
    """The last ``new`` tokens of each segment, attending to a cache, equal the same rows of the packed form."""
    q, k, v, bounds = make_heads(lengths, heads, device=device)
    expected = packed_attention(q, k, v, bounds, max(lengths))
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
    ],
)
def test_packed_errors(change: dict[str, Any], message: str) -> None:
    q, k, v, bounds = make_heads([6], (4, 2))
    arguments: dict[str, Any] = {"q": q, "k": k, "v": v, "cu_seqlens": bounds, "max_seqlen": 6}
    with pytest.raises(ValueError, match=message):
        packed_attention(**(arguments | change))


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
def test_attention_on_the_gpu() -> None:
    lengths = [40, 1, 7, 3, 23, 8, 2]
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
        q, k, v, bounds = make_heads(lengths, (4, 2), 64, "cuda")
        halves = [x.detach().to(dtype) for x in (q, k, v)]
        out = packed_attention(*halves, bounds, 40)
        expected = by_the_query(*(x.double() for x in halves), lengths)
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    check_paged(lengths, [33, 1, 1, 2, 1, 8, 2], (4, 2), "cuda")
    check_paged(lengths, [1] * 7, (4, 2), "cuda")
