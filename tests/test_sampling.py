"""Drawing tokens: exact probabilities, transformers' warpers, a hash without structure, one definition in two forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from interpreter import interpreted
from torch import Tensor

from groupwise.kernels import Drawn, eager, eager_sampling, implementation, sample_tokens, sampling
from groupwise.kernels.dispatch import jit, tl

# temperature, top_k, top_p, min_p
SETTINGS = [
    (1.0, 0, 1.0, 0.0),
    (0.7, 0, 1.0, 0.0),
    (1.0, 7, 1.0, 0.0),
    (1.3, 0, 0.6, 0.0),
    (1.0, 0, 1.0, 0.02),
    (1.0, 12, 0.8, 0.0),
    (1.5, 20, 0.9, 0.05),
]
KEY = -0x123456789ABCDEF


def normal(*shape: int, scale: float = 2.0, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def settings(num_rows: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Any:
    """The same settings for every row."""
    dtypes = (torch.float32, torch.int32, torch.float32, torch.float32)
    values = (temperature, top_k, top_p, min_p)
    return [torch.full((num_rows,), value, dtype=dtype) for value, dtype in zip(values, dtypes, strict=True)]


def mixed(num_rows: int, seed: int = 0) -> Any:
    """Settings of all kinds, greedy rows among them."""
    generator = torch.Generator().manual_seed(seed)
    kinds = ([1.0, 0.0, 0.6, 1.7], [0, 1, 5, 40], [1.0, 0.9, 0.5], [0.0, 0.02, 0.3])
    return [
        torch.tensor(kind, dtype=like.dtype)[torch.randint(len(kind), (num_rows,), generator=generator)]
        for kind, like in zip(kinds, settings(1), strict=True)
    ]


def streams(num_rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(-(2**63), 2**63 - 1, (num_rows,), generator=generator) for _ in range(2))


def draws(logits: Tensor, number: int, *how: Any) -> Drawn:
    """So many draws from one row, at positions one after the other."""
    keys, positions = torch.full((number,), KEY), torch.arange(number)
    return sample_tokens(logits.expand(number, -1), keys, positions, *settings(number, *how))


def expected(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> tuple[Tensor, Tensor]:
    """(log-probabilities, those after truncation) of one row in float64, token by token."""
    chances = torch.softmax(logits.double() / temperature, 0)
    order = sorted(range(len(chances)), key=lambda i: -chances[i])[: top_k or None]
    total, reached, kept = sum(chances[i] for i in order), 0.0, torch.zeros(len(chances), dtype=torch.bool)
    for i in order:
        kept[i] = reached < top_p * total and chances[i] >= min_p * chances.max()
        reached += chances[i]
    left = torch.where(kept, chances, 0.0)
    return chances.log(), (left / left.sum()).log()


def check_frequencies(counts: Tensor, chances: Tensor, what: Any) -> None:
    """Chi-square below its mean and four deviations; only for what is expected often enough."""
    numbers = chances * counts.sum()
    usual = numbers > 5
    chi_square = ((counts - numbers)[usual] ** 2 / numbers[usual]).sum()
    freedom = usual.sum() - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5, what


@pytest.mark.parametrize("how", SETTINGS)
def test_frequencies_follow_the_distribution(how: Any) -> None:
    logits = normal(50, scale=1.5)
    drawn = draws(logits, 40000, *how)
    logprobs, sampling_logprobs = expected(logits, *how)
    torch.testing.assert_close(drawn.logprobs.double(), logprobs[drawn.tokens], atol=2e-6, rtol=0)
    torch.testing.assert_close(drawn.sampling_logprobs.double(), sampling_logprobs[drawn.tokens], atol=2e-6, rtol=0)
    check_frequencies(torch.bincount(drawn.tokens, minlength=50), sampling_logprobs.exp(), how)


@pytest.mark.parametrize("how", [(1.0, 0, 1.0, 0.0), (0.8, 500, 0.99, 0.0)])
def test_small_probabilities_in_groups(how: Any) -> None:
    logits = normal(2000, scale=2.5)
    chances = expected(logits, *how)[1].exp()
    counts = torch.bincount(draws(logits, 60000, *how).tokens, minlength=2000)
    order = chances.argsort(descending=True)
    # Groups of tokens about equally likely, each of a percent, down to those of 1e-7.
    group = (chances[order].cumsum(0) * 100).long()
    grouped = [torch.zeros(102, dtype=torch.float64).index_add_(0, group, x[order].double()) for x in (counts, chances)]
    check_frequencies(*grouped, how)
    rare = chances < 2e-5
    assert abs(counts[rare].sum() - chances[rare].sum() * 60000) < 4 * (chances[rare].sum() * 60000) ** 0.5 + 1


def hashes(keys: Tensor, positions: Tensor, num_vocab: int) -> Tensor:  # [N] int64 twice -> [N,V] int64 in [0,2^32)
    places = eager_sampling.vocabulary_places(num_vocab, torch.device("cpu"))
    out, spare = torch.empty(2, len(keys), num_vocab, dtype=torch.int32)
    return eager_sampling.hashed(eager_sampling.row_words(keys, positions), places, out, spare).long() & 0xFFFFFFFF


def check_independent(a: Tensor, b: Tensor, what: Any) -> None:
    """No correlation between numbers of [0,2^32), nor between their differences' high or low halves."""
    for x, y in ((a, b), (a & 0xFFFF, b & 0xFFFF), (a, b & 0xFFFF), (a & 0xFFFF, b)):
        correlation = np.corrcoef(x.flatten().numpy(), y.flatten().numpy())[0, 1]
        assert abs(correlation) < 4.5 * x.numel() ** -0.5, what
    # What is drawn are the small ones: they must not come together.
    both = ((a < 2**26) & (b < 2**26)).sum().item()
    mean = a.numel() / 2**12
    assert abs(both - mean) < 4.5 * mean**0.5, what


def test_random_numbers_have_no_structure() -> None:
    positions = torch.arange(256)
    table = hashes(torch.full((256,), KEY), positions, 4096)
    for low in range(0, 32, 8):  # every byte is uniform
        counts = torch.bincount((table >> low & 0xFF).flatten(), minlength=256)
        check_frequencies(counts, torch.full((256,), 1 / 256), low)
    for lag in (1, 2, 3, 7, 64, 256, 2048):
        check_independent(table[:, lag:], table[:, :-lag], f"v and v + {lag}")
    for lag in (1, 2, 64):
        check_independent(table[lag:], table[:-lag], f"positions {lag} apart")
    places = eager_sampling.vocabulary_places(4096, torch.device("cpu"))
    for column in range(2):  # rows of which one of the words is the same
        words = eager_sampling.row_words(torch.full((256,), KEY), positions)
        words[:, column] = 1 << 30
        some = eager_sampling.hashed(words, places, *torch.empty(2, 256, 4096, dtype=torch.int32)).long() & 0xFFFFFFFF
        check_independent(some[1:], some[:-1], f"word {column} the same")
    for bit in (0, 1, 31, 32, 63):
        other = hashes(torch.full((256,), KEY ^ (1 << bit if bit < 63 else -(1 << 63))), positions, 4096)
        check_independent(table, other, f"keys that differ in bit {bit}")


def test_each_bit_turns_about_half_of_the_bits() -> None:
    keys, positions = streams(512)
    table = hashes(keys, positions, 256)
    turned = {f"v {bit}": table ^ table[:, torch.arange(256) ^ (1 << bit)] for bit in range(8)}
    for bit in (0, 5, 33, 62):
        turned[f"key {bit}"] = table ^ hashes(keys ^ (1 << bit), positions, 256)
        turned[f"position {bit}"] = table ^ hashes(keys, positions ^ (1 << bit), 256)
    for what, difference in turned.items():
        shares = torch.stack([(difference >> bit & 1).double().mean() for bit in range(32)])
        assert (shares - 0.5).abs().max() < 0.01, what


def test_row_words_are_splitmix64() -> None:
    keys, positions = streams(20)
    for key, position, words in zip(
        keys.tolist(), positions.tolist(), eager_sampling.row_words(keys, positions), strict=True
    ):
        x = (key + (position + 1) * 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        x ^= x >> 31
        assert [word % 2**32 for word in words.tolist()] == [x % 2**32, x >> 32]


def test_a_token_depends_on_its_row_alone() -> None:
    logits, (keys, positions), how = normal(300, 500), streams(300), mixed(300)
    together = sample_tokens(logits, keys, positions, *how)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(3))
    moved = sample_tokens(*(x[order] for x in (logits, keys, positions, *how)))
    for a, b in zip(together, moved, strict=True):
        assert torch.equal(a[order], b)
    for i in range(0, 300, 7):
        alone = sample_tokens(*(x[i : i + 1] for x in (logits, keys, positions, *how)))
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(together, alone, strict=True)), i
    assert (together.tokens != sample_tokens(logits, keys, positions + 1, *how).tokens).any()
    assert (together.tokens != sample_tokens(logits, keys + 1, positions, *how).tokens).any()


def supports(temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, logits: Tensor) -> Tensor:
    x = logits / temperature[:, None]
    return x >= eager_sampling.thresholds(x, top_k, top_p, min_p)[:, None]


@pytest.mark.parametrize("how", [*SETTINGS, (0.3, 0, 0.999, 0.0), (1.0, 0, 0.01, 0.0), (2.0, 3000, 1.0, 1e-4)])
def test_what_is_kept_is_what_transformers_keeps(how: Any) -> None:
    warpers = pytest.importorskip("transformers")
    logits = normal(40, 1000, scale=3.0)
    assert all(len(row.unique()) == 1000 for row in logits), "no ties"
    temperature, top_k, top_p, min_p = how
    scores = warpers.TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        scores = warpers.TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = warpers.TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = warpers.MinPLogitsWarper(min_p)(None, scores)
    assert torch.equal(supports(*settings(40, *how), logits), scores > -torch.inf)


def test_equals_are_kept_or_dropped_together() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 1.0, 1.0, -1.0]])
    for how, kept in (
        ((1.0, 2, 1.0, 0.0), [1, 2, 3, 4]),
        ((1.0, 0, 0.5, 0.0), [1, 2, 3, 4]),
        ((1.0, 1, 1.0, 0.0), [1]),
    ):
        assert supports(*settings(1, *how), logits)[0].nonzero()[:, 0].tolist() == kept
        assert draws(logits[0], 300, *how).tokens.unique().tolist() == kept
    # e^2 of e^2 + 3e + 1 + 1/e is 0.44: below it the most likely stands alone.
    assert draws(logits[0], 300, 1.0, 0, 0.43, 0.0).tokens.unique().tolist() == [1]


def check_temperature_0() -> None:
    logits = normal(6, 300)
    logits[3, [20, 150, 299]] = 9.0
    logits[4] = 0.0
    drawn = sample_tokens(logits, *streams(6), *settings(6, 0.0, 5, 0.5, 0.1))
    assert drawn.tokens[3:5].tolist() == [20, 0]
    assert torch.equal(drawn.tokens, logits.argmax(1))
    expected = torch.log_softmax(logits.double(), 1).gather(1, drawn.tokens[:, None])[:, 0]
    torch.testing.assert_close(drawn.logprobs.double(), expected, atol=2e-6, rtol=0)
    assert drawn.sampling_logprobs.tolist() == [0.0] * 6


def check_rows_that_are_not_finite(how: Any) -> None:
    logits, (keys, positions) = normal(8, 300), streams(8)
    sound = sample_tokens(logits, keys, positions, *settings(8, *how))
    logits[1, 250] = torch.nan
    logits[3, 7] = torch.inf
    logits[5] = -torch.inf
    logits[7] = torch.nan
    drawn = sample_tokens(logits, keys, positions, *settings(8, *how))
    for got, true in zip(drawn, sound, strict=True):
        assert torch.equal(got[::2], true[::2])
    assert ((drawn.tokens >= 0) & (drawn.tokens < 300)).all()
    assert drawn.logprobs[1::2].isnan().all()
    assert drawn.sampling_logprobs[1::2].isnan().all()


def check_what_is_impossible() -> None:
    logits = torch.full((8, 300), -torch.inf)
    logits[:, 5] = 0.0
    logits[:, 270] = -0.1
    for how in (settings(8), settings(8, 1.0, 30, 1.0, 0.001)):
        drawn = sample_tokens(logits, *streams(8), *how)
        assert drawn.tokens.unique().tolist() == [5, 270]
        assert drawn.logprobs.isfinite().all()


def small_tiles() -> None:
    """So that few columns take several slices and steps."""
    sampling.SLICE, sampling.BLOCK = 128, 512


def check_all(device_type: str = "cpu") -> None:
    assert implementation(device_type, "sample_tokens") == "triton"
    small_tiles()
    check_temperature_0()
    check_what_is_impossible()
    for how in ((1.0, 0, 1.0, 0.0), (0.0, 0, 1.0, 0.0), (0.9, 0, 0.8, 0.1)):
        check_rows_that_are_not_finite(how)


def test_temperature_0_takes_the_first_of_the_most_likely() -> None:
    check_temperature_0()


@pytest.mark.parametrize("how", [(1.0, 0, 1.0, 0.0), (0.0, 0, 1.0, 0.0), (0.9, 4, 0.8, 0.1)])
def test_a_row_that_is_not_finite_is_told_and_changes_no_other(how: Any) -> None:
    check_rows_that_are_not_finite(how)


def test_what_is_impossible_is_never_drawn() -> None:
    check_what_is_impossible()


def test_the_same_properties_in_triton() -> None:
    interpreted(check_all)


def check_against_eager(
    num_rows: int, num_vocab: int, dtype: torch.dtype = torch.float32, device: str = "cpu", small: bool = True
) -> None:
    """The same tokens, except where two scores are equal up to rounding; log-probabilities as good."""
    assert implementation(device, "sample_tokens") == "triton"
    if small:
        small_tiles()
    logits = normal(num_rows, num_vocab, scale=3.0).to(dtype)
    streams_and_settings = (*streams(num_rows), *mixed(num_rows))
    padded = torch.nn.functional.pad(logits, (0, 3))[:, :num_vocab]  # rows that do not follow each other
    ours = sample_tokens(*(x.to(device) for x in (padded, *streams_and_settings)))
    plain = eager.sample_tokens(logits, *streams_and_settings)
    same = ours.tokens.cpu() == plain.tokens
    assert same.sum() >= num_rows - num_rows // 1000
    for got, true in zip(ours[1:], plain[1:], strict=True):
        torch.testing.assert_close(got.cpu()[same], true[same], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("num_rows", "num_vocab"), [(0, 10), (6, 1), (16, 50), (12, 700)])
def test_triton_draws_what_the_eager_form_draws(num_rows: int, num_vocab: int) -> None:
    interpreted(check_against_eager, num_rows, num_vocab)


@jit
def _numbers_kernel(keys, positions, bits, gumbels, NUM_VOCAB: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    columns = tl.arange(0, NUM_VOCAB)
    low_word, high_word = sampling._words(tl.load(keys + row), tl.load(positions + row))
    found = sampling._hashed(columns, low_word, high_word)
    tl.store(bits + row * NUM_VOCAB + columns, found.to(tl.int32, bitcast=True))
    tl.store(gumbels + row * NUM_VOCAB + columns, sampling._gumbel(found))


def check_numbers(device: str = "cpu") -> None:
    keys, positions = streams(16)
    bits = torch.empty(16, 4096, dtype=torch.int32, device=device)
    gumbels = torch.empty(16, 4096, device=device)
    _numbers_kernel[(16,)](keys.to(device), positions.to(device), bits, gumbels, NUM_VOCAB=4096)
    expected = hashes(keys, positions, 4096)
    assert torch.equal(bits.cpu().long() & 0xFFFFFFFF, expected)
    u = (expected.float() + 0.5) * eager_sampling.UNIT
    exact = -(-torch.log1p(-u.double())).log()
    torch.testing.assert_close(gumbels.cpu().double(), exact, atol=5e-6, rtol=0)


def test_triton_has_the_same_random_numbers_to_the_bit() -> None:
    interpreted(check_numbers)


def check_tiles() -> None:
    given = (normal(8, 400), *streams(8), *mixed(8))
    found = []
    for sampling.SLICE, sampling.BLOCK in ((128, 256), (256, 512), (1024, 1024)):
        found.append(sample_tokens(*given))
    for other in found[1:]:
        assert torch.equal(other.tokens, found[0].tokens)
        for a, b in zip(other[1:], found[0][1:], strict=True):
            torch.testing.assert_close(a, b, atol=2e-6, rtol=0)


def test_tiles_do_not_change_a_token() -> None:
    interpreted(check_tiles)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    logits, given = normal(20, 100).to(dtype), (*streams(20), *mixed(20))
    for a, b in zip(sample_tokens(logits, *given), sample_tokens(logits.float(), *given), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("place", "wrong", "message"),
    [
        (0, torch.ones(3), r"logits have shape \[3\]; expected \[N,V\]"),
        (0, torch.ones(3, 0), r"logits have shape \[3, 0\]"),
        (0, torch.ones(3, 4).double(), "logits are torch.float64; cast them"),
        (1, torch.ones(3), r"keys is torch.float32 \[3\] on cpu; expected torch.int64 \[3\]"),
        (2, torch.ones(4).long(), r"positions is torch.int64 \[4\]"),
        (4, torch.ones(3).long(), "top_k is torch.int64"),
        (5, torch.ones(3, device="meta"), "top_p is torch.float32 .* on meta; expected torch.float32 .* on cpu"),
    ],
)
def test_errors(place: int, wrong: Tensor, message: str) -> None:
    given = [torch.ones(3, 4), *streams(3), *settings(3)]
    given[place] = wrong
    with pytest.raises(ValueError, match=message):
        sample_tokens(*given)


@pytest.mark.gpu
def test_random_numbers_on_the_gpu() -> None:
    check_numbers("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_rows", "num_vocab"), [(0, 10), (1, 152064), (64, 152064), (257, 8191), (4000, 50)])
def test_triton_on_the_gpu(num_rows: int, num_vocab: int, dtype: torch.dtype) -> None:
    check_against_eager(num_rows, num_vocab, dtype, "cuda", small=False)
