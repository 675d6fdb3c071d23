"""Sampling from the policy: prefill and decode over the paged cache, with the trainer's own model.

What a request gets depends on its prompt, its parameters and its place in the counter (seed, task, sample, turn,
position) alone: not on what else runs, on ``concurrency``, on the rank, or on memory running short.

On CUDA the host is a step behind: while a step computes, the tokens of the one before are read, so the device does not
wait for the host to look for stop strings. A sequence that proves to have ended has computed one token in vain.

Legend: N sequences, H hidden.
"""

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Literal

import torch
from torch import Tensor

from ..engine.errors import UserError
from ..engine.exact import check_exact
from ..engine.flops import decode_weights, peak_of
from ..engine.metrics import ProgressBar, free_memory
from ..engine.model import Model
from ..engine.settings import kv_bytes
from .cache import BlockTables, Copies, KVCache
from .draw import SamplingParams, stream_key
from .forward import Forward
from .generation import Completion, Draft, Generation, draws_of
from .scheduler import Scheduler, Step, rows_of
from .stop import Decodes, StopFinder

_COUNTS = ("prefill_tokens", "decode_steps", "decode_tokens", "attended_tokens", "copied_blocks", "sampled_tokens")


class Sampler:
    """Samples turns from a model, many at once, keeping their keys and values between turns.

    Args:
        model: a whole ``engine.Model``; of a sharded one its ``.module``, inside ``gathered()``. There is no copy.
        tokenizer: decodes texts for stop strings and names the end token.
        kv_memory: memory for keys and values: GiB, or a share of the device's (of what is free, on a CPU) such as
            "40%". Fewer blocks than the sequences need cost time, never tokens.
        block_size: tokens in a block.
        concurrency: most sequences that run together; 0 for as many as memory holds.
        prefill_tokens: prompt tokens computed in one step; longer prompts are computed in chunks.
        preemption: what becomes of the blocks that a sequence must give up: "recompute" them, or "keep" them in the
            host's memory.
        exact: log-probabilities equal the trainer's to the last bit; on CUDA, and on a CPU in float32, and only where
            the trainer calls ``dispatch.force_exact`` and pads its batches to multiples of 64 tokens.

    Raises:
        UserError: a setting out of range, memory for not even one block, or no exact mode with this model and machine.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Decodes,
        *,
        kv_memory: float | str,
        block_size: int = 16,
        concurrency: int = 0,
        prefill_tokens: int = 4096,
        preemption: Literal["recompute", "keep"] = "recompute",
        exact: bool = False,
    ) -> None:
        settings = (
            ("block_size", block_size, 1),
            ("concurrency", concurrency, 0),
            ("prefill_tokens", prefill_tokens, 1),
        )
        for name, value, least in settings:
            if value < least:
                raise UserError(f"{name} is {value}, expected at least {least}; correct the sampler's settings")
        if preemption not in ("recompute", "keep"):
            raise UserError(
                f"preemption is {preemption!r}, expected 'recompute' or 'keep'; correct the sampler's settings"
            )
        config, weight = model.config, model.output_weight
        if exact:
            check_exact(model)
        self._tokenizer = tokenizer
        self._device = weight.device
        block_bytes = KVCache.block_bytes(config, block_size, weight.dtype)
        num_blocks = kv_bytes(kv_memory, free_memory(self._device)) // block_bytes
        if num_blocks < 1:
            raise UserError(
                f"kv_memory is {kv_memory}, less than one block of {block_size} tokens "
                f"({block_bytes / 2**30:.6f} GiB); raise it"
            )
        self._max_length = config.max_position_embeddings
        self._vocab_size = config.vocab_size
        self._block_bytes, self._token_bytes = block_bytes, block_bytes // block_size
        self._weight_bytes = decode_weights(config) * weight.itemsize
        self._peak = peak_of(self._device, weight.dtype)
        self._cache = KVCache(config, num_blocks, block_size, self._device, weight.dtype)
        self._tables = BlockTables(num_blocks, block_size, -(-self._max_length // block_size))
        self._forward = Forward(model, self._cache, self._tables, exact=exact)
        self._scheduler: Scheduler[Generation] = Scheduler(
            self._tables,
            concurrency=concurrency,
            prefill_tokens=prefill_tokens,
            save=self._cache.save if preemption == "keep" else None,
        )
        self._is_behind = self._device.type == "cuda"  # reads the tokens of a step while the next one computes
        self._draft: Draft | None = None
        self._decoded: list[tuple[int, int]] = []  # the sequences of the last decoding step
        self._requests: dict[int, Generation] = {}
        self._next_id = 0
        self._texts: list[str] = []
        self._finders: dict[tuple[str, ...], StopFinder] = {}
        self._counts = dict.fromkeys(_COUNTS, 0)
        self._seconds = 0.0
        self._seen: dict[str, float] = {}

    @property
    def has_work(self) -> bool:
        """Whether :meth:`poll` has something to do."""
        return self._scheduler.has_work

    @property
    def stats(self) -> dict[str, int]:
        """Counts since the start.

        ``prefill_tokens`` computed in prefills (``recomputed_tokens`` of them not for the first time),
        ``prefix_hit_tokens`` that were stored already, ``decode_steps`` and ``decode_tokens``, ``attended_tokens`` that
        those saw, each sequence for itself, ``sampled_tokens``, ``copied_blocks`` on write, ``peak_blocks``,
        ``used_blocks`` and ``num_blocks`` of the cache, ``preemptions`` of running requests and ``evictions`` of idle
        ones.
        """
        return {
            **self._counts,
            "prefix_hit_tokens": self._scheduler.found_tokens,
            "recomputed_tokens": self._scheduler.recomputed_tokens,
            "used_blocks": self._tables.used_blocks,
            "peak_blocks": self._tables.peak_blocks,
            "num_blocks": self._tables.num_blocks,
            "preemptions": self._scheduler.preemptions,
            "evictions": self._scheduler.evictions,
        }

    def metrics(self) -> dict[str, float]:
        """Figures since the last call, by the names of a training record; the peak of the cache since the start.

        ``sampling/tokens_per_s`` counts the time inside :meth:`poll`; ``sampling/prefix_hit_rate`` is the share of the
        tokens of prompts and observations that were stored already. ``perf/mbu``, where the device's bandwidth is
        known, is the share of it that decoding needs: the weights once a step, and keys and values once a sequence, by
        the time inside :meth:`poll`, prefills included. Where the samples of a prompt read its keys together, less is
        read than that.
        """
        now = {**self.stats, "seconds": self._seconds}
        new = {name: value - self._seen.get(name, 0) for name, value in now.items()}
        self._seen = now
        prompts = new["prefix_hit_tokens"] + new["prefill_tokens"]
        found = {
            "sampling/tokens_per_s": new["sampled_tokens"] / new["seconds"] if new["seconds"] else 0.0,
            "sampling/prefix_hit_rate": new["prefix_hit_tokens"] / prompts if prompts else 0.0,
            "sampling/kv_peak_gib": now["peak_blocks"] * self._block_bytes / 2**30,
            "sampling/kv_peak_share": now["peak_blocks"] / now["num_blocks"],
            "sampling/preemptions": new["preemptions"],
        }
        if self._peak is not None:
            read = new["decode_steps"] * self._weight_bytes + new["attended_tokens"] * self._token_bytes
            found["perf/mbu"] = read / new["seconds"] / self._peak.bandwidth if new["seconds"] else 0.0
        return found

    def submit(self, prompt_ids: Sequence[int], params: SamplingParams, *, stream: tuple[int, int, int]) -> int:
        """Queues a prompt. Requests that wait with equal prompts have it prefilled once and share its blocks.

        Args:
            prompt_ids: token ids, at least one.
            params: how the first turn is sampled.
            stream: (task, sample, turn), the counter of its random numbers.

        Returns:
            The request's id, for :meth:`extend` and :meth:`cancel`.

        Raises:
            UserError: the prompt is empty, has an id out of range, or can never fit with ``max_tokens``.
        """
        if not len(prompt_ids):
            raise UserError("the prompt is empty, expected at least one token; give it some text")
        self._check(prompt_ids, 0, params)
        request = Generation(self._next_id, [int(token) for token in prompt_ids])
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

    def cancel(self, request_id: int) -> None:
        """Forgets a request, finished or not, and frees its memory.

        Raises:
            ValueError: the request is unknown.
        """
        self._scheduler.remove(self._find(request_id))
        del self._requests[request_id]

    def token_ids(self, request_id: int) -> Sequence[int]:
        """All ids of a request, prompt and observations included, as far as they were sampled and read.

        Raises:
            ValueError: the request is unknown.
        """
        return self._find(request_id).token_ids

    def is_waiting(self, request_id: int) -> bool:
        """Whether a request has not begun, or had to give its place up.

        Raises:
            ValueError: the request is unknown.
        """
        return self._find(request_id).state == "waiting"

    def poll(self) -> list[Completion]:
        """One step: prefills what can start, up to ``prefill_tokens``, and decodes one token of every running request.

        Returns:
            The turns that ended.
        """
        begin = time.perf_counter()
        with torch.inference_mode():
            done = self._prefill(self._scheduler.schedule())
            draft = self._decode()
            done += self._read()
            self._draft = draft
            if not self._is_behind:
                done += self._read()
        self._seconds += time.perf_counter() - begin
        return done

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, progress: bool = False
    ) -> list[Completion]:
        """Samples one turn for each prompt, in order; prompt i has the stream (i, 0, 0).

        Args:
            prompts: token ids, at least one each.
            params: of all.
            progress: show a progress bar.

        Raises:
            UserError: as :meth:`submit`.
            ValueError: requests submitted otherwise are not finished; their completions would get lost here.
        """
        if self.has_work:
            raise ValueError("generate was called while submitted requests run; finish them with poll, or cancel them")
        ids: list[int] = []
        done: dict[int, Completion] = {}
        with ExitStack() as stack:
            bar = stack.enter_context(ProgressBar(len(prompts), "sampling")) if progress else None
            try:
                for index, prompt in enumerate(prompts):
                    ids.append(self.submit(prompt, params, stream=(index, 0, 0)))
                while len(done) < len(ids):
                    for completion in self.poll():
                        done[completion.request_id] = completion
                        self.cancel(completion.request_id)
                        if bar is not None:
                            bar.advance()
            finally:
                for request_id in ids:
                    if request_id not in done:
                        self.cancel(request_id)
        return [done[request_id] for request_id in ids]

    def flush(self) -> None:
        """To be called when weights change: nothing computed before is read again.

        The cache's memory is given back until the next :meth:`poll`.
        """
        self._draft = None  # its tokens will be drawn again
        self._scheduler.flush()
        self._forward.forget()
        self._cache.free()

    def _find(self, request_id: int) -> Generation:
        if request_id not in self._requests:
            raise ValueError(f"request {request_id} is unknown; it was cancelled, or never submitted")
        return self._requests[request_id]

    def _check(self, token_ids: Sequence[int], length: int, params: SamplingParams) -> None:
        for what, ids in (("token id", token_ids), ("stop id", params.stop_ids)):
            if len(ids) and not 0 <= min(ids) <= max(ids) < self._vocab_size:
                wrong = next(token for token in ids if not 0 <= token < self._vocab_size)
                raise UserError(f"{what} {wrong} is out of range, the model has ids 0 to {self._vocab_size - 1}")
        total = length + len(token_ids) + params.max_tokens
        stored = self._tables.num_blocks * self._tables.block_size
        for limit, name in ((self._max_length, "max_position_embeddings"), (stored, "tokens that kv_memory holds")):
            if total > limit:
                raise UserError(
                    f"{length + len(token_ids)} tokens and max_tokens {params.max_tokens} make {total}, more than the "
                    f"{limit} {name}; shorten the prompt or lower max_tokens"
                )

    def _begin_turn(self, request: Generation, params: SamplingParams, stream: tuple[int, int, int]) -> None:
        request.params, request.stream = params, stream
        request.key = stream_key(params.seed, stream)
        request.start, request.logprobs, request.sampling_logprobs = len(request.token_ids), [], []
        finder = self._finders.get(params.stop)
        if finder is None:
            if params.stop and not self._texts:
                self._texts = [self._tokenizer.decode([i]) for i in range(self._vocab_size)]
            finder = self._finders[params.stop] = StopFinder(self._texts, self._tokenizer, params.stop)
        request.finder = finder

    def _prepare(self, copies: Copies) -> None:
        """The cache for what was just scheduled."""
        self._cache.prepare(self._tables.peak_blocks, self._tables.taken, copies)
        self._counts["copied_blocks"] += len(copies)

    def _prefill(self, step: Step[Generation]) -> list[Completion]:
        if not step.chunks:
            return []
        self._prepare(step.copies)
        for blocks, saved in step.restores:
            self._cache.load(blocks, saved)
        computed = [chunk for chunk in step.chunks if chunk.start < chunk.stop]
        rows = self._forward.prefill(computed) if computed else ()
        hidden = {chunk.request.number: row for chunk, row in zip(computed, rows, strict=True)}
        self._counts["prefill_tokens"] += sum(chunk.stop - chunk.start for chunk in computed)
        ended, last = [], []
        for request, _, stop, prompt in step.chunks:
            if stop == len(request.token_ids):
                if prompt is not None and request.number in hidden:
                    prompt.hidden = hidden[request.number]
                state = hidden.get(request.number, prompt.hidden if prompt is not None else None)
                assert state is not None
                ended.append(request)
                last.append(state)
        if not ended:
            return []
        return self._record(Draft(ended, self._forward.draw(torch.stack(last), draws_of(ended))))

    def _decode(self) -> Draft | None:
        """Computes the last token of every request that decodes, be it read or not, and draws another."""
        running = self._scheduler.running
        requests = [each for each in running if not each.prefilling and each.place < each.params.max_tokens]
        requests, copies = self._scheduler.make_room(requests)
        if not requests:
            return None
        self._prepare(copies)
        # Neighbours whose tables begin alike are the samples of one prompt.
        requests.sort(key=lambda each: int(self._tables.tables[each.row, 0]))
        rows = rows_of(requests)
        names = [(request.number, request.stops) for request in requests]
        drawn = self._forward.decode(
            self._last_ids(requests), rows, draws_of(requests), same_rows=names == self._decoded
        )
        self._decoded = names
        self._counts["decode_steps"] += 1
        self._counts["decode_tokens"] += len(requests)
        self._counts["attended_tokens"] += int(self._tables.lengths[rows].sum())
        return Draft(requests, drawn)

    def _last_ids(self, requests: Sequence[Generation]) -> Tensor:
        """[N] int64, the last token of each; of those that the host has not read the device knows them."""
        ids = torch.tensor([request.token_ids[-1] for request in requests]).to(self._device, non_blocking=True)
        if self._draft is None:
            return ids
        places = [self._draft.index[each.number] if each.drawn else -1 for each in requests]
        index = torch.tensor(places).to(self._device, non_blocking=True)
        return torch.where(index < 0, ids, self._draft.token_ids[index.clamp(min=0)])

    def _read(self) -> list[Completion]:
        draft, self._draft = self._draft, None
        return [] if draft is None else self._record(draft)

    def _record(self, draft: Draft) -> list[Completion]:
        """Appends the tokens to their requests; returns the turns that they end."""
        done: list[Completion] = []
        finished: list[Generation] = []
        for request, token, logprob, sampling_logprob in draft.read():
            reason = self._append(request, token, logprob, sampling_logprob)
            if reason:
                finished.append(request)
                done.append(self._completion(request, reason))
        self._scheduler.finish(finished)
        return done

    def _append(
        self, request: Generation, token: int, logprob: float, sampling_logprob: float
    ) -> Literal["stop", "length", "error", ""]:
        """Appends a token; says why it ends the turn, if it does."""
        if not math.isfinite(logprob):
            # What is not finite must not be found by others, nor be read in masked cells of blocks that it leaves.
            self._tables.forget_names()
            self._cache.distrust()
            return "error"
        request.token_ids.append(token)
        request.logprobs.append(logprob)
        request.sampling_logprobs.append(sampling_logprob)
        self._counts["sampled_tokens"] += 1
        self._scheduler.name(request)
        finder, params = request.finder, request.params
        assert finder is not None
        if token == self._tokenizer.eos_id or token in params.stop_ids:
            return "stop"
        if token in finder.alarm and finder.found(request.token_ids, request.start):
            return "stop"
        return "length" if len(request.logprobs) == params.max_tokens else ""

    def _completion(self, request: Generation, reason: Literal["stop", "length", "error"]) -> Completion:
        ids = request.token_ids[request.start :]
        error = ""
        if reason == "error":
            error = (
                f"request {request.number} got no finite log-probability at token {len(request.token_ids)}; look for "
                "weights that are not finite"
            )
        return Completion(
            request.number, ids, request.logprobs, request.sampling_logprobs, reason, self._tokenizer.decode(ids), error
        )
