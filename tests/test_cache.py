"""Block bookkeeping against a model of it in plain Python, and the scheduler's promises under short memory."""

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from groupwise.engine.config import ModelConfig
from groupwise.rollout.cache import BlockTables, KVCache, OutOfBlocks, add_names

NUM_BLOCKS, BLOCK_SIZE, MAX_BLOCKS = 24, 4, 9


class Tables(RuleBasedStateMachine):
    """Each token written has a unique number; a row must always read back exactly the numbers that it is owed.

    Rows name their full blocks by these numbers, so a row may find what another one wrote, while it is stored.
    """

    rows = Bundle("rows")

    def __init__(self) -> None:
        super().__init__()
        self.tables = BlockTables(NUM_BLOCKS, BLOCK_SIZE, MAX_BLOCKS)
        self.memory = np.full(NUM_BLOCKS * BLOCK_SIZE, -1)
        self.owed: dict[int, list[int]] = {}
        self.seen: list[list[int]] = []  # beginnings that were named
        self.written = 0

    def write(self, copies: list[tuple[int, int]], slots: dict[int, np.ndarray]) -> None:
        for source, target in copies:
            old, new = (slice(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE) for block in (source, target))
            self.memory[new] = self.memory[old]
        flat = np.concatenate([*slots.values(), np.array([], np.int64)])
        assert len(set(flat.tolist())) == len(flat), "two writers of one place"
        for row, places in slots.items():
            for place in places.tolist():
                assert self.tables.references[place // BLOCK_SIZE] == 1, "a write into a shared block"
                self.memory[place] = self.written
                self.owed[row].append(self.written)
                self.written += 1

    def live(self, row: int) -> bool:
        return row in self.owed

    @rule(target=rows)
    def open(self) -> int:
        row = self.tables.open()
        assert row not in self.owed
        self.owed[row] = []
        return row

    @rule(row=rows, tokens=st.integers(0, 14))
    def reserve(self, row: int, tokens: int) -> None:
        if not self.live(row) or len(self.owed[row]) + tokens > MAX_BLOCKS * BLOCK_SIZE:
            return
        needed, free = self.tables.needed(row, tokens), self.tables.free_blocks
        if needed > free:
            before = (self.tables.tables.copy(), self.tables.references.copy())
            with pytest.raises(OutOfBlocks):
                self.tables.reserve(row, tokens)
            assert all(np.array_equal(a, b) for a, b in zip(before, self.after(), strict=True))
            return
        copies = self.tables.reserve(row, tokens)
        assert self.tables.free_blocks == free - needed
        length = len(self.owed[row])
        self.write(copies, {row: self.tables.slots(row, length, length + tokens)})

    def after(self) -> tuple[np.ndarray, np.ndarray]:
        return self.tables.tables, self.tables.references

    @rule(data=st.data())
    def reserve_next(self, data: st.DataObject) -> None:
        grown = [row for row, owed in self.owed.items() if 0 < len(owed) < MAX_BLOCKS * BLOCK_SIZE]
        if not grown:
            return
        rows = np.array(data.draw(st.lists(st.sampled_from(grown), unique=True, min_size=1)), np.int64)
        if self.tables.needed_for_next(rows) > self.tables.free_blocks:
            with pytest.raises(OutOfBlocks):
                self.tables.reserve_next(rows)
            return
        copies = self.tables.reserve_next(rows)
        self.write(
            copies, {row: place[None] for row, place in zip(rows.tolist(), self.tables.last_slots(rows), strict=True)}
        )

    @rule(target=rows, row=rows, share=st.floats(0, 1))
    def fork(self, row: int, share: float):
        if not self.live(row):
            return multiple()
        length = round(share * len(self.owed[row]))
        twin = self.tables.fork(row, length)
        assert twin not in self.owed
        self.owed[twin] = self.owed[row][:length]
        return twin

    @rule(row=rows, share=st.floats(0, 1))
    def name(self, row: int, share: float) -> None:
        if self.live(row):
            names: list[bytes] = []
            add_names(names, self.owed[row], BLOCK_SIZE)
            first = round(share * len(names))
            self.tables.name(row, first, names[first:])
            self.seen.append(list(self.owed[row]))

    @rule(target=rows, which=st.integers(0, 99), other=st.lists(st.integers(-9, -1), max_size=6))
    def adopt(self, which: int, other: list[int]) -> int:
        """Begins with what was named once, stored or not by now, and goes on with something else."""
        sought = [*(self.seen[which % len(self.seen)] if self.seen else []), *other]
        names: list[bytes] = []
        add_names(names, sought, BLOCK_SIZE)
        count, idle = self.tables.stored(names)
        free = self.tables.free_blocks
        row = self.tables.adopt(names)
        assert row not in self.owed
        self.owed[row] = sought[: count * BLOCK_SIZE]
        assert self.tables.lengths[row] == count * BLOCK_SIZE
        assert self.tables.free_blocks == free - idle
        return row

    @rule()
    def forget_names(self) -> None:
        self.tables.forget_names()
        for sought in self.seen:
            names: list[bytes] = []
            add_names(names, sought, BLOCK_SIZE)
            assert self.tables.stored(names) == (0, 0)
        self.seen.clear()

    @rule(row=consumes(rows))
    def close(self, row: int) -> None:
        if self.live(row):
            self.tables.close(row)
            del self.owed[row]

    @rule()
    def flush(self) -> None:
        self.tables.flush()
        for row in self.owed:
            with pytest.raises(RuntimeError, match="closed"):
                self.tables.view(np.array([row]))
        self.owed.clear()
        self.forget_names()

    @invariant()
    def counts_are_exact(self) -> None:
        held = np.zeros(NUM_BLOCKS, int)
        for row, owed in self.owed.items():
            count = -(-len(owed) // BLOCK_SIZE)
            assert self.tables.counts[row] == count
            np.add.at(held, self.tables.tables[row, :count], 1)
        assert np.array_equal(held, self.tables.references)
        assert self.tables.free_blocks == int((held == 0).sum())
        assert self.tables.used_blocks <= self.tables.peak_blocks
        assert not held[self.tables.peak_blocks :].any()  # which the sampler has not prepared

    @invariant()
    def rows_read_what_they_are_owed(self) -> None:
        for row, owed in self.owed.items():
            assert self.memory[self.tables.slots(row, 0, len(owed))].tolist() == owed


TestTables = Tables.TestCase
TestTables.settings = settings(max_examples=60, stateful_step_count=40)


def test_closed_rows_cannot_be_used():
    tables = BlockTables(8, 4, 8)
    row = tables.open()
    tables.reserve(row, 5)
    tables.close(row)
    for use in (lambda: tables.reserve(row, 1), lambda: tables.slots(row, 0, 1), lambda: tables.fork(row, 1)):
        with pytest.raises(RuntimeError, match="closed"):
            use()
    with pytest.raises(RuntimeError, match="closed"):
        tables.close(row)


def test_kv_writes_and_copies_land_in_their_blocks():
    config = ModelConfig(num_hidden_layers=2)
    cache = KVCache(config, 6, 4, torch.device("cpu"), torch.float32)
    assert cache.keys.nbytes + cache.values.nbytes == 6 * KVCache.block_bytes(config, 4, torch.float32)
    cache.prepare(5, [], [])
    k, v = torch.randn(5, 2, 32), torch.randn(5, 2, 32)
    slots = torch.tensor([8, 9, 10, 11, 20])
    cache.write(1, slots[:4], k[:4], v[:4])
    cache.prepare(6, [], [])
    cache.write(1, slots[4:], k[4:], v[4:])
    assert torch.equal(cache.keys[1, 2], k[:4])
    assert torch.equal(cache.values[1, 5, 0], v[4])
    assert not cache.keys[0].any()
    cache.prepare(6, [0, 3], [(2, 0), (5, 3)])
    assert torch.equal(cache.keys[1, 0], k[:4])
    assert torch.equal(cache.values[1, 3], cache.values[1, 5])
    assert torch.equal(cache.keys[1, 2], k[:4])
    saved = cache.save(np.array([2, 5], np.int32))
    cache.load(np.array([4, 1], np.int32), saved)
    assert torch.equal(cache.keys[:, [4, 1]], cache.keys[:, [2, 5]])
    assert torch.equal(cache.values[:, [4, 1]], cache.values[:, [2, 5]])
    # Once something is not finite, blocks are zeroed as they are taken, but for what is copied into them.
    cache.distrust()
    cache.keys[:, 2] = torch.nan
    taken = [2, 3]
    cache.prepare(6, taken, [(4, 3)])
    assert not taken
    assert not cache.keys[:, 2].any()
    assert torch.equal(cache.keys[1, 3], k[:4])
    cache.free()
    cache.prepare(6, [], [])
    assert not cache.keys.any()
    assert not cache.values.any()
