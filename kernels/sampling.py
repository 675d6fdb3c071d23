"""Drawing a token of each row on the device: Gumbel-max over the tokens that temperature, top_k, top_p and min_p leave.

Shapes: N rows, V vocabulary, S slices of the vocabulary.

Two launches, whatever the rows' settings. A program of the first takes a slice of a row: its maximum, its sum of
exponentials, and its best token where the row keeps all. A program of the second joins a row's slices in their order;
of a row that is truncated it finds what is kept and draws from that. How the vocabulary is cut depends on V alone.

What top_k and top_p keep is a threshold on the logits, found by halving the interval of float32's bit patterns, which
are ordered as the numbers are: 32 passes over a row that stays in the second-level cache, and no sort.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import eager
from .dispatch import jit, tl, triton, triton_serves
from .eager_sampling import Drawn

# Columns of a slice: 16 a thread, and 38 programs for a row of 152,064, so that one row alone is not one core's work.
SLICE = 4096
SLICE_WARPS = 8
# Columns of a step of the second launch, which is one program a row: 16 a thread.
BLOCK = 8192
BLOCK_WARPS = 16


@jit
def _words(key, position):  # type: ignore[no-untyped-def]
    """The two words of a row's hash, as ``eager_sampling.row_words``."""
    x = key.to(tl.uint64) + (position.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x ^= x >> 31
    return x.to(tl.uint32), (x >> 32).to(tl.uint32)


@jit
def _hashed(columns, low_word, high_word):  # type: ignore[no-untyped-def]
    """The bits h_v, as ``eager_sampling.hashed``."""
    bits = (columns.to(tl.uint32) * 0x9E3779B9) ^ low_word
    bits = ((bits ^ (bits >> 16)) * 0x21F0AAAD) ^ high_word
    bits = (bits ^ (bits >> 15)) * 0x735A2D97
    return bits ^ (bits >> 15)


@jit
def _gumbel(bits):  # type: ignore[no-untyped-def]
    """-log(E_v), E_v = -log(1 - u_v)."""
    u = (bits.to(tl.float32) + 0.5) * 2.3283062977608182e-10  # eager_sampling.UNIT
    # The hardware's logarithm is wrong by up to 2e-7 near 1: all of E where u is small. There the series serves, wrong
    # by u^6 / 7 of E, at most 9e-9; elsewhere E is wrong by at most 3e-6 of itself.
    series = u * (1.0 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4 + u * (1 / 5 + u * (1 / 6))))))
    return -tl.log(tl.where(u < 0.0625, series, -tl.log(1.0 - u)))


@jit
def _power(x, top):  # type: ignore[no-untyped-def]
    """exp(x - top), 0 for x = top = -inf."""
    return tl.exp(x - tl.where(top == float("-inf"), 0.0, top))


@jit
def _slice_kernel(  # type: ignore[no-untyped-def]
    logits, keys, positions, temperature, top_k, top_p, min_p, part_max, part_sum, part_score, part_token,
    num_vocab, num_slices, row_stride, SLICE: tl.constexpr,
):  # fmt: skip
    """A slice of a row -> its largest logit, the sum of its exponentials, its best score and that token: [N,S] each."""
    program = tl.program_id(0)
    row = program // num_slices
    columns = program % num_slices * SLICE + tl.arange(0, SLICE)
    inside = columns < num_vocab
    raw = tl.load(logits + row.to(tl.int64) * row_stride + columns, mask=inside, other=float("-inf")).to(tl.float32)
    heat = tl.load(temperature + row)
    divisor = tl.where(heat == 0.0, 1.0, heat)
    x = tl.div_rn(raw, divisor)
    largest = tl.max(raw, axis=0)
    tl.store(part_max + program, largest)
    tl.store(part_sum + program, tl.sum(_power(x, tl.div_rn(largest, divisor)), axis=0))
    keeps_all = (tl.load(top_k + row) <= 0) & (tl.load(top_p + row) >= 1.0) & (tl.load(min_p + row) <= 0.0)
    if (heat == 0.0) | keeps_all:
        score = x
        if heat != 0.0:
            low_word, high_word = _words(tl.load(keys + row), tl.load(positions + row))
            score += _gumbel(_hashed(columns, low_word, high_word))
        best, place = tl.max(score, axis=0, return_indices=True)
        tl.store(part_score + program, best)
        tl.store(part_token + program, program % num_slices * SLICE + place)


@jit
def _number(key):  # type: ignore[no-untyped-def]
    """The float32 at a place in their order; :func:`_key` is the inverse."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@jit
def _key(number):  # type: ignore[no-untyped-def]
    bits = number.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit
def _middle(low, high):  # type: ignore[no-untyped-def]
    return (low >> 1) + (high >> 1) + (low & high & 1)  # their sum would not fit


@jit
def _block(at, first, num_vocab, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    columns = first + tl.arange(0, BLOCK)
    return tl.load(at + columns, mask=columns < num_vocab, other=float("-inf")).to(tl.float32)


@jit
def _mass(at, inverse, largest, least, above, num_vocab, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sum of exp((logit - largest) / temperature) over the logits from ``least`` that are above ``above``."""
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, num_vocab, BLOCK):
        raw = _block(at, first, num_vocab, BLOCK)
        total += tl.where((raw >= least) & (raw > above), tl.exp((raw - largest) * inverse), 0.0)
    return tl.sum(total, axis=0)


@jit
def _kth_largest(at, count, largest, num_vocab, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest number that at least ``count`` logits reach; -inf for a count above V."""
    low = _key(tl.full([], float("-inf"), tl.float32))
    high = _key(largest) + 1
    while high - 1 > low:
        middle = _middle(low, high)
        bound = _number(middle)
        reached = tl.zeros([BLOCK], dtype=tl.int32)
        for first in range(0, num_vocab, BLOCK):
            reached += (_block(at, first, num_vocab, BLOCK) >= bound).to(tl.int32)
        enough = tl.sum(reached, axis=0) >= count
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return _number(low)


@jit
def _nucleus(at, share, inverse, least, largest, num_vocab, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The least logit such that those above it, from ``least`` on, have less than ``share`` of the mass."""
    limit = share * _mass(at, inverse, largest, least, float("-inf"), num_vocab, BLOCK)
    low = _key(least) - 1
    high = _key(largest)
    while high - 1 > low:
        middle = _middle(low, high)
        few = _mass(at, inverse, largest, least, _number(middle), num_vocab, BLOCK) < limit
        high = tl.where(few, middle, high)
        low = tl.where(few, low, middle)
    return _number(high)


@jit
def _join_kernel(  # type: ignore[no-untyped-def]
    logits, keys, positions, temperature, top_k, top_p, min_p, part_max, part_sum, part_score, part_token,
    tokens, logprobs, sampling_logprobs, num_vocab, num_slices, row_stride, SLICES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row's slices, and if it is truncated the row -> its token and both log-probabilities, [N] each."""
    row = tl.program_id(0)
    at = logits + row.to(tl.int64) * row_stride
    slices = tl.arange(0, SLICES)
    there = slices < num_slices
    part = row * num_slices + slices
    heat = tl.load(temperature + row)
    divisor = tl.where(heat == 0.0, 1.0, heat)
    largest_of = tl.load(part_max + part, mask=there, other=float("-inf"))
    largest = tl.max(largest_of, axis=0)
    top = tl.div_rn(largest, divisor)
    sums = tl.load(part_sum + part, mask=there, other=0.0)
    total = tl.sum(sums * _power(tl.div_rn(largest_of, divisor), top), axis=0)
    count = tl.load(top_k + row)
    share = tl.load(top_p + row)
    least_share = tl.load(min_p + row)
    kept = total
    if (heat != 0.0) & ((count > 0) | (share < 1.0) | (least_share > 0.0)):
        inverse = 1.0 / divisor
        least = tl.full([], float("-inf"), tl.float32)
        if count > 0:
            least = _kth_largest(at, count, largest, num_vocab, BLOCK)
        if share < 1.0:
            least = _nucleus(at, share, inverse, least, largest, num_vocab, BLOCK)
        bound = tl.div_rn(least, divisor)
        if least_share > 0.0:
            bound = tl.maximum(bound, top + tl.log(least_share))
        low_word, high_word = _words(tl.load(keys + row), tl.load(positions + row))
        # Half as many columns at a time: what is kept for each of them would not fit into the registers.
        best = tl.full([BLOCK // 2], float("-inf"), dtype=tl.float32)
        winner = tl.arange(0, BLOCK // 2)
        mass = tl.zeros([BLOCK // 2], dtype=tl.float32)
        for first in range(0, num_vocab, BLOCK // 2):
            columns = first + tl.arange(0, BLOCK // 2)
            x = tl.div_rn(_block(at, first, num_vocab, BLOCK // 2), divisor)
            mass += tl.where(x >= bound, tl.exp(x - top), 0.0)
            score = tl.where(x >= bound, x + _gumbel(_hashed(columns, low_word, high_word)), float("-inf"))
            winner = tl.where(score > best, columns, winner)
            best = tl.maximum(score, best)
        kept = tl.sum(mass, axis=0)
        token = tl.min(tl.where(best == tl.max(best, axis=0), winner, num_vocab), axis=0)
    else:
        scores = tl.load(part_score + part, mask=there, other=float("-inf"))
        winners = tl.load(part_token + part, mask=there, other=0)
        token = tl.min(tl.where(there & (scores == tl.max(scores, axis=0)), winners, num_vocab), axis=0)
    token = tl.minimum(token, num_vocab - 1)  # no score of a row of NaN is the largest
    distance = tl.div_rn(tl.load(at + token).to(tl.float32), divisor) - top
    # Where a row is NaN its sum is, and where it is -inf alone the distance.
    logprob = distance - tl.log(total)
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(logprobs + row, logprob)
    sampling_logprob = tl.where(heat == 0.0, 0.0, distance - tl.log(kept))
    tl.store(sampling_logprobs + row, tl.where(logprob != logprob, logprob, sampling_logprob))


def _launch(logits: Tensor, *settings: Tensor) -> Drawn:
    num_rows, num_vocab = logits.shape
    num_slices = triton.cdiv(num_vocab, SLICE)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    settings = tuple(x.contiguous() for x in settings)
    parts = [
        torch.empty(num_rows, num_slices, dtype=dtype, device=logits.device)
        for dtype in (*[torch.float32] * 3, torch.int32)
    ]
    drawn = Drawn(
        torch.empty(num_rows, dtype=torch.int64, device=logits.device),
        *(torch.empty(num_rows, dtype=torch.float32, device=logits.device) for _ in range(2)),
    )
    if num_rows:
        _slice_kernel[(num_rows * num_slices,)](
            logits, *settings, *parts, num_vocab, num_slices, logits.stride(0), SLICE=SLICE, num_warps=SLICE_WARPS
        )
        _join_kernel[(num_rows,)](
            logits, *settings, *parts, *drawn, num_vocab, num_slices, logits.stride(0),
            SLICES=triton.next_power_of_2(num_slices), BLOCK=BLOCK, num_warps=BLOCK_WARPS,
        )  # fmt: skip
    return drawn


def sample_tokens(
    logits: Tensor,
    keys: Tensor,
    positions: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
) -> Drawn:
    """Draw a token of each row. Every setting is a row's own; the host does not wait for a GPU.

    With x = logits / temperature a token v is kept if it passes, in the order of transformers' warpers:

    * top_k: x_v is at least the top_k-th largest; ties with that one are kept.
    * top_p: those kept so far that are more likely than v have a probability below top_p, renormalised; so ties stay or
      go together, and the most likely stays.
    * min_p: the probability of v is at least min_p times the largest.

    The draw is argmax of x_v - log(E_v) over the kept v (Gumbel-max; Maddison, Tarlow and Minka, arXiv 1411.0030), E_v
    = -log(1 - u_v), u_v = (h_v + 0.5) / 2^32, h_v a 32-bit hash of (key, position, v). So a token depends on the key,
    the position and the row's logits and settings alone: not on the batch, nor on the row's place in it; and, but
    where two scores are equal up to rounding, not on which implementation serves. u has 32 bits: what is less likely
    than about 2^-32 is drawn too seldom or never.

    Temperature 0 takes the most likely token, the first of equals; its ``logprobs`` are under softmax(logits), its
    ``sampling_logprobs`` 0. A logit of -inf is never drawn. A row with NaN or +inf, or of -inf alone, has NaN
    log-probabilities and any token in [0,V), and changes no other row.

    Args:
        logits: [N,V] float32, bfloat16 or float16; computed in float32.
        keys: [N] int64, the names of the rows' random streams, any 64 bits.
        positions: [N] int64, the place in the stream, any 64 bits.
        temperature: [N] float32, divides the logits; 0 or more.
        top_k: [N] int32; 0 keeps all.
        top_p: [N] float32 in (0,1]; 1 keeps all.
        min_p: [N] float32 in [0,1]; 0 keeps all.

    Returns:
        (tokens [N] int64, logprobs [N] float32 under softmax(logits / temperature), sampling_logprobs [N] float32 under
        what was drawn from: the kept tokens' probabilities, renormalised).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    settings = {
        "keys": (keys, torch.int64),
        "positions": (positions, torch.int64),
        "temperature": (temperature, torch.float32),
        "top_k": (top_k, torch.int32),
        "top_p": (top_p, torch.float32),
        "min_p": (min_p, torch.float32),
    }
    _check(logits, settings)
    given = (logits, keys, positions, temperature, top_k, top_p, min_p)
    if triton_serves("sample_tokens", logits):
        return _launch(*given)
    return eager.sample_tokens(*given)


def _check(logits: Tensor, settings: dict[str, tuple[Tensor, torch.dtype]]) -> None:
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"sample_tokens: logits have shape {list(logits.shape)}; expected [N,V], V at least 1")
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"sample_tokens: logits are {logits.dtype}; cast them to float32, bfloat16 or float16")
    for name, (tensor, dtype) in settings.items():
        if tensor.shape != logits.shape[:1] or tensor.dtype != dtype or tensor.device != logits.device:
            raise ValueError(
                f"sample_tokens: {name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}; expected {dtype} "
                f"[{len(logits)}] on {logits.device}, as logits have {len(logits)} rows there"
            )
