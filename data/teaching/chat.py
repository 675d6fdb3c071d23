"""A teacher model as the pipeline sees it: it replies to messages, and what it said once is never asked for again.

    chat = open_chat("qwen2.5-72b-instruct@https://host/v1", run_folder / "replies.jsonl")
    chat.check()                                                        # one sentence if it cannot be reached
    reply = chat.reply([{"role": "user", "content": "Name a colour."}], Sampling(temperature=0.7), sample=2)

Each reply is on disk before it is used. A run that was stopped and started again goes the same way, asks only for what
it had no reply to, and so makes the same data.
"""

import json
import re
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import torch

from ...engine.errors import UserError
from ...rewards.kept import Kept
from ...rewards.open import open_model
from ...rewards.reply import Message, NoReply, Reply, Sampling
from ...rollout.grammar import neutralise

HELLO: list[Message] = [{"role": "user", "content": "Are you ready? Reply with one word."}]
MAX_TOKENS = 2048  # of a local model's reply


class Replies(Protocol):
    """A model: its name among the keys of replies, and its reply, drawn by a seed where it can; threads may ask."""

    @property
    def identity(self) -> str: ...

    def reply(self, messages: Sequence[Message], sampling: Sampling, seed: int) -> Reply: ...


class Refused(Exception):
    """The model replies, but not to these messages; the message says why."""


@dataclass(frozen=True)
class Cost:
    """What the different replies of a run cost, those from before an interruption included, `asked` of them now."""

    replies: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    asked: int = 0


class ReplyCache(Kept[Reply]):
    """Replies by key on disk, see `Kept`.

    Args:
        file: made if absent, with its folder.

    Raises:
        UserError: it cannot be read or written.
    """

    def __init__(self, file: Path) -> None:
        super().__init__(file, "the teacher's replies", "reply", asdict, _to_reply)


def _to_reply(value: object) -> Reply | None:
    if not isinstance(value, dict) or value.keys() != asdict(Reply("")).keys():
        return None
    reply = Reply(**value)
    types = str, bool, int, int
    return reply if tuple(map(type, asdict(reply).values())) == types else None


class Chat:
    """Replies from a cache and, where it has none, from a model. Any number of threads may ask.

    Args:
        model: what is asked.
        cache: what it said before.
        spec: how its user named it.
    """

    def __init__(self, model: Replies, cache: ReplyCache, spec: str) -> None:
        self._model, self._cache, self._spec = model, cache, spec
        self._lock = threading.Lock()
        self._asking: dict[str, Future[Reply]] = {}
        self._used: dict[str, Reply] = {}
        self._asked = 0
        self._lost = ""

    def check(self) -> None:
        """Has the model reply once, anew.

        Raises:
            UserError: it does not.
        """
        try:
            self._model.reply(HELLO, Sampling(max_tokens=16), 0)
        except NoReply as error:
            raise UserError(
                f"the teacher {self._spec} gives no reply ({error}); mend it or name another one"
            ) from error

    def reply(self, messages: Sequence[Message], sampling: Sampling, sample: int = 0) -> Reply:
        """The reply to a conversation, always the same one; it blocks until it is there.

        Args:
            messages: the conversation so far.
            sampling: how the reply is drawn.
            sample: another number has another reply, unless the temperature is 0.

        Raises:
            Refused: the model does not reply to these messages.
            UserError: the model is lost, so that the run must end here; what it said is kept.
        """
        asked = [self._model.identity, list(messages), asdict(sampling), sample]
        key = sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        with self._lock:
            if (kept := self._cache.get(key)) is not None:
                self._used[key] = kept
                return kept
            future = self._asking.get(key)
            if future is None:
                if self._lost:
                    raise UserError(self._lost)
                self._asking[key] = Future()
        if future is not None:
            return future.result()
        try:
            reply = self._ask(key, messages, sampling)
        except BaseException as error:  # others may wait for it
            self._asking.pop(key).set_exception(error)
            raise
        self._asking.pop(key).set_result(reply)
        return reply

    def _ask(self, key: str, messages: Sequence[Message], sampling: Sampling) -> Reply:
        try:
            reply = self._model.reply(messages, sampling, int(key[:7], 16))
        except NoReply as error:
            if error.is_refusal:
                raise Refused(str(error)) from error
            self._lost = (
                f"the teacher {self._spec} gives no reply ({error}); what it said is kept: mend it and start again"
            )
            raise UserError(self._lost) from error
        with self._lock:
            self._cache.add({key: reply})
            self._used[key] = reply
            self._asked += 1
        return reply

    def cost(self) -> Cost:
        """Of the replies since the start; the same after an interruption but for `asked`."""
        with self._lock:
            used = list(self._used.values())
            prompt_tokens = sum(reply.prompt_tokens for reply in used)
            completion_tokens = sum(reply.completion_tokens for reply in used)
            return Cost(len(used), prompt_tokens, completion_tokens, self._asked)


def open_chat(
    spec: str,
    cache_file: Path,
    *,
    device: torch.device | None = None,
    concurrency: int = 8,
    timeout_s: float = 180.0,
) -> Chat:
    """A teacher by its name; it is asked nothing yet.

    Args:
        spec: ``MODEL@http://HOST:PORT/v1`` or a Hugging Face folder, see ``open_model``.
        cache_file: its replies are kept there; runs may share it.
        device: of a local model; None: the CPU.
        concurrency: requests at once.
        timeout_s: seconds of one request.

    Raises:
        UserError: ``spec`` is neither, the folder does not hold a model, or the cache cannot be read.
    """
    cache = ReplyCache(cache_file)
    model = open_model(
        spec, "teacher", device=device, concurrency=concurrency, timeout_s=timeout_s, max_tokens=MAX_TOKENS
    )
    return Chat(model, cache, spec)


def enclose(name: str, text: str) -> str:
    """Text from outside between ``<name>`` and ``</name>``; it can end neither this nor any tag of a grammar."""
    return f"<{name}>\n{re.sub(rf'<(?=/?{name}>)', '< ', neutralise(text), flags=re.IGNORECASE)}\n</{name}>"


def enclosed(name: str, reply: str) -> str | None:
    """What a reply holds between its one ``<name>`` and its one ``</name>``, stripped; None for any other reply."""
    parts = re.split(rf"(</?{name}>)", reply)
    if len(parts) != 5 or (parts[1], parts[3]) != (f"<{name}>", f"</{name}>"):
        return None
    return parts[2].strip() or None
