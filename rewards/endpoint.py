"""A model behind an OpenAI-compatible endpoint, asked for verdicts by many threads, through outages and rate limits."""

import json
import random
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx

from ..engine.errors import UserError
from .verdict import SYSTEM, parse

TRIES = 3  # replies that are no verdict, then there is none
ATTEMPTS = 6  # of a request that fails, over about 12 s, in which a server may restart or a rate limit pass
FIRST_WAIT_S, MAX_WAIT_S = 0.5, 60.0  # doubled after each failure
PATIENCE_S = 300.0  # of a call, in which other ranks wait; no request begins later
CONNECT_S = 10.0
LOST_AFTER = 3  # questions in a row without a reply; the others of the call are not asked then
MAX_REPLY_BYTES = 2**20
MAX_TOKENS = 1024  # a verdict takes 10; a server that counts hidden reasoning needs the rest
TRANSIENT = frozenset({408, 409, 425, 429})  # and 500 to 599


class Endpoint:
    """Asks ``MODEL`` at ``URL/chat/completions``, at temperature 0.

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
            raise UserError(f"the judge's address {url} is not one ({error}); write http://HOST:PORT/v1") from error
        if not re.fullmatch("[!-~]*", api_key.strip()):
            raise UserError("OPENAI_API_KEY holds a blank or a character that no key has; set it again")
        self.identity = f"{model}@{url.rstrip('/')}"
        self._model, self._key, self._concurrency, self._timeout_s = model, api_key.strip(), concurrency, timeout_s
        self._sleep = sleep
        self._lock = threading.Lock()
        self._failures = 0  # questions in a row without a reply

    def verdicts(self, prompts: Sequence[str]) -> list[bool | str]:
        """The verdict on each prompt, or the reason why there is none."""
        # Once it was lost, one request tells whether it is back.
        attempts = 1 if self._failures >= LOST_AFTER else ATTEMPTS
        self._failures = min(self._failures, LOST_AFTER - 1)
        headers = {"Accept-Encoding": "identity"}  # what is not compressed cannot be larger than it came
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        timeout = httpx.Timeout(self._timeout_s, connect=min(CONNECT_S, self._timeout_s), pool=None)
        limits = httpx.Limits(max_connections=self._concurrency)
        with httpx.Client(headers=headers, timeout=timeout, limits=limits) as client:
            pool = ThreadPoolExecutor(self._concurrency, "judge")
            try:
                call = _Call(client, attempts, time.monotonic() + PATIENCE_S)
                return list(pool.map(lambda prompt: self._verdict(call, prompt), prompts))
            finally:
                pool.shutdown(wait=False, cancel_futures=True)  # of those left when the run is interrupted

    def _verdict(self, call: "_Call", prompt: str) -> bool | str:
        if self._failures >= LOST_AFTER:
            return "it was lost a moment ago"
        if time.monotonic() > call.deadline:
            return f"it took more than {PATIENCE_S:g} s for the others"
        reply = ""
        try:
            for _ in range(TRIES):
                reply = self._patiently(call, prompt)
                if (verdict := parse(reply)) is not None:
                    return verdict
        except _NoReply as error:
            return str(error)
        return f"its reply is no verdict: {_one_line(reply)!r}"

    def _patiently(self, call: "_Call", prompt: str) -> str:
        """A reply, by up to so many attempts."""
        attempt = 0
        while True:
            attempt += 1
            try:
                reply = self._reply(call.client, prompt)
            except _NoReply as error:
                if not error.is_transient:
                    raise
                wait_s = error.wait_s if error.wait_s is not None else _backoff_s(prompt, attempt)
                if attempt >= call.attempts or time.monotonic() + wait_s > call.deadline:
                    with self._lock:
                        self._failures += 1
                    raise
                self._sleep(wait_s)
            else:
                with self._lock:
                    self._failures = 0
                return reply

    def _reply(self, client: httpx.Client, prompt: str) -> str:
        """What the model says, by one request."""
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}]
        begin = time.monotonic()
        body = {"model": self._model, "messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS}
        try:
            with client.stream("POST", self._url, json=body) as response:
                content = self._read(response, begin)
        except httpx.HTTPError as error:
            raise _NoReply(f"{type(error).__name__}{f': {error}' if str(error) else ''}") from error
        status = response.status_code
        if status != 200:
            where = response.headers.get("Location", "")
            said = f"a redirection to {where}" if where else _one_line(content.decode(errors="replace"))
            said = said.replace(self._key, "KEY") if self._key else said
            is_transient = status in TRANSIENT or status >= 500
            wait_s = _retry_after_s(response.headers.get("Retry-After", ""))
            raise _NoReply(f"status {status}, {said!r}", is_transient, wait_s)
        kind = response.headers.get("Content-Type", "")
        if kind.partition(";")[0].strip().lower() != "application/json":
            raise _NoReply(f"its reply is of type {kind!r}, expected application/json")
        try:
            [choice] = json.loads(content)["choices"]
            reply = choice["message"]["content"]
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise _NoReply("its reply is no chat completion of one choice") from error
        if not isinstance(reply, str):
            raise _NoReply("its reply has no text")
        return reply

    def _read(self, response: httpx.Response, begin: float) -> bytes:
        """The body, of bounded size in bounded time."""
        content = b""
        for part in response.iter_raw():
            content += part
            if len(content) > MAX_REPLY_BYTES:
                raise _NoReply(f"its reply has more than {MAX_REPLY_BYTES} bytes")
            if time.monotonic() - begin > self._timeout_s:
                raise _NoReply(f"its reply took more than {self._timeout_s:g} s")
        return content


@dataclass(frozen=True)
class _Call:
    """What the questions of one call share: connections, attempts of a request, and when the last may begin."""

    client: httpx.Client
    attempts: int
    deadline: float


class _NoReply(Exception):
    """Why a request had no reply, whether another attempt may have one, and what the server says when."""

    def __init__(self, reason: str, is_transient: bool = True, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.is_transient, self.wait_s = is_transient, wait_s


def _backoff_s(prompt: str, attempt: int) -> float:
    """Exponential, less up to a half by the prompt, so that requests that failed together come again apart."""
    return min(FIRST_WAIT_S * 2 ** (attempt - 1), MAX_WAIT_S) * (1 - random.Random(f"{attempt}{prompt}").random() / 2)


def _retry_after_s(header: str) -> float | None:
    """Seconds of a Retry-After header, which gives them or a date (RFC 9110, 10.2.3); None where it does neither."""
    try:
        if header.isdecimal():
            return min(float(header), MAX_WAIT_S)
        left = parsedate_to_datetime(header) - datetime.now(UTC)
    except (ValueError, TypeError):  # no date, or one without a time zone
        return None
    return min(max(left.total_seconds(), 0.0), MAX_WAIT_S)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]
