"""A turn that is being sampled, the tokens that are on their way to it, and what becomes of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from ..kernels.sampling import Drawn
from .draw import Draws, SamplingParams
from .scheduler import Request
from .stop import StopFinder


@dataclass(frozen=True)
class Completion:
    """What the model wrote in one turn.

    ``logprobs`` are those of ``token_ids`` under softmax(logits / temperature), whatever top_k, top_p and min_p say (at
    temperature 0: under softmax(logits)); ``sampling_logprobs`` are those under what was drawn from (at temperature
    0: zeros). ``finish_reason`` is "stop" for a stop string, a stop id or the end token, which are part of
    ``token_ids``, "length" for ``max_tokens``, and "error" where the model gave no finite log-probability: ``error``
    then says which.
    """

    request_id: int
    token_ids: list[int]
    logprobs: list[float]
    sampling_logprobs: list[float]
    finish_reason: Literal["stop", "length", "error"]
    text: str
    error: str = ""


@dataclass(eq=False)
class Generation(Request):
    """A request with what sampling must know of it."""

    params: SamplingParams = field(default_factory=SamplingParams)
    stream: tuple[int, int, int] = (0, 0, 0)
    finder: StopFinder | None = None
    start: int = 0  # where the present turn begins in token_ids
    key: int = 0
    logprobs: list[float] = field(default_factory=list)
    sampling_logprobs: list[float] = field(default_factory=list)

    @property
    def place(self) -> int:
        """Place in the turn of the token that is drawn next."""
        return len(self.logprobs) + self.drawn


class Draft:
    """Tokens that the device draws, on their way to the host."""

    def __init__(self, requests: Sequence[Generation], drawn: Drawn) -> None:
        self.token_ids = drawn.tokens
        self.index = {request.number: index for index, request in enumerate(requests)}
        self._requests = [(request, request.stops) for request in requests]
        self._parts, self._ready = list(drawn), None
        if drawn.tokens.is_cuda:
            self._parts = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in drawn]
            for part, x in zip(self._parts, drawn, strict=True):
                part.copy_(x, non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record()
        for request in requests:
            request.drawn += 1

    def read(self) -> list[tuple[Generation, int, float, float]]:
        """Waits for them; leaves out those of requests that ceased to run meanwhile."""
        if self._ready is not None:
            self._ready.synchronize()
        rows = zip(self._requests, *(part.tolist() for part in self._parts), strict=True)
        mine = [(request, *values) for (request, stops), *values in rows if request.stops == stops]
        for request, *_ in mine:
            request.drawn -= 1
        return mine


def draws_of(requests: Sequence[Generation]) -> Draws:
    """How the next token of each request is drawn."""
    params = [request.params for request in requests]
    return Draws(
        np.array([request.key for request in requests], np.uint64).view(np.int64),
        np.array([request.place for request in requests], np.int64),
        np.array([each.temperature for each in params], np.float64),
        np.array([each.top_k for each in params], np.int32),
        np.array([each.top_p for each in params], np.float32),
        np.array([each.min_p for each in params], np.float32),
    )
