"""How one token is drawn: its settings, its random number, and the choice.

The random number of a token is read from a counter, (seed, task, sample, turn, position), so it does not depend on
what was drawn before it or beside it.

Legend: N sequences, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..engine.errors import UserError

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class SamplingParams:
    """How one turn is sampled.

    Args:
        temperature: divides the logits; 0 takes the most likely token.
        top_p: keep the fewest most likely tokens whose probability reaches this, after ``top_k``; 1 keeps all.
        top_k: keep so many most likely tokens; 0 keeps all.
        max_tokens: tokens of the turn, at most.
        stop: strings that end the turn; the tokens that spell them are kept.
        seed: of the random numbers.

    Raises:
        UserError: a value out of its range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        checks = (
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("stop", not isinstance(self.stop, str) and all(self.stop), "a tuple of strings that are not empty"),
        )
        for name, good, expected in checks:
            if not good:
                found = getattr(self, name)
                raise UserError(f"{name} is {found!r}, expected {expected}; correct the sampling settings")


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def stream_key(seed: int, stream: Sequence[int]) -> int:
    """The 64-bit name of one turn's random stream, from the seed and (task, sample, turn)."""
    key = _mix((seed + _GOLDEN) & _MASK)
    for part in stream:
        key = _mix(((key + _GOLDEN) & _MASK) ^ (part & _MASK))
    return key


def uniforms(keys: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.float64]:
    """A number in [0, 1) for each (key, position): SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) read at a place."""
    x = keys + (positions + np.uint64(1)) * np.uint64(_GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    # 40 bits: so that u times a float64 total is always below the total.
    return (x >> np.uint64(24)) * 2.0**-40


def choose(
    logits: Tensor, uniform: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Draws a token of each row by inverting the cumulative distribution.

    Args:
        logits: [N,V] float32.
        uniform: [N] float64 in [0, 1).
        temperature, top_k, top_p: as in :class:`SamplingParams`.

    Returns:
        ``(tokens[N] int64, logprobs[N] float32)``, the latter under softmax(logits / temperature).
    """
    if temperature == 0:
        logprobs = torch.log_softmax(logits, 1)
        tokens = logits.argmax(1, keepdim=True)
        return tokens[:, 0], logprobs.gather(1, tokens)[:, 0]
    logprobs = torch.log_softmax(logits / temperature if temperature != 1 else logits, 1)
    chances = logprobs.exp()
    order = None
    if top_k or top_p < 1:
        chances, order = chances.sort(dim=1, descending=True, stable=True)
        if top_k:
            chances[:, top_k:] = 0
        if top_p < 1:
            before = chances.cumsum(1, dtype=torch.float64) - chances
            chances = chances.masked_fill(before >= top_p * chances.sum(1, keepdim=True, dtype=torch.float64), 0)
    total = chances.cumsum(1, dtype=torch.float64)
    tokens = torch.searchsorted(total, total[:, -1:] * uniform[:, None], right=True)
    # Only rows of NaN, which the caller reports, can run past the end.
    tokens = tokens.clamp_(max=logits.shape[1] - 1)
    tokens = tokens if order is None else order.gather(1, tokens)
    return tokens[:, 0], logprobs.gather(1, tokens)[:, 0]
