"""Sampling from the policy: prefill and decode over the paged cache, with the trainer's own model.

What a request gets depends on its prompt, its parameters and its place in the counter (seed, task, sample, turn,
position) alone: not on what else runs, on ``concurrency``, or on memory running short.

Legend: N sequences, T tokens, H hidden, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..engine.errors import UserError
from ..engine.model import Model
from ..kernels.attention import packed_attention
from ..kernels.cascade import CascadeDecode
from ..kernels.paged_attention import paged_attention
from ..kernels.rotary import apply_rotary
from .cache import BlockTables, KVCache
from .draw import SamplingParams, choose, stream_key, uniforms
from .scheduler import Admission, Request, Scheduler
from .stop import Decodes, StopFinder

_COUNTS = ("prefill_tokens", "prefix_hit_tokens", "recomputed_tokens", "decode_steps", "decode_tokens", "copied_blocks")


@dataclass(frozen=True)
class Completion:
    """What the model wrote in one turn.

    ``logprobs`` are those of ``token_ids`` under softmax(logits / temperature), whatever top_k and top_p say (at
    temperature 0: under softmax(logits)). ``finish_reason`` is "stop" for a stop string or the end token, which
    are part of ``token_ids``, and "length" for ``max_tokens``.
    """

    request_id: int
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]
    text: str


@dataclass(eq=False)
class _Generation(Request):
    """A request with what sampling must know of it."""

    params: SamplingParams = field(default_factory=SamplingParams)
    stream: tuple[int, int, int] = (0, 0, 0)
    finder: StopFinder | None = None
    start: int = 0  # where the present turn begins in token_ids
    key: int = 0
    logprobs: list[float] = field(default_factory=list)


class _CachedAttention:
    """Writes each layer's new keys and values into the cache, then attends to them as ``attend`` says.

    Args:
        cache: where keys and values are kept.
        slots: [T] int64, the place of each new token.
        attend: ``(q, k, v, k_cache, v_cache) -> [T,Hq,D]``, the caches those of the layer.
    """

    def __init__(self, cache: KVCache, slots: Tensor, attend: Callable[..., Tensor]) -> None:
        self._cache, self._slots, self._attend = cache, slots, attend

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k = apply_rotary(q, k, cos, sin)
        self._cache.write(layer, self._slots, k, v)
        return self._attend(q, k, v, self._cache.keys[layer], self._cache.values[layer])


class Sampler:
    """Samples turns from a model, many at once, keeping their keys and values between turns.

    Args:
        model: a whole ``engine.Model``; of a sharded one its ``.module``, inside ``gathered()``.
        tokenizer: decodes texts for stop strings and names the end token.
        kv_memory_gib: memory for keys and values, GiB. Fewer blocks than the sequences need cost time, never tokens.
        block_size: tokens in a block.
        concurrency: most sequences that decode together; 0 for as many as memory holds.
        prefill_tokens: prompt tokens computed in one step, about.

    Raises:
        UserError: a setting out of range, or memory for not even one block.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Decodes,
        *,
        kv_memory_gib: float,
        block_size: int = 16,
        concurrency: int = 0,
        prefill_tokens: int = 4096,
    ) -> None:
        settings = (
            ("block_size", block_size, 1),
            ("concurrency", concurrency, 0),
            ("prefill_tokens", prefill_tokens, 1),
        )
        for name, value, least in settings:
            if value < least:
                raise UserError(f"{name} is {value}, expected at least {least}; correct the sampler's settings")
        self._model, self._tokenizer = model, tokenizer
        config, weight = model.config, model.output_weight
        self._device = weight.device
        block_bytes = KVCache.block_bytes(config, block_size, weight.dtype)
        num_blocks = int(kv_memory_gib * 2**30) // block_bytes
        if num_blocks < 1:
            raise UserError(
                f"kv_memory_gib is {kv_memory_gib}, less than one block of {block_size} tokens "
                f"({block_bytes / 2**30:.6f} GiB); raise it"
            )
        self._max_length = config.max_position_embeddings
        self._vocab_size = config.vocab_size
        self._cache = KVCache(config, num_blocks, block_size, self._device, weight.dtype)
        self._tables = BlockTables(num_blocks, block_size, -(-self._max_length // block_size))
        self._scheduler: Scheduler[_Generation] = Scheduler(
            self._tables, concurrency=concurrency, prefill_tokens=prefill_tokens
        )
        self._requests: dict[int, _Generation] = {}
        self._next_id = 0
        self._texts: list[str] = []
        self._finders: dict[tuple[str, ...], StopFinder] = {}
        self._counts = dict.fromkeys(_COUNTS, 0)

    @property
    def has_work(self) -> bool:
        """Whether :meth:`step` has something to do."""
        return self._scheduler.has_work

    @property
    def stats(self) -> dict[str, int]:
        """Counts since the start.

        ``prefill_tokens`` computed in prefills (``recomputed_tokens`` of them not for the first time),
        ``prefix_hit_tokens`` of prompts that were shared instead, ``decode_steps`` and ``decode_tokens``,
        ``copied_blocks`` on write, ``peak_blocks``, ``used_blocks`` and ``num_blocks`` of the cache,
        ``preemptions`` of running requests and ``evictions`` of idle ones.
        """
        return {
            **self._counts,
            "used_blocks": self._tables.used_blocks,
            "peak_blocks": self._tables.peak_blocks,
            "num_blocks": self._tables.num_blocks,
            "preemptions": self._scheduler.preemptions,
            "evictions": self._scheduler.evictions,
        }

    def submit(self, prompt_ids: Sequence[int], params: SamplingParams, *, stream: tuple[int, int, int]) -> int:
        """Queues a prompt. Requests that wait with equal prompts have it prefilled once and share its blocks.

        Args:
            prompt_ids: token ids, at least one.
            params: how the first turn is sampled.
            stream: (task, sample, turn), the counter of its random numbers.

        Returns:
            The request's id, for :meth:`extend` and :meth:`release`.

        Raises:
            UserError: the prompt is empty, has an id out of range, or can never fit with ``max_tokens``.
        """
        if not len(prompt_ids):
            raise UserError("the prompt is empty, expected at least one token; give it some text")
        self._check(prompt_ids, 0, params)
        request = _Generation(self._next_id, [int(token) for token in prompt_ids])
        self._next_id += 1
        self._begin_turn(request, params, stream)
        self._requests[request.number] = request
        self._scheduler.submit(request)
        return request.number

    def extend(self, request_id: int, token_ids: Sequence[int], params: SamplingParams) -> None:
        """Appends what the environment wrote to a finished request and samples its next turn.

        Only the new tokens are prefilled, and the last sampled one, unless the blocks had to be given up meanwhile.

        Raises:
            UserError: an id out of range, or the request can never fit.
            ValueError: the request is unknown or not finished.
        """
        request = self._find(request_id)
        if request.state != "idle":
            raise ValueError(f"request {request_id} is {request.state}, only a finished one can be extended")
        self._check(token_ids, len(request.token_ids), params)
        request.token_ids.extend(int(token) for token in token_ids)
        task, sample, turn = request.stream
        self._begin_turn(request, params, (task, sample, turn + 1))
        self._scheduler.resume(request)

    def release(self, request_id: int) -> None:
        """Forgets a request, finished or not, and frees its memory.

        Raises:
            ValueError: the request is unknown.
        """
        request = self._find(request_id)
        self._scheduler.remove(request)
        del self._requests[request_id]

    def step(self) -> list[Completion]:
        """One iteration: prefills what can start, then decodes one token of every running request.

        Returns:
            The turns that ended in it.

        Raises:
            FloatingPointError: the model gave logits that are not finite.
        """
        done: list[Completion] = []
        with torch.inference_mode():
            admissions, copies = self._scheduler.admit()
            if admissions:
                self._prepare(copies)
                done += self._prefill(admissions)
            if self._scheduler.running:
                self._prepare(self._scheduler.make_room())
            if self._scheduler.running:
                done += self._decode()
        return done

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Completion]:
        """Samples one turn for each prompt, in order; prompt i has the stream (i, 0, 0).

        Raises:
            UserError: as :meth:`submit`.
            ValueError: requests submitted otherwise are not finished; their completions would get lost here.
        """
        if self.has_work:
            raise ValueError("generate was called while submitted requests run; finish them with step, or release them")
        ids: list[int] = []
        done: dict[int, Completion] = {}
        try:
            for index, prompt in enumerate(prompts):
                ids.append(self.submit(prompt, params, stream=(index, 0, 0)))
            while len(done) < len(ids):
                for completion in self.step():
                    done[completion.request_id] = completion
                    self.release(completion.request_id)
        finally:
            for request_id in ids:
                if request_id not in done:
                    self.release(request_id)
        return [done[request_id] for request_id in ids]

    def flush(self) -> None:
        """To be called when weights change: nothing computed before is read again.

        The cache's memory is given back until the next :meth:`step`.
        """
        self._scheduler.flush()
        self._cache.free()

    def _find(self, request_id: int) -> _Generation:
        if request_id not in self._requests:
            raise ValueError(f"request {request_id} is unknown; it was released, or never submitted")
        return self._requests[request_id]

    def _check(self, token_ids: Sequence[int], length: int, params: SamplingParams) -> None:
        if len(token_ids) and not 0 <= min(token_ids) <= max(token_ids) < self._vocab_size:
            wrong = next(token for token in token_ids if not 0 <= token < self._vocab_size)
            raise UserError(f"token id {wrong} is out of range, the model has ids 0 to {self._vocab_size - 1}")
        total = length + len(token_ids) + params.max_tokens
        stored = self._tables.num_blocks * self._tables.block_size
        for limit, name in ((self._max_length, "max_position_embeddings"), (stored, "tokens that kv_memory_gib holds")):
            if total > limit:
                raise UserError(
                    f"{length + len(token_ids)} tokens and max_tokens {params.max_tokens} make {total}, more than the "
                    f"{limit} {name}; shorten the prompt or lower max_tokens"
                )

    def _begin_turn(self, request: _Generation, params: SamplingParams, stream: tuple[int, int, int]) -> None:
        request.params, request.stream = params, stream
        request.key = stream_key(params.seed, stream)
        request.start, request.logprobs = len(request.token_ids), []
        finder = self._finders.get(params.stop)
        if finder is None:
            if params.stop and not self._texts:
                self._texts = [self._tokenizer.decode([i]) for i in range(self._vocab_size)]
            finder = self._finders[params.stop] = StopFinder(self._texts, self._tokenizer, params.stop)
        request.finder = finder

    def _tensor(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self._device)

    def _prepare(self, copies: list[tuple[int, int]]) -> None:
        """The cache for what was just scheduled."""
        self._cache.prepare(self._tables.peak_blocks)  # blocks are taken from the first on
        if copies:
            self._cache.copy(copies)
            self._counts["copied_blocks"] += len(copies)

    def _prefill(self, admissions: list[Admission[_Generation]]) -> list[Completion]:
        hidden: dict[int, Tensor] = {}
        compute = [each for each in admissions if each.cached < len(each.request.token_ids)]
        for group in ([each for each in compute if not each.cached], [each for each in compute if each.cached]):
            if group:
                rows = self._prefill_forward(group)
                hidden.update((each.request.number, row) for each, row in zip(group, rows, strict=True))
        last = []
        for request, cached, _, prompt in admissions:
            if request.number in hidden:
                if prompt is not None:
                    prompt.hidden = hidden[request.number]
            else:
                assert prompt is not None
                assert prompt.hidden is not None
                self._counts["prefix_hit_tokens"] += cached
                hidden[request.number] = prompt.hidden
            last.append(hidden[request.number])
        return self._sample([each.request for each in admissions], torch.stack(last))

    def _prefill_forward(self, group: list[Admission[_Generation]]) -> Tensor:
        """Computes the new tokens of requests, all with a cached beginning or all without; [N,H] at their last."""
        requests = [each.request for each in group]
        starts = [each.cached for each in group]
        stops = [len(request.token_ids) for request in requests]
        bounds = np.cumsum([0, *(stop - start for start, stop in zip(starts, stops, strict=True))], dtype=np.int32)
        ids = [token for request, start in zip(requests, starts, strict=True) for token in request.token_ids[start:]]
        places = [np.arange(start, stop) for start, stop in zip(starts, stops, strict=True)]
        slots = [
            self._tables.slots(request.row, start, stop)
            for request, start, stop in zip(requests, starts, stops, strict=True)
        ]
        cu_seqlens, longest = self._tensor(bounds), int(np.diff(bounds).max())
        if starts[0]:
            tables = self._tensor(self._tables.view(np.array([request.row for request in requests])))
            contexts = self._tensor(np.array(stops, np.int32))

            def attend(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
                return paged_attention(q, keys, values, tables, contexts, cu_seqlens, longest)
        else:

            def attend(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
                return packed_attention(q, k, v, cu_seqlens, longest)

        attention = _CachedAttention(self._cache, self._tensor(np.concatenate(slots)), attend)
        hidden = self._hidden(torch.tensor(ids, device=self._device), self._tensor(np.concatenate(places)), attention)
        self._counts["prefill_tokens"] += len(ids)
        self._counts["recomputed_tokens"] += sum(each.recomputed for each in group)
        return hidden[self._tensor(bounds[1:] - 1)]

    def _decode(self) -> list[Completion]:
        # Neighbours whose tables begin alike are the samples of one prompt.
        order = np.argsort(self._tables.tables[self._scheduler.rows, 0], kind="stable")
        rows = self._scheduler.rows[order]
        requests = [self._scheduler.running[index] for index in order.tolist()]
        tables, lengths = self._tables.view(rows), self._tables.lengths[rows]
        ids = torch.tensor([request.token_ids[-1] for request in requests], device=self._device)
        attention = _CachedAttention(
            self._cache, self._tensor(self._tables.last_slots(rows)), self._decode_attention(tables, lengths)
        )
        hidden = self._hidden(ids, self._tensor(lengths - 1), attention)
        self._counts["decode_steps"] += 1
        self._counts["decode_tokens"] += len(requests)
        return self._sample(requests, hidden)

    def _decode_attention(self, tables: NDArray[np.int32], lengths: NDArray[np.int64]) -> Callable[..., Tensor]:
        config = self._model.config
        if self._device.type == "cpu":
            cascade = CascadeDecode(self._tables.block_size, config.num_key_value_heads, config.head_size, self._device)
            cascade.set(tables, lengths)
            return lambda q, k, v, keys, values: cascade(q, keys, values)
        block_tables, context_lens = self._tensor(tables), self._tensor(lengths.astype(np.int32))
        cu_seqlens = torch.arange(len(tables) + 1, dtype=torch.int32, device=self._device)
        return lambda q, k, v, keys, values: paged_attention(q, keys, values, block_tables, context_lens, cu_seqlens, 1)

    def _hidden(self, ids: Tensor, positions: Tensor, attention: _CachedAttention) -> Tensor:
        hidden = self._model(ids, positions, attention)
        assert isinstance(hidden, Tensor)
        return hidden

    def _sample(self, requests: Sequence[_Generation], hidden: Tensor) -> list[Completion]:
        """Draws the next token of each request from hidden [N,H]; returns the turns that it ends."""
        logits = (hidden @ self._model.output_weight.T).float()  # [N,V]
        keys = np.array([request.key for request in requests], np.uint64)
        positions = np.array([len(request.logprobs) for request in requests], np.uint64)
        uniform = self._tensor(uniforms(keys, positions))
        kinds: dict[tuple[float, int, float], list[int]] = {}
        for index, request in enumerate(requests):
            params = request.params
            kinds.setdefault((params.temperature, params.top_k, params.top_p), []).append(index)
        if len(kinds) == 1:
            tokens, logprobs = choose(logits, uniform, *next(iter(kinds)))
        else:
            tokens = torch.empty(len(requests), dtype=torch.int64, device=self._device)
            logprobs = torch.empty(len(requests), device=self._device)
            for kind, members in kinds.items():
                tokens[members], logprobs[members] = choose(logits[members], uniform[members], *kind)
        return self._record(requests, tokens.tolist(), logprobs.tolist())

    def _record(self, requests: Sequence[_Generation], tokens: list[int], logprobs: list[float]) -> list[Completion]:
        done: list[Completion] = []
        finished: list[_Generation] = []
        eos = self._tokenizer.eos_id
        for request, token, logprob in zip(requests, tokens, logprobs, strict=True):
            if not logprob > float("-inf"):
                raise FloatingPointError(
                    f"request {request.number} got a log-probability of {logprob} at token {len(request.token_ids)}; "
                    "look for weights that are not finite"
                )
            request.token_ids.append(token)
            request.logprobs.append(logprob)
            finder = request.finder
            assert finder is not None
            stopped = token == eos or (token in finder.alarm and finder.found(request.token_ids, request.start))
            if stopped or len(request.logprobs) == request.params.max_tokens:
                ids = request.token_ids[request.start :]
                reason: Literal["stop", "length"] = "stop" if stopped else "length"
                done.append(Completion(request.number, ids, request.logprobs, reason, self._tokenizer.decode(ids)))
                finished.append(request)
        self._scheduler.finish(finished)
        return done
