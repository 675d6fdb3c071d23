"""Attention to a paged cache, prefill and decoding, against a mask in float64 over the same keys laid out flat.

Unused cells of a table name other blocks, and unused places of the cache hold large numbers: what reads them is wrong.
"""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from interpreter import interpreted
from numpy.typing import NDArray
from torch import Tensor

from groupwise.kernels import dispatch, paged_attention, work_list
from groupwise.kernels.cascade import CascadeDecode
from groupwise.kernels.decode import DecodePlan

BLOCK = 16
# Query heads, key heads, head size.
HEADS = [(1, 1, 16), (7, 1, 24), (10, 2, 32), (5, 5, 16)]
# Groups of rows that share a prompt: tokens of the prompt, and behind it of each row. A prompt of 20 tokens shares one
# block, and the rest of it is each row's own.
GROUPS: dict[str, list[tuple[int, list[int]]]] = {
    "alone": [(0, [1]), (0, [15]), (0, [16]), (0, [17]), (0, [300])],
    "edges": [(0, [255]), (0, [256]), (0, [257]), (0, [511]), (0, [512]), (0, [513])],
    "group": [(64, [1, 1, 40]), (16, [3, 250])],
    "long prompt": [(528, [7, 300, 1]), (0, [30]), (20, [5, 200])],
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
            first, shared = row, [next(order) for _ in range(prompt // BLOCK)]
            for _ in rows:
                for flat in self.flat:
                    flat[row, :prompt] = flat[first, :prompt]
                used = -(-(int(self.lengths[row]) + growth) // BLOCK)
                self.tables[row, :used] = shared + [next(order) for _ in range(used - len(shared))]
                self.store(row, 0, int(self.lengths[row]))
                row += 1

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, self.size, generator=self.generator).bfloat16().double()

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
    steps = [0, 240, growth]
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
        near(plan(q.to(device, dtype), *pools), true, dtype)


def make_plan(
    kind: str, rows: int, blocks: int, cache: Cache, dtype: torch.dtype, device: str = "cpu"
) -> DecodePlan | CascadeDecode:
    where = torch.device(device)
    if kind == "cascade":
        return CascadeDecode(BLOCK, (cache.query_heads, cache.key_heads), cache.size, where)
    return DecodePlan(rows, blocks, BLOCK, (cache.query_heads, cache.key_heads), cache.size, dtype, where)


@pytest.mark.parametrize(
    ("heads", "dtype"),
    [
        (HEADS[0], torch.float32),
        (HEADS[2], torch.float32),
        (HEADS[1], torch.float16),
        *(pytest.param(HEADS[i], torch.float32, marks=pytest.mark.slow) for i in (1, 3)),
    ],
)
def test_prefill_in_triton(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    interpreted(check_prefill, "triton", heads, dtype)


@pytest.mark.parametrize("heads", HEADS)
def test_eager_prefill(heads: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    check_prefill("eager", heads, torch.float64)
    monkeypatch.setattr("groupwise.kernels.eager_attention.GATHER_ELEMENTS", 2000)
    check_prefill("eager", heads, torch.float64)


CASES = [
    *((groups, HEADS[1], torch.float32) for groups in GROUPS),
    ("group", HEADS[2], torch.float16),
    *(pytest.param("group", HEADS[i], torch.float16, marks=pytest.mark.slow) for i in (0, 1, 3)),
]


@pytest.mark.parametrize(("groups", "heads", "dtype"), CASES)
def test_decode_in_triton(groups: str, heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    interpreted(check_decode, "triton", groups, heads, dtype)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("groups", GROUPS)
def test_decode_in_pytorch(groups: str, heads: tuple[int, int, int]) -> None:
    check_decode("cascade", groups, heads, torch.float32)


def check_a_standing_plan(device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
    """What a graph does: rows that grow on the device alone, and a batch with rows to spare, which get zeros."""
    cache = Cache(GROUPS["group"], HEADS[1], 300)
    count, width = cache.tables.shape
    plan = make_plan("triton", count + 3, width, cache, dtype, device)
    assert isinstance(plan, DecodePlan)
    plan.set(cache.tables, cache.lengths)
    q = cache.normal(count + 3, cache.query_heads)
    for grown in (0, 100, work_list.SPLIT_TOKENS - 100):
        plan.context_lens[:count] += grown
        for row in range(count):
            cache.store(row, int(cache.lengths[row]), int(cache.lengths[row]) + grown)
        cache.lengths += grown
        assert plan.covers(cache.lengths)
        out = plan(q.to(device, dtype), *(x.to(device, dtype) for x in cache.caches))
        true = [cache.expected(q[row : row + 1], row, int(cache.lengths[row]) - 1) for row in range(count)]
        near(out[:count], torch.cat(true), dtype)
        assert not out[count:].any()
    again = plan(q.to(device, dtype), *(x.to(device, dtype) for x in cache.caches))
    assert torch.equal(out, again), "two runs differ"


def test_a_plan_stands_while_rows_grow() -> None:
    interpreted(check_a_standing_plan)


def check_company(device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
    """A row gets the same bits alone as beside rows with which it shares nothing."""
    cache = Cache([*GROUPS["alone"], *GROUPS["edges"][:3]], HEADS[1])
    count, width = cache.tables.shape
    q = cache.normal(count, cache.query_heads).to(device, dtype)
    pools = [x.to(device, dtype) for x in cache.caches]
    plan = make_plan("triton", count, width, cache, dtype, device)
    plan.set(cache.tables, cache.lengths)
    together = plan(q, *pools)
    for row in range(count):
        plan.set(cache.tables[row : row + 1], cache.lengths[row : row + 1])
        assert torch.equal(plan(q[row : row + 1], *pools)[0], together[row])


def test_company_changes_no_bit() -> None:
    interpreted(check_company)


def test_how_long_a_plan_stands() -> None:
    cache = Cache([(32, [1, 9]), (0, [256, 257])], HEADS[0])
    plan = make_plan("triton", 5, 100, cache, torch.float32)
    assert isinstance(plan, DecodePlan)
    plan.set(cache.tables, cache.lengths)
    ends = np.array([512, 512, 512, 768])  # of the split behind that of the newest token
    assert plan.covers(cache.lengths)
    assert plan.covers(ends)
    for row in range(4):
        assert not plan.covers(ends + (np.arange(4) == row))
    assert not plan.covers(np.array([32, 512, 512, 768])), "shorter than what it shares, and a token"
    assert not plan.covers(ends[:3])
    plan.update(np.zeros((4, 60), np.int32), ends + 1)
    assert plan.covers(ends + 256)


Step = tuple[NDArray[np.int32], NDArray[np.int64], int, int]


@st.composite
def decoding_steps(draw: st.DrawFn) -> Step:
    """Tables, lengths, block size and most rows of an item; rows of a group share blocks, or part of them."""
    size = draw(st.sampled_from([16, 32, 256]))
    groups = draw(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12)), min_size=1, max_size=5))
    lengths, rows = [], []
    width = 80 * 256 // size
    free = iter(range(1_000_000))
    for shared, members in groups:
        prefix = [next(free) for _ in range(shared)]
        for _ in range(members):
            lengths.append(draw(st.integers(1, width * size)))
            rows.append((prefix + [next(free) for _ in range(width - shared)])[:width])
    return np.array(rows, np.int32), np.array(lengths), size, draw(st.integers(1, 9))


@given(decoding_steps())
def test_a_plan_meets_each_key_once(step: Step) -> None:
    tables, lengths, size, together = step
    edges = work_list.split_edges(tables.shape[1] * size)
    work = work_list.work_list(tables, lengths, size, edges, together)
    pieces: list[dict[int, tuple[int, int]]] = [{} for _ in lengths]
    for first, count, begin, end, piece in work.items.tolist():
        assert 1 <= count <= together
        assert begin < end
        blocks = tables[first : first + count, begin // size : -(-end // size)]
        if count > 1:
            assert (blocks == blocks[0]).all()
            assert (lengths[first : first + count] > end).all(), "a newest token is its row's own"
        for row in range(first, first + count):
            assert piece not in pieces[row]
            pieces[row][piece] = begin, end
    for row, own in enumerate(pieces):
        assert sorted(own) == list(range(work.pieces[row]))
        cuts = [0, *(own[piece][1] for piece in range(len(own)))]
        assert [own[piece][0] for piece in range(len(own))] == cuts[:-1]
        assert cuts[-1] == work.limits[row] >= lengths[row] >= work.least[row]
        assert work.limits[row] >= min(edges[-1], lengths[row] + work_list.SPLIT_TOKENS)
        # Beside the end of what it shares a row is cut where any other is, whatever the batch.
        assert set(cuts) <= {*edges.tolist(), int(work.least[row]) - 1}
        assert len(own) <= len(edges)


@given(decoding_steps())
def test_rows_that_share_blocks_meet_them_together(step: Step) -> None:
    tables, lengths, size, _ = step
    edges = work_list.split_edges(tables.shape[1] * size)
    work = work_list.work_list(tables, lengths, size, edges, len(lengths))
    first = np.flatnonzero(np.append(True, tables[1:, 0] != tables[:-1, 0]))
    for start, stop in zip(first, [*first[1:], len(lengths)], strict=True):
        equal = int((tables[start:stop] == tables[start]).all(0).cumprod().sum())
        shared = min(equal, int((lengths[start:stop].min() - 1) // size)) * size if stop - start > 1 else 0
        items = work.items[(work.items[:, 0] == start) & (work.items[:, 1] == stop - start) & (stop - start > 1)]
        assert (items[:, 3] - items[:, 2]).sum() == shared
        assert (work.least[start:stop] == shared + 1).all()


def test_splits_grow_with_the_context() -> None:
    edges = work_list.split_edges(32768)
    widths = np.diff(edges)
    assert (widths[edges[:-1] < 4096] == work_list.SPLIT_TOKENS).all()
    assert (widths <= np.maximum(work_list.SPLIT_TOKENS, edges[:-1] // 8)).all()
    assert len(widths) == 16 + 3 * 8
    assert edges.tolist() == [*work_list.split_edges(20000)[:-1].tolist(), *edges[edges >= 20000].tolist()]


def test_decode_errors() -> None:
    cache = Cache([(0, [5, 20])], HEADS[1])
    with pytest.raises(ValueError, match="block_size is 24; expected a power of two from 16 on"):
        DecodePlan(2, 3, 24, (2, 1), 16, torch.float32, torch.device("cpu"))
    plan = make_plan("triton", 2, 3, cache, torch.float32)
    tables = np.zeros((2, 3), np.int32)
    for wrong, lengths, message in (
        (np.zeros((3, 3), np.int32), [1, 1, 1], "1 to 2 rows of at most 3 blocks"),
        (np.zeros((2, 4), np.int32), [1, 1], "at most 3 blocks"),
        (tables, [1], "and 1 lengths"),
        (tables, [0, 1], "lengths from 0 to 1"),
        (tables, [1, 49], "the 48 tokens of 3 blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            plan.set(wrong, np.array(lengths))
    pools = [torch.zeros(6, BLOCK, 1, 24) for _ in range(2)]
    with pytest.raises(ValueError, match="up to 2 rows of"):
        plan(torch.zeros(3, 7, 24), *pools)
    with pytest.raises(ValueError, match="and blocks of shape"):
        plan(torch.zeros(2, 7, 24), pools[0].half(), pools[1].half())


GPU_HEADS = [(12, 2, 128), (7, 1, 64), (10, 2, 128), (4, 4, 256), (10, 2, 72), (32, 8, 128)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("heads", GPU_HEADS)
def test_triton_on_the_gpu(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    check_prefill("triton", heads, dtype, "cuda")
    for groups in GROUPS:
        check_decode("triton", groups, heads, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flash-attn", "xformers", "eager"])
def test_others_on_the_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name not in dispatch.available("cuda", "paged_attention"):
        pytest.skip(f"{name} is not available")
    monkeypatch.setattr(sys.modules[__name__], "BLOCK", 256)
    dispatch.force("paged_attention", name, "cuda")
    try:
        check_prefill(name, (12, 2, 128), torch.bfloat16, "cuda")
    finally:
        dispatch.force("paged_attention", "auto", "cuda")


@pytest.mark.gpu
def test_a_graph_replays_what_was_set_last() -> None:
    check_a_standing_plan("cuda", torch.bfloat16)
    check_company("cuda", torch.bfloat16)
    large, small = (Cache(GROUPS[name], GPU_HEADS[0]) for name in ("many", "group"))
    rows, blocks = len(large.lengths), large.tables.shape[1]
    plan = make_plan("triton", rows, 64, large, torch.bfloat16, "cuda")
    q = large.normal(rows, large.query_heads)
    static = q.to("cuda", torch.bfloat16)
    pools = [torch.zeros_like(x, device="cuda", dtype=torch.bfloat16) for x in large.caches]
    plan.set(large.tables[:, :blocks], large.lengths)
    plan(static, *pools)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = plan(static, *pools)
    for cache in (large, small, large):
        count = len(cache.lengths)
        for pool, x in zip(pools, cache.caches, strict=True):
            pool[: len(x)] = x[: len(pool)]
        plan.set(cache.tables, cache.lengths)
        graph.replay()
        true = [cache.expected(q[row : row + 1], row, int(cache.lengths[row]) - 1) for row in range(count)]
        near(out[:count], torch.cat(true), torch.bfloat16)
        assert not out[count:].any()
