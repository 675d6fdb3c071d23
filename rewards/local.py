"""A model in a Hugging Face folder, asked by one caller for many replies or by many threads for one each."""

import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path

import torch

from ..engine.hf import load_hf
from ..engine.tokenizer import TURN_END, TURN_START, Tokenizer
from ..rollout.cache import KVCache
from ..rollout.draw import SamplingParams
from ..rollout.generation import Completion
from ..rollout.sampler import Sampler
from .reply import Message, NoReply, Reply, Sampling

PROMPT_TOKENS = 8192  # at most
BLOCK_SIZE = 16
CONTROL = re.compile(r"<(?=\|\w+\|>)")

Request = tuple[list[int], SamplingParams, Future[Completion]]


class LocalModel:
    """A Hugging Face folder in our own sampler.

    Args:
        folder: of an instruct model with ChatML prompts.
        device: where it computes; in bfloat16 on CUDA, else in float32.
        concurrency: replies at once.
        max_tokens: of a reply, at most; it has memory for no more.

    Raises:
        UserError: the folder does not hold a model with its tokenizer.
    """

    def __init__(self, folder: Path, device: torch.device, concurrency: int, max_tokens: int) -> None:
        self._tokenizer = Tokenizer.from_folder(folder)
        model = load_hf(folder, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        self._tokenizer.check_fits(model.config)
        length = model.config.max_position_embeddings
        self._max_tokens = min(max_tokens, length // 2)
        self._prompt_tokens = min(PROMPT_TOKENS, length - self._max_tokens)
        blocks = concurrency * (-(-(self._prompt_tokens + self._max_tokens) // BLOCK_SIZE) + 1)
        memory = blocks * KVCache.block_bytes(model.config, BLOCK_SIZE, model.output_weight.dtype)
        self._sampler = Sampler(
            model, self._tokenizer, kv_memory=memory / 2**30, block_size=BLOCK_SIZE, concurrency=concurrency
        )
        self._device = device
        files = [(file.name, file.stat()) for file in sorted(folder.iterdir())]
        states = [(name, state.st_size, state.st_mtime_ns) for name, state in files]
        self.identity = f"{folder.resolve()} {states}"  # another model in the same place is another one
        self._lock = threading.Lock()
        self._waiting: list[Request] = []
        self._is_working = False

    def reply(self, messages: Sequence[Message], sampling: Sampling, seed: int) -> Reply:
        """What the model says; what threads ask at once is decoded together. Not while `replies` runs.

        Args:
            messages: the conversation so far.
            sampling: how the reply is drawn.
            seed: of the random numbers.

        Raises:
            NoReply: the conversation is too long, or the weights are not finite.
        """
        ids = self._encode(messages)
        if len(ids) > self._prompt_tokens:
            raise self._too_long(ids)
        max_tokens = min(sampling.max_tokens, self._max_tokens)
        params = SamplingParams(temperature=sampling.temperature, max_tokens=max_tokens, stop=sampling.stop, seed=seed)
        future: Future[Completion] = Future()
        with self._lock:
            self._waiting.append((ids, params, future))
            if not self._is_working:
                self._is_working = True
                threading.Thread(target=self._work, name="local model", daemon=True).start()
        completion = future.result()
        if completion.error:
            raise NoReply(completion.error, is_transient=False)
        is_cut = completion.finish_reason == "length"
        return Reply(self._text(completion), is_cut, len(ids), len(completion.token_ids))

    def replies(
        self, conversations: Sequence[Sequence[Message]], is_usable: Callable[[str], bool]
    ) -> list[str | NoReply]:
        """The likeliest reply to each conversation, or why there is none; as `Endpoint.replies`.

        ``is_usable`` is not asked: the likeliest reply would come again.
        """
        prompts = [self._encode(messages) for messages in conversations]
        short = [ids for ids in prompts if len(ids) <= self._prompt_tokens]
        params = SamplingParams(temperature=0.0, max_tokens=self._max_tokens)
        completions = iter(self._sampler.generate(short, params))
        self._sampler.flush()  # a policy in training has use for the cache's memory
        found: list[str | NoReply] = []
        for ids in prompts:
            if len(ids) > self._prompt_tokens:
                found.append(self._too_long(ids))
                continue
            completion = next(completions)
            found.append(NoReply(completion.error) if completion.error else self._text(completion))
        return found

    def _work(self) -> None:
        """Decodes what waits and what comes meanwhile, and ends with the last reply."""
        flying: dict[int, Future[Completion]] = {}
        with ExitStack() as stack:
            if self._device.type == "cuda":  # each thread has a device of its own
                stack.enter_context(torch.cuda.device(self._device))
            try:
                while True:
                    with self._lock:
                        new, self._waiting = self._waiting, []
                        self._is_working = bool(new or flying)
                    if not (new or flying):
                        return
                    for ids, params, future in new:
                        flying[self._sampler.submit(ids, params, stream=(0, 0, 0))] = future
                    for completion in self._sampler.poll():
                        self._sampler.cancel(completion.request_id)
                        flying.pop(completion.request_id).set_result(completion)
            except BaseException as error:  # every thread that waits must learn it
                with self._lock:
                    new, self._waiting, self._is_working = [*new, *self._waiting], [], False
                for number in flying:
                    self._sampler.cancel(number)
                for future in {*flying.values(), *(future for _, _, future in new)}:
                    future.set_exception(error)

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        return self._tokenizer.encode(chat_text(messages))

    def _text(self, completion: Completion) -> str:
        return self._tokenizer.decode([token for token in completion.token_ids if token != self._tokenizer.eos_id])

    def _too_long(self, ids: Sequence[int]) -> NoReply:
        reason = f"the prompt has {len(ids)} tokens, and the model reads {self._prompt_tokens}"
        return NoReply(reason, is_transient=False, is_refusal=True)


def chat_text(messages: Sequence[Message]) -> str:
    """A conversation as ChatML, up to where the assistant writes; no message can end itself or begin another one."""
    written = [f"{TURN_START}{each['role']}\n{_harmless(each['content'])}{TURN_END}\n" for each in messages]
    return f"{''.join(written)}{TURN_START}assistant\n"


def _harmless(text: str) -> str:
    return CONTROL.sub(r"<\\", text)
