"""A model behind an OpenAI-compatible endpoint, asked by many threads, through outages and rate limits."""

import json
import math
import random
import re
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial

import httpx

from ..engine.errors import UserError
from .reply import Message, NoReply, Reply, Sampling

TRIES = 3  # replies that are of no use, then there is none
ATTEMPTS = 6  # of a request that fails, over about 12 s, in which a server may restart or a rate limit pass
LONG_ATTEMPTS = 10  # the same where nobody else waits, over about 3 minutes
FIRST_WAIT_S, MAX_WAIT_S = 0.5, 60.0  # doubled after each failure
PATIENCE_S = 300.0  # of a call, in which other ranks wait; no request begins later
CONNECT_S = 10.0
LOST_AFTER = 3  # questions in a row without a reply; the others of the call are not asked then
MAX_REPLY_BYTES = 2**20
LIKELIEST = Sampling()  # a verdict takes 10 tokens; a server that counts hidden reasoning needs the rest
TRANSIENT = frozenset({408, 409, 425, 429})  # and 500 to 599
REFUSALS = frozenset({400, 413, 422})  # of one request: it is too long, or its words are not wanted


class Endpoint:
    """Asks ``MODEL`` at ``URL/chat/completions``.

    Args:
        model: as the endpoint names it.
        url: http or https, up to and with ``/v1``.
        api_key: sent as a bearer token; empty: none. It goes to no other address: redirects are not followed.
        concurrency: requests at once.
        timeout_s: seconds of one request, from its begin to the last byte of its reply.
        sleep: waits between attempts.

    Raises:
        UserError: the address or the key is not one.
    """

    def __init__(
        self,
        model: str,
        url: str,
        *,
        api_key: str = "",
        concurrency: int = 8,
        timeout_s: float = 60.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        try:
            self._url = httpx.URL(url.rstrip("/") + "/chat/completions")
        except httpx.InvalidURL as error:
            raise UserError(f"the model's address {url} is not one ({error}); write http://HOST:PORT/v1") from error
        if not re.fullmatch("[!-~]*", api_key.strip()):
            raise UserError("OPENAI_API_KEY holds a blank or a character that no key has; set it again")
        self.identity = f"{model}@{url.rstrip('/')}"
        self._model, self._key, self._concurrency, self._timeout_s = model, api_key.strip(), concurrency, timeout_s
        self._sleep = sleep
        headers = {"Content-Type": "application/json"}
        headers["Accept-Encoding"] = "identity"  # what is not compressed cannot be larger than it came
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        timeout = httpx.Timeout(timeout_s, connect=min(CONNECT_S, timeout_s), pool=None)
        self._client = httpx.Client(headers=headers, timeout=timeout)
        weakref.finalize(self, self._client.close)
        self._places = threading.Semaphore(concurrency)
        self._lock = threading.Lock()
        self._failures = 0  # questions of `replies` in a row without a reply

    def reply(
        self,
        messages: Sequence[Message],
        sampling: Sampling = LIKELIEST,
        seed: int | None = None,
        *,
        attempts: int = LONG_ATTEMPTS,
        deadline: float = math.inf,
    ) -> Reply:
        """What the model says; threads may ask at once, and wait for a place.

        Args:
            messages: the conversation so far.
            sampling: how the reply is drawn.
            seed: of a server that draws by one.
            attempts: requests that may fail.
            deadline: on the monotonic clock; no attempt waits beyond it.

        Raises:
            NoReply: none came.
        """
        body: dict[str, object] = {"model": self._model, "messages": list(messages)}
        body |= {"temperature": sampling.temperature, "max_tokens": sampling.max_tokens}
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if seed is not None:
            body["seed"] = seed
        content = json.dumps(body).encode()
        attempt = 0
        while True:
            attempt += 1
            try:
                with self._places:
                    return self._request(content)
            except NoReply as error:
                wait_s = error.wait_s if error.wait_s is not None else _backoff_s(content, attempt)
                is_last = attempt >= attempts or time.monotonic() + wait_s > deadline
                if is_last or not error.is_transient:
                    raise
            self._sleep(wait_s)

    def replies(
        self, conversations: Sequence[Sequence[Message]], is_usable: Callable[[str], bool]
    ) -> list[str | NoReply]:
        """The likeliest reply to each conversation, or why there is none, within PATIENCE_S or little more.

        Args:
            conversations: what to reply to.
            is_usable: a reply that is not is asked for again, up to TRIES times in all; the last one counts.
        """
        # Once it was lost, one request tells whether it is back.
        attempts = 1 if self._failures >= LOST_AFTER else ATTEMPTS
        self._failures = min(self._failures, LOST_AFTER - 1)
        ask = partial(self._usable_reply, is_usable, attempts, time.monotonic() + PATIENCE_S)
        pool = ThreadPoolExecutor(self._concurrency, "endpoint")
        try:
            return list(pool.map(ask, conversations))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # of those left when the run is interrupted

    def _usable_reply(
        self, is_usable: Callable[[str], bool], attempts: int, deadline: float, messages: Sequence[Message]
    ) -> str | NoReply:
        if self._failures >= LOST_AFTER:
            return NoReply("it was lost a moment ago")
        if time.monotonic() > deadline:
            return NoReply(f"it took more than {PATIENCE_S:g} s for the others")
        text = ""
        for _ in range(TRIES):
            try:
                text = self.reply(messages, attempts=attempts, deadline=deadline).text
            except NoReply as error:
                if error.is_transient:
                    with self._lock:
                        self._failures += 1
                return error
            with self._lock:
                self._failures = 0
            if is_usable(text):
                break
        return text

    def _request(self, body: bytes) -> Reply:
        """What the model says, by one request."""
        begin = time.monotonic()
        try:
            with self._client.stream("POST", self._url, content=body) as response:
                content = self._read(response, begin)
        except httpx.HTTPError as error:
            raise NoReply(f"{type(error).__name__}{f': {error}' if str(error) else ''}") from error
        status = response.status_code
        if status != 200:
            where = response.headers.get("Location", "")
            said = f"a redirection to {where}" if where else one_line(content.decode(errors="replace"))
            said = said.replace(self._key, "KEY") if self._key else said
            is_transient = status in TRANSIENT or status >= 500
            wait_s = _retry_after_s(response.headers.get("Retry-After", ""))
            raise NoReply(f"status {status}, {said!r}", is_transient, wait_s, is_refusal=status in REFUSALS)
        kind = response.headers.get("Content-Type", "")
        if kind.partition(";")[0].strip().lower() != "application/json":
            raise NoReply(f"its reply is of type {kind!r}, expected application/json")
        return _reply_of(content)

    def _read(self, response: httpx.Response, begin: float) -> bytes:
        """The body, of bounded size in bounded time."""
        content = b""
        for part in response.iter_raw():
            content += part
            if len(content) > MAX_REPLY_BYTES:
                raise NoReply(f"its reply has more than {MAX_REPLY_BYTES} bytes")
            if time.monotonic() - begin > self._timeout_s:
                raise NoReply(f"its reply took more than {self._timeout_s:g} s")
        return content


def _reply_of(content: bytes) -> Reply:
    """The reply in a chat completion of one choice."""
    try:
        completion = json.loads(content)
        [choice] = completion["choices"]
        text = choice["message"]["content"]
        is_cut = choice.get("finish_reason") == "length"
        usage = completion.get("usage") or {}
        counts = [usage.get(name, 0) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise NoReply("its reply is no chat completion of one choice") from error
    if not isinstance(text, str):
        raise NoReply("its reply has no text", is_refusal=True)
    prompt_tokens, completion_tokens = (count if type(count) is int and count > 0 else 0 for count in counts)
    # What JSON can hold and UTF-8 cannot, half a character, could be kept nowhere.
    return Reply(text.encode(errors="replace").decode(), is_cut, prompt_tokens, completion_tokens)


def _backoff_s(body: bytes, attempt: int) -> float:
    """Exponential, less up to a half by what is asked, so that requests that failed together come again apart."""
    shift = random.Random(b"%d%b" % (attempt, body)).random()
    return min(FIRST_WAIT_S * 2 ** (attempt - 1), MAX_WAIT_S) * (1 - shift / 2)


def _retry_after_s(header: str) -> float | None:
    """Seconds of a Retry-After header, which gives them or a date (RFC 9110, 10.2.3); None where it does neither."""
    try:
        if header.isdecimal():
            return min(float(header), MAX_WAIT_S)
        left = parsedate_to_datetime(header) - datetime.now(UTC)
    except (ValueError, TypeError):  # no date, or one without a time zone
        return None
    return min(max(left.total_seconds(), 0.0), MAX_WAIT_S)


def one_line(text: str) -> str:
    """The head of a text, for a message."""
    return " ".join(text.split())[:200]
