"""The model's passes over the paged cache: the tokens of prefills, and one token of each sequence that decodes.

Legend: N sequences, T tokens, H hidden, V vocabulary, Hq query heads, Hkv key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..engine.exact import ROWS
from ..engine.model import Attention, Model
from ..kernels.attention import packed_attention
from ..kernels.cascade import CascadeDecode
from ..kernels.decode import DecodePlan
from ..kernels.dispatch import exact_attention_by, exact_forms, paged_attention_by
from ..kernels.exact_attention import ExactDecode, exact_paged_attention
from ..kernels.linear import linear
from ..kernels.logprob import grouped_logprob
from ..kernels.paged_attention import paged_attention
from ..kernels.rotary import apply_rotary, write_rotated
from ..kernels.sampling import Drawn, sample_tokens
from .cache import BlockTables, KVCache
from .draw import Draws
from .replay import Inputs, Plan, Replay
from .scheduler import Chunk

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries [T,Hq,D] and a layer's caches -> [T,Hq,D]."""


class _FreshAttention:
    """Whole beginnings of sequences, which see nothing but themselves: keys and values are stored for later."""

    def __init__(self, cache: KVCache, slots: Tensor, cu_seqlens: Tensor, longest: int) -> None:
        self._cache, self._slots, self._cu_seqlens, self._longest = cache, slots, cu_seqlens, longest

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k = apply_rotary(q, k, cos, sin)
        self._cache.write(layer, self._slots, k, v)
        return packed_attention(q, k, v, self._cu_seqlens, self._longest)


class _CachedAttention:
    """Stores the new keys and values, then attends to what is stored."""

    def __init__(self, cache: KVCache, slots: Tensor, attend: Attend) -> None:
        self._cache, self._slots, self._attend = cache, slots, attend

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        q = write_rotated(q, k, v, cos, sin, keys, values, self._slots)
        return self._attend(q, keys, values)


class _ExactAttention(_CachedAttention):
    """The same behind rows of padding on a CPU; they are turned like the others and stored nowhere."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k = apply_rotary(q, k, cos, sin)
        self._cache.write(layer, self._slots, k[: len(self._slots)], v[: len(self._slots)])
        return self._attend(q, self._cache.keys[layer], self._cache.values[layer])


class Forward:
    """The passes of one model over one cache.

    Args:
        model: a whole ``engine.Model``.
        cache: where keys and values are kept.
        tables: which blocks of it belong to which row.
        exact: log-probabilities are to be the trainer's to the last bit: rows are padded to multiples of 64, attention
            takes the form in which a row does not depend on what is beside it, and the trainer's kernel scores tokens.
    """

    def __init__(self, model: Model, cache: KVCache, tables: BlockTables, *, exact: bool) -> None:
        self._model, self._cache, self._tables, self._exact = model, cache, tables, exact
        weight, config = model.output_weight, model.config
        self._device = weight.device
        sizes = (config.head_size, tables.block_size)
        if exact:
            self._form = exact_attention_by(self._device.type, weight.dtype, config.head_size)
        else:
            self._form = paged_attention_by(self._device.type, weight.dtype, *sizes)
        self._heads = (config.num_attention_heads, config.num_key_value_heads)
        self._cascade = CascadeDecode(tables.block_size, self._heads, config.head_size, self._device)
        self._replay: Replay | None = None

    def forget(self) -> None:
        """Weights or cache will move: graphs that were captured with them are dropped."""
        self._replay = None

    def prefill(self, chunks: Sequence[Chunk[Any]]) -> Tensor:
        """Computes the tokens of the chunks, at least one each, and stores their keys and values.

        Returns:
            [N,H], the hidden state at the last token of each.
        """
        fresh = [chunk.start == 0 and not self._exact for chunk in chunks]
        hidden: list[Tensor] = [torch.empty(0)] * len(chunks)
        for kind in set(fresh):
            members = [number for number, is_fresh in enumerate(fresh) if is_fresh == kind]
            last = self._prefill([chunks[number] for number in members], kind)
            for number, row in zip(members, last, strict=True):
                hidden[number] = row
        return torch.stack(hidden)

    def decode(self, ids: Tensor, rows: NDArray[np.int64], draws: Draws, *, same_rows: bool) -> Drawn:
        """Computes one token of each row, stores its keys and values, and draws the next.

        Args:
            ids: [N] int64, on the model's device; the rows have room for them already.
            rows: [N]; those that share a prompt should be neighbours.
            draws: of the same rows.
            same_rows: the step before was of the same sequences in the same order.
        """
        tables, lengths, slots = self._tables.view(rows), self._tables.lengths[rows], self._tables.last_slots(rows)
        if self._form == "triton":
            if self._replay is None:
                self._replay = Replay(self._step, self._make_plan)
            return self._finished(self._replay(ids, Inputs(tables, lengths, slots, draws, same_rows)), draws)
        if self._form == "eager" and not self._exact:
            self._cascade.set(tables, lengths)
            attend: Attend = self._cascade
        else:
            attend = self._paged_attend(tables, lengths, np.arange(len(rows) + 1, dtype=np.int32), 1)
        step = self._step(ids, self._tensor(lengths - 1), self._tensor(slots), attend, self._arguments(draws))
        return self._finished(step, draws)

    def draw(self, hidden: Tensor, draws: Draws) -> Drawn:
        """Draws the token that follows each hidden state [N,H]."""
        return self._finished(self._draw(hidden, self._arguments(draws)), draws)

    def _make_plan(self, num_rows: int, max_blocks: int) -> Plan:
        if self._exact:
            return ExactDecode(num_rows, max_blocks, self._tables.block_size, self._device)
        size, dtype = self._model.config.head_size, self._cache.keys.dtype
        return DecodePlan(num_rows, max_blocks, self._tables.block_size, self._heads, size, dtype, self._device)

    def _step(
        self, ids: Tensor, positions: Tensor, slots: Tensor, attend: Attend, draws: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        return self._draw(self._hidden(ids, positions, self._attention(slots, attend))[: len(ids)], draws)

    def _draw(self, hidden: Tensor, draws: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What ``Drawn`` has, and behind it the hidden states if they are to be scored."""
        with self._forms():
            logits = linear(self._padded(hidden), self._model.output_weight)[: len(hidden)]
        drawn = sample_tokens(logits, *draws)
        return (*drawn, hidden) if self._exact else drawn

    def _arguments(self, draws: Draws) -> tuple[Tensor, ...]:
        single = draws._replace(temperature=draws.temperature.astype(np.float32))
        return tuple(self._tensor(array) for array in single)

    def _finished(self, found: tuple[Tensor, ...], draws: Draws) -> Drawn:
        """In the exact mode with the log-probabilities of the trainer's kernel, outside of graphs."""
        if not self._exact:
            return Drawn(*found)
        drawn, hidden = Drawn(*found[:-1]), found[-1]
        logprobs = torch.empty_like(drawn.logprobs)
        for temperature in np.unique(draws.temperature):
            members = self._tensor(np.flatnonzero(draws.temperature == temperature))
            scores, _ = grouped_logprob(
                self._padded(hidden[members]),
                self._model.output_weight,
                self._padded(drawn.tokens[members]),
                temperature=float(temperature) or 1.0,
                known_targets=True,
            )
            logprobs[members] = scores[: len(members)]
        return drawn._replace(logprobs=logprobs)

    def _prefill(self, chunks: Sequence[Chunk[Any]], fresh: bool) -> Tensor:
        """Of chunks that all are the beginnings of their sequences, or all go on behind what is stored."""
        spans = [(chunk.request.row, chunk.start, chunk.stop) for chunk in chunks]
        lengths = [stop - start for _, start, stop in spans]
        bounds = np.cumsum([0, *lengths], dtype=np.int32)
        slots = self._tensor(np.concatenate([self._tables.slots(*span) for span in spans]))
        attention: Attention
        if fresh:
            attention = _FreshAttention(self._cache, slots, self._tensor(bounds), max(lengths))
        else:
            tables = self._tables.view(np.array([row for row, _, _ in spans]))
            attend = self._paged_attend(tables, np.array([stop for *_, stop in spans]), bounds, max(lengths))
            attention = self._attention(slots, attend)
        ids = [token for chunk in chunks for token in chunk.request.token_ids[chunk.start : chunk.stop]]
        positions = np.concatenate([np.arange(start, stop) for _, start, stop in spans])
        hidden = self._hidden(torch.tensor(ids, device=self._device), self._tensor(positions), attention)
        return hidden[self._tensor(bounds[1:].astype(np.int64) - 1)]

    def _paged_attend(
        self, tables: NDArray[np.int32], lengths: NDArray[np.int64], bounds: NDArray[np.int32], longest: int
    ) -> Attend:
        form = exact_paged_attention if self._exact else paged_attention
        block_tables, cu_seqlens = self._tensor(tables), self._tensor(bounds)
        context_lens = self._tensor(lengths.astype(np.int32))
        return lambda q, keys, values: form(q, keys, values, block_tables, context_lens, cu_seqlens, longest)

    def _attention(self, slots: Tensor, attend: Attend) -> Attention:
        if self._exact and self._form == "eager":
            return _ExactAttention(self._cache, slots, attend)
        return _CachedAttention(self._cache, self._padded(slots, -1), attend)

    def _hidden(self, ids: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        with self._forms():
            hidden = self._model(self._padded(ids), self._padded(positions), attention)
        assert isinstance(hidden, Tensor)
        return hidden

    def _forms(self) -> AbstractContextManager[None]:
        return exact_forms(self._device.type) if self._exact else nullcontext()

    def _padded(self, x: Tensor, value: int = 0) -> Tensor:
        """In the exact mode: rows of ``value`` behind x, up to a multiple of 64."""
        missing = -len(x) % ROWS if self._exact else 0
        return torch.cat((x, x.new_full((missing, *x.shape[1:]), value))) if missing else x

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self._device)
