"""Attention to a paged cache, prefill and decoding, against a masked softmax in float64 over the same keys, flat.

Unused cells of a table name other blocks, and unused places of the cache hold large numbers: what reads them is wrong.
"""

import numpy as np
import pytest
import torch
from interpreter import interpreted
from torch import Tensor

from groupwise.kernels import dispatch, paged_attention, work_list
from groupwise.kernels.cascade import CascadeDecode
from groupwise.kernels.decode import DecodePlan

BLOCK = 16
# Query heads, key heads, head size.
HEADS = [(1, 1, 16), (7, 1, 24), (10, 2, 32), (12, 6, 16)]
# Groups of rows that share a prompt: tokens of the prompt, and behind it of each row. A prompt of 20 tokens shares one
# block, and the rest of it is each row's own.
GROUPS: dict[str, list[tuple[int, list[int]]]] = {
    "alone": [(0, [1]), (0, [15]), (0, [16]), (0, [17]), (0, [300])],
    "edges": [(0, [255]), (0, [256]), (0, [257]), (0, [511]), (0, [512]), (0, [513])],
    "group": [(64, [1, 1, 40]), (16, [3, 250])],
    "long prompt": [(528, [7, 300, 16, 9, 1]), (0, [30]), (20, [5, 200])],
    "many": [(40, [4, 60, 1, 17, 16, 2, 33, 5, 8, 90, 13])],
    "same": [(48, [0, 0, 0])],
}


class Cache:
    """Rows of ``GROUPS`` in a shuffled pool, and the same keys and values laid out flat."""

    def __init__(self, groups: list[tuple[int, list[int]]], heads: tuple[int, int, int], growth: int = 0) -> None:
        self.query_heads, self.key_heads, self.size = heads
        self.generator = torch.Generator().manual_seed(sum(prompt + sum(rows) for prompt, rows in groups))
        self.lengths = np.array([prompt + own for prompt, rows in groups for own in rows])
        count, width = len(self.lengths), int(-(-(self.lengths.max() + growth) // BLOCK)) + 1
        order = iter(np.random.default_rng(0).permutation(count * width).tolist())
        self.tables = np.random.default_rng(1).integers(0, count * width, (count, width)).astype(np.int32)
        self.caches = [torch.full((count * width, BLOCK, self.key_heads, self.size), 1e3).double() for _ in range(2)]
        self.flat = [self.normal(count, width * BLOCK, self.key_heads) for _ in range(2)]
        row = 0
        for prompt, rows in groups:
            shared = [next(order) for _ in range(prompt // BLOCK)]
            for _ in rows:
                for flat in self.flat:
                    flat[row, :prompt] = flat[row - row % count if row == 0 else self._first(groups, row), :prompt]
                used = -(-(int(self.lengths[row]) + growth) // BLOCK)
                self.tables[row, :used] = shared + [next(order) for _ in range(used - len(shared))]
                self.store(row, 0, int(self.lengths[row]))
                row += 1

    @staticmethod
    def _first(groups: list[tuple[int, list[int]]], row: int) -> int:
        starts = np.cumsum([0, *(len(rows) for _, rows in groups)])
        return int(starts[np.searchsorted(starts, row, side="right") - 1])

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, self.size, generator=self.generator).half().double()

    def store(self, row: int, start: int, stop: int) -> None:
        at = torch.arange(start, stop)
        blocks = torch.from_numpy(self.tables[row]).long()[at // BLOCK]
        for cache, flat in zip(self.caches, self.flat, strict=True):
            cache[blocks, at % BLOCK] = flat[row, start:stop]

    def expected(self, q: Tensor, row: int, first: int) -> Tensor:
        """Queries [n,Hq,D] of a row at positions from ``first`` on, by a mask."""
        stop = first + len(q)
        group = self.query_heads // self.key_heads
        keys, values = (x[row, :stop].repeat_interleave(group, 1) for x in self.flat)
        scores = torch.einsum("ihd,jhd->hij", q, keys) * self.size**-0.5
        unseen = torch.arange(stop) > torch.arange(first, stop)[:, None]
        return torch.einsum("hij,jhd->ihd", scores.masked_fill(unseen, -torch.inf).softmax(2), values)


def near(got: Tensor, true: Tensor, dtype: torch.dtype) -> None:
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    torch.testing.assert_close(got.double().cpu(), true, rtol=tolerance, atol=tolerance)


def check_prefill(name: str, heads: tuple[int, int, int], dtype: torch.dtype, device: str = "cpu") -> None:
    """New tokens behind what is cached, or behind nothing; in chunks cut anywhere they get what they get as a whole."""
    # Tokens cached before, new ones.
    parts = [(0, 5), (0, 33), (15, 1), (16, 40), (7, 0), (290, 3), (100, 64), (40, 1)]
    cache = Cache([(0, [before + new]) for before, new in parts], heads)
    queries = [cache.normal(new, cache.query_heads) for _, new in parts]
    true = torch.cat([cache.expected(q, row, parts[row][0]) for row, q in enumerate(queries)])
    pools = [x.to(device, dtype) for x in cache.caches]
    tables = torch.from_numpy(cache.tables).to(device)

    def run(cuts: list[tuple[int, int]]) -> list[Tensor]:  # of each row, its new tokens from, to
        q = torch.cat([q[a:b] for q, (a, b) in zip(queries, cuts, strict=True)]).to(device, dtype)
        counts = [b - a for a, b in cuts]
        stops = torch.tensor([before + b for (before, _), (_, b) in zip(parts, cuts, strict=True)], device=device)
        bounds = torch.tensor([0, *counts], device=device).cumsum(0).int()
        return list(paged_attention(q, *pools, tables, stops.int(), bounds, max(counts)).split(counts))

    assert dispatch.paged_attention_by(device, dtype, cache.size, BLOCK) == name
    whole = run([(0, new) for _, new in parts])
    near(torch.cat(whole), true, dtype)
    for seed in range(2):
        cuts = np.random.default_rng(seed).integers(0, [new + 1 for _, new in parts])
        halves = zip(
            run([(0, c) for c in cuts]), run([(c, n) for c, (_, n) in zip(cuts, parts, strict=True)]), strict=True
        )
        near(torch.cat([x for pair in halves for x in pair]), true, dtype)


def check_decode(kind: str, groups: str, heads: tuple[int, int, int], dtype: torch.dtype, device: str = "cpu") -> None:
    """A token of each row, in one plan, and while the rows grow within it."""
    growth = 2 * work_list.SPLIT_TOKENS
    cache = Cache(GROUPS[groups], heads, growth)
    count, width = cache.tables.shape
    plan = make_plan(kind, count + 2, width + 3, cache, dtype, device)
    q = cache.normal(count, cache.query_heads)
    steps = [0, 1, 14, 240, growth]
    for step, before in zip(steps, [None, *steps], strict=False):
        lengths = cache.lengths + step
        for row in range(count):
            cache.store(row, int(lengths[row]) - (step - (before or 0)), int(lengths[row]))
        used = -(-int(lengths.max()) // BLOCK)
        if before is not None and isinstance(plan, DecodePlan):
            plan.update(cache.tables[:, :used], lengths)
        else:
            plan.set(cache.tables[:, :used], lengths)
        pools = [x.to(device, dtype) for x in cache.caches]
        true = torch.cat([cache.expected(q[row : row + 1], row, int(lengths[row]) - 1) for row in range(count)])
        out = plan(q.to(device, dtype), *pools)
        near(out, true, dtype)
        assert torch.equal(out, plan(q.to(device, dtype), *pools)), "two runs differ"


def make_plan(
    kind: str, rows: int, blocks: int, cache: Cache, dtype: torch.dtype, device: str = "cpu"
) -> DecodePlan | CascadeDecode:
    where = torch.device(device)
    if kind == "cascade":
        return CascadeDecode(BLOCK, (cache.query_heads, cache.key_heads), cache.size, where)
    return DecodePlan(rows, blocks, BLOCK, (cache.query_heads, cache.key_heads), cache.size, dtype, where)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("heads", HEADS)
def test_prefill_in_triton(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    interpreted(check_prefill, "triton", heads, dtype)


@pytest.mark.parametrize("heads", HEADS)
def test_eager_prefill(heads: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    check_prefill("eager", heads, torch.float64)
    monkeypatch.setattr("groupwise.kernels.eager_attention.GATHER_ELEMENTS", 2000)
    check_prefill("eager", heads, torch.float64)


@pytest.mark.parametrize("heads", HEADS[1:3])
@pytest.mark.parametrize("groups", GROUPS)
def test_decode_in_triton(groups: str, heads: tuple[int, int, int]) -> None:
    interpreted(check_decode, "triton", groups, heads, torch.float32)


@pytest.mark.parametrize("heads", HEADS)
def test_decode_of_other_heads_in_triton(heads: tuple[int, int, int]) -> None:
    interpreted(check_decode, "triton", "group", heads, torch.float16)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("groups", GROUPS)
def test_decode_in_pytorch(groups: str, heads: tuple[int, int, int]) -> None:
    check_decode("cascade", groups, heads, torch.float32)
