"""How tokens are drawn: the settings of a turn, and the name of its random numbers.

The random number of a token is read from a counter, (seed, task, sample, turn, position), so it does not depend on
what was drawn before it or beside it. ``kernels.sampling`` draws by it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

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
        min_p: keep tokens at least so likely as a share of the most likely one, after ``top_p``; 0 keeps all.
        max_tokens: tokens of the turn, at most.
        stop: strings that end the turn; the tokens that spell them are kept.
        stop_ids: token ids that end the turn beside the tokenizer's end token; they are kept.
        seed: of the random numbers.

    Raises:
        UserError: a value out of its range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        checks = (
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("stop", not isinstance(self.stop, str) and all(self.stop), "a tuple of strings that are not empty"),
        )
        for name, good, expected in checks:
            if not good:
                found = getattr(self, name)
                raise UserError(f"{name} is {found!r}, expected {expected}; correct the sampling settings")


class Draws(NamedTuple):
    """How the next token of each of N sequences is drawn, in the order of ``kernels.sample_tokens``."""

    keys: NDArray[np.int64]
    positions: NDArray[np.int64]
    temperature: NDArray[np.float64]  # as the trainer divides by it; drawn by in float32
    top_k: NDArray[np.int32]
    top_p: NDArray[np.float32]
    min_p: NDArray[np.float32]


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
