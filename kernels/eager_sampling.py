"""Drawing a token of each row in plain PyTorch: the oracle of the Triton form, and what serves a CPU.

Shapes: N rows, V vocabulary, C rows of a chunk. On a CPU the time goes to passes over the logits; so the rows are taken
in chunks whose buffers stay in the cache, and each pass writes in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

# The hash of (key, position, v): SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) read at a place gives two words for a
# row, and a multiply-xorshift hash of 32 bits, with the constants of C. Wellons's lowbias32, mixes each with v.
GOLDEN_64 = 0x9E3779B97F4A7C15
GOLDEN_32 = 0x9E3779B9
MIX_64 = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
MIX_32 = (0x21F0AAAD, 0x735A2D97)
# u = (h + 0.5) * UNIT is below 1 for the largest h too, which rounds to 2^32 in float32.
UNIT = 2.0**-32 - 2.0**-56
# Logits of a chunk: its three buffers take 1 MiB each. Smaller ones pay for more starts of threads than caches save.
CHUNK_LOGITS = 1 << 18


class Drawn(NamedTuple):
    """A token of each row, with its log-probabilities before and after truncation."""

    tokens: Tensor  # [N] int64
    logprobs: Tensor  # [N] float32, under softmax(logits / temperature)
    sampling_logprobs: Tensor  # [N] float32, under what was drawn from: after top_k, top_p and min_p


def sample_tokens(
    logits: Tensor,
    keys: Tensor,
    positions: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
) -> Drawn:
    """A token of each row; arguments and results as ``kernels.sample_tokens``."""
    num_rows, num_vocab = logits.shape
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    results = Drawn(tokens, *torch.empty(2, num_rows, device=logits.device))
    places = vocabulary_places(num_vocab, logits.device)
    per_row = (logits, row_words(keys, positions), temperature, top_k, top_p, min_p)
    size = max(1, CHUNK_LOGITS // num_vocab)
    buffers = torch.empty(3, min(size, num_rows), num_vocab, dtype=torch.float32, device=logits.device)
    greedy = temperature == 0
    for kind in (greedy, ~greedy):
        members = kind.nonzero()[:, 0]
        for first in range(0, len(members), size):
            chunk: slice | Tensor = members[first : first + size]
            if len(members) == num_rows:
                chunk = slice(first, first + size)  # neighbours are read where they are
            some, *settings = (x[chunk] for x in per_row)
            space = buffers[:, : len(some)]
            found = _most_likely(some, space[0]) if kind is greedy else _draw(some, settings, places, space)
            for result, values in zip(results, found, strict=True):
                result[chunk] = values
    return results


def _most_likely(logits: Tensor, space: Tensor) -> Drawn:  # [C,V] twice
    logits = logits.float()
    tokens = _by_row(np.argmax, logits)
    chances = torch.softmax(logits, 1, out=space)
    logprobs = chances.gather(1, tokens[:, None])[:, 0].log()
    return Drawn(tokens, logprobs, logprobs - logprobs)  # 0, or NaN as those


def _draw(logits: Tensor, settings: list[Tensor], places: Tensor, space: Tensor) -> Drawn:  # [C,V], [C], [V], [3,C,V]
    """Of all tokens that are kept, token v with p_v / E_v the largest: Gumbel-max, without its second logarithm."""
    words, temperature, *truncation = settings
    x, chances, exponential = space
    bits = hashed(words, places, x.view(torch.int32), chances.view(torch.int32)).view(torch.uint32)
    exponential.copy_(bits).add_(0.5).mul_(-UNIT).log1p_()  # -E_v
    torch.div(logits.float(), temperature[:, None], out=x)
    torch.softmax(x, 1, out=chances)
    kept = chances
    if truncates(*truncation).any():
        x.masked_fill_(x < thresholds(x, *truncation)[:, None], -torch.inf)
        kept = torch.softmax(x, 1, out=x)
    tokens = _by_row(np.argmin, torch.div(kept, exponential, out=exponential))
    logprobs, sampling_logprobs = (each.gather(1, tokens[:, None])[:, 0].log() for each in (chances, kept))
    return Drawn(tokens, logprobs, sampling_logprobs)


def truncates(top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    return (top_k > 0) | (top_p < 1) | (min_p > 0)


def thresholds(x: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The lowest of the x [C,V] that each row keeps, [C]; arguments as ``kernels.sample_tokens``, x / temperature."""
    lowest = x.amax(1) + min_p.log()
    rows = ((top_k > 0) | (top_p < 1)).nonzero()[:, 0]
    if len(rows):
        num_vocab = x.shape[1]
        ordered = _by_row(np.sort, x[rows])
        count = torch.where(top_k > 0, top_k, num_vocab)[rows].clamp(max=num_vocab)[:, None]
        ordered.masked_fill_(ordered < ordered.gather(1, num_vocab - count.long()), -torch.inf)
        mass = torch.softmax(ordered, 1).cumsum(1, dtype=torch.float64)
        # What is more likely than a token has less than top_p: what is not has more than the rest.
        rest = (1 - top_p[rows, None].double()) * mass[:, -1:]
        last = torch.searchsorted(mass, rest, right=True).clamp_(max=num_vocab - 1)
        lowest[rows] = torch.maximum(lowest[rows], ordered.gather(1, last)[:, 0])
    return lowest


def _by_row(function: Callable[..., Any], x: Tensor) -> Tensor:
    """NumPy's own over each row: it sorts and finds the largest by vector instructions, where PyTorch does not."""
    return torch.from_numpy(function(x.cpu().numpy(), axis=1)).to(x.device)


def row_words(keys: Tensor, positions: Tensor) -> Tensor:  # [N] int64 twice -> [N,2] int32
    """The two words of each row's hash, the low half first."""
    x = keys + (positions + 1) * _signed(GOLDEN_64)
    for shift, factor in zip((30, 27), MIX_64, strict=True):
        x = (x ^ _shifted(x, shift)) * _signed(factor)
    x ^= _shifted(x, 31)
    return torch.stack((x, x >> 32), 1).to(torch.int32)


def _signed(x: int) -> int:
    return x - (1 << 64)


def _shifted(x: Tensor, shift: int) -> Tensor:
    return (x >> shift) & ((1 << 64 - shift) - 1)  # PyTorch's own shift repeats the sign


def vocabulary_places(num_vocab: int, device: torch.device) -> Tensor:  # [V] int32
    return (torch.arange(num_vocab, device=device) * GOLDEN_32).to(torch.int32)


def hashed(words: Tensor, places: Tensor, out: Tensor, spare: Tensor) -> Tensor:  # [C,2], [V], [C,V] twice; int32
    """The bits h_v of each row; ``places`` are the v times GOLDEN_32, what ``spare`` holds is lost."""
    torch.bitwise_xor(places, words[:, :1], out=out)
    _xorshift(out, 16, spare)
    out.mul_(MIX_32[0]).bitwise_xor_(words[:, 1:])
    _xorshift(out, 15, spare)
    out.mul_(MIX_32[1])
    _xorshift(out, 15, spare)
    return out


def _xorshift(bits: Tensor, shift: int, spare: Tensor) -> None:
    torch.bitwise_right_shift(bits, shift, out=spare)
    bits.bitwise_xor_(spare.bitwise_and_((1 << 32 - shift) - 1))
