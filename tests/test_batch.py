"""Packing: nothing lost, nothing across segments, any split gives the same sums."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groupwise.engine.batch import IGNORE, Batch, Example, balance, empty_batch, pack
from groupwise.engine.errors import UserError


@st.composite
def examples(draw: st.DrawFn, max_tokens: int = 12) -> list[Example]:
    """Lists of examples with every field set, of 1 to ``max_tokens`` tokens."""
    out = []
    for group in range(draw(st.integers(0, 9))):
        tokens = draw(st.integers(1, max_tokens))
        ids = draw(st.lists(st.integers(0, 500), min_size=tokens, max_size=tokens))
        mask = [0.0, *draw(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=tokens - 1, max_size=tokens - 1))]
        logprobs = [-float(i % 7) / 8 for i in range(tokens)] if draw(st.booleans()) else None
        out.append(Example(ids, mask, draw(st.floats(-3, 3, width=32)), logprobs, group, draw(st.booleans())))
    return out


def per_token(example: Example) -> list[tuple[float, ...]]:
    """(input, position, target, weight, advantage, rollout log-probability, expert) by the plain definition."""
    rows = []
    for i, token in enumerate(example.token_ids):
        if i + 1 < len(example.token_ids):
            logprob = 0.0 if example.old_logprobs is None else example.old_logprobs[i + 1]
            following = example.token_ids[i + 1]
            rows.append((token, i, following, example.loss_mask[i + 1], example.advantage, logprob, example.expert))
        else:
            rows.append((token, i, IGNORE, 0.0, 0.0, 0.0, False))
    return rows


@st.composite
def groups(draw: st.DrawFn) -> list[Example]:
    """Examples of which some begin alike, in any order; some of the common tokens may bear a loss."""
    out = []
    for group in range(-1, draw(st.integers(0, 3))):
        prompt = draw(st.lists(st.integers(0, 3), min_size=1, max_size=6))
        for _ in range(draw(st.integers(0, 5))):
            ids = [*prompt, *draw(st.lists(st.integers(0, 3), max_size=5))]
            mask = [0.0] * draw(st.integers(1, len(ids)))
            mask += [draw(st.sampled_from([0.0, 0.5, 1.0])) for _ in ids[len(mask) :]]
            logprobs = [-float(i % 7) / 8 for i in range(len(ids))] if draw(st.booleans()) else None
            out.append(Example(ids, mask, draw(st.floats(-3, 3, width=32)), logprobs, group, group < 0))
    return draw(st.permutations(out))


def segments(batch: Batch) -> dict[int, list[tuple[float, ...]]]:
    """The rows of each example of a batch by its index: those of the prompt it goes on behind, then its own."""
    found = {}
    columns = (batch.input_ids, batch.positions, batch.targets, batch.weight)
    columns += (batch.advantage, batch.rollout_logprob, batch.expert)
    bounds = batch.cu_seqlens.tolist()
    rows = [list(zip(*(column[start:stop].tolist() for column in columns), strict=True))
            for start, stop in itertools.pairwise(bounds)]  # fmt: skip
    homes = [-1] * len(rows) if batch.prefix is None else batch.prefix.tolist()
    assert batch.prefix is None or max(homes) >= 0
    for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
        (index,) = set(batch.sequence_ids[start:stop].tolist())
        if index < 0:  # a shared prompt: no loss, and its examples follow at once
            assert {row[2:] for row in rows[number]} == {(IGNORE, 0.0, 0.0, 0.0, False)}
            assert homes[number : number + 3] == [-1, number, number]
        else:
            home = homes[number]
            assert home == -1 or (batch.sequence_ids[bounds[home]] == -1 and homes[number - 1] in (-1, home))
            found[index] = [*(rows[home] if home >= 0 else []), *rows[number]]
    assert bounds[0] == 0
    assert bounds[-1] == batch.num_tokens
    assert batch.max_seqlen == max(np.diff(bounds))
    return found


@settings(max_examples=80, deadline=None)
@given(examples(), st.integers(12, 40))
def test_nothing_is_lost_and_nothing_crosses_a_segment(given_examples: list[Example], budget: int) -> None:
    found: dict[int, list[tuple[float, ...]]] = {}
    for batch in pack(given_examples, budget):
        assert batch.num_tokens <= budget
        assert not batch.is_empty
        assert batch.prefix is None
        found |= segments(batch)
    assert found == {index: per_token(example) for index, example in enumerate(given_examples)}


@settings(max_examples=150, deadline=None)
@given(groups(), st.integers(11, 50))
def test_a_shared_prompt_is_laid_once_and_nothing_is_lost(given_examples: list[Example], budget: int) -> None:
    batches = pack(given_examples, budget)
    found: dict[int, list[tuple[float, ...]]] = {}
    for batch in batches:
        assert batch.num_tokens <= budget
        found |= segments(batch)
    assert found.keys() == set(range(len(given_examples)))
    for index, example in enumerate(given_examples):
        # A prompt predicts nothing: what it would predict has no loss.
        for (*inputs, target, weight, advantage, logprob, expert), row in zip(
            found[index], per_token(example), strict=True
        ):
            assert tuple(inputs) == row[:2]
            assert (target, weight, advantage, logprob, expert) == row[2:] or (target == IGNORE and row[3] == 0)
    assert sum(batch.num_tokens for batch in batches) <= sum(map(len, given_examples))


def test_a_group_pays_for_its_prompt_once_a_batch() -> None:
    prompt = list(range(1, 11))
    group = [Example([*prompt, 20 + i, 30, 40], [0.0] * 10 + [1.0] * 3, group=0) for i in range(4)]
    # The prompt's last token predicts the first of each example, so it stays with them.
    assert [b.num_tokens for b in pack(group, 100)] == [9 + 4 * 4]
    assert [b.num_tokens for b in pack(group, 17)] == [9 + 2 * 4, 9 + 2 * 4]
    assert [b.num_tokens for b in pack(group, 13)] == [13] * 4
    alone = [Example(e.token_ids, e.loss_mask) for e in group]
    assert [b.num_tokens for b in pack(alone, 100)] == [4 * 13]


@settings(max_examples=60, deadline=None)
@given(examples(), st.integers(12, 40), st.integers(1, 4))
def test_sums_do_not_depend_on_the_split(given_examples: list[Example], budget: int, ranks: int) -> None:
    def total(batches: list[Batch]) -> list[float]:
        weights = torch.cat([torch.zeros(1), *(b.weight for b in batches)]).double()
        values = torch.cat([torch.zeros(1), *(b.weight.double() * b.advantage * (b.targets + 1) for b in batches)])
        return [weights.sum().item(), values.sum().item()]

    whole = total(pack(given_examples, 1000))
    split = [total(pack(part, budget)) for part in balance(given_examples, ranks)]
    np.testing.assert_allclose(np.sum(split, axis=0), whole, rtol=1e-9, atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(groups(), st.integers(11, 50), st.integers(1, 9))
def test_padding_comes_last_and_bears_nothing(given_examples: list[Example], budget: int, multiple: int) -> None:
    for plain, padded in zip(
        pack(given_examples, budget), pack(given_examples, budget, multiple=multiple), strict=True
    ):
        tokens = plain.num_tokens
        assert padded.num_tokens == -(-tokens // multiple) * multiple
        for name in ("input_ids", "positions", "targets", "weight", "advantage", "rollout_logprob", "sequence_ids"):
            assert torch.equal(getattr(plain, name), getattr(padded, name)[:tokens])
        assert torch.equal(plain.expert, padded.expert[:tokens])
        assert (padded.targets[tokens:] == IGNORE).all()
        assert (padded.sequence_ids[tokens:] == -1).all()
        assert not any(
            x[tokens:].any() for x in (padded.weight, padded.advantage, padded.rollout_logprob, padded.expert)
        )
        filled = tokens < padded.num_tokens
        assert padded.cu_seqlens.tolist() == plain.cu_seqlens.tolist() + [padded.num_tokens] * filled
        assert padded.max_seqlen == max(padded.cu_seqlens.diff().tolist())
        if plain.prefix is None:
            assert padded.prefix is None
        else:
            assert padded.prefix.tolist() == plain.prefix.tolist() + [-1] * filled  # type: ignore[union-attr]


@settings(max_examples=60, deadline=None)
@given(examples(), st.integers(1, 5))
def test_balance_deals_every_example_once_and_evenly(given_examples: list[Example], ranks: int) -> None:
    parts = balance(given_examples, ranks)
    assert len(parts) == ranks
    assert sorted(id(e) for part in parts for e in part) == sorted(id(e) for e in given_examples)
    loads = [sum(len(e) for e in part) for part in parts]
    assert max(loads) - min(loads) <= max((len(e) for e in given_examples), default=0)


def test_few_batches_and_of_like_size() -> None:
    lengths = [60, 50, 40, 30, 20, 10, 10, 10]  # 230 tokens
    batches = pack([Example([1] * n, [0.0] * n) for n in lengths], 120)
    assert sorted(b.num_tokens for b in batches) == [110, 120]


def test_tight_fit_that_cannot_be_spread_stays_within_the_budget() -> None:
    lengths = [50, 50, 30, 30, 30]  # evenly it would be 80 and 110; 100 and 90 is the only way into two
    batches = pack([Example([1] * n, [0.0] * n) for n in lengths], 100)
    assert [b.num_tokens for b in batches] == [100, 90]


def test_empty_batch_takes_part_without_loss() -> None:
    batch = empty_batch()
    assert batch.is_empty
    assert batch.num_tokens == 1
    assert batch.targets.tolist() == [IGNORE]
    assert batch.weight.sum() == 0
    one = pack([Example([3], [0.0])], 4)[0]
    assert not one.is_empty


def test_lone_token_and_empty_list() -> None:
    assert pack([], 8) == []
    assert balance([], 3) == [[], [], []]


@pytest.mark.parametrize(
    ("example", "words"),
    [
        (Example([1] * 9, [0.0] * 9), "9 tokens but tokens_per_microbatch is 8"),
        (Example([], []), "no tokens"),
        (Example([1, 2], [0.0]), "1 in loss_mask"),
        (Example([1, 2], [1.0, 1.0]), "at its first token"),
        (Example([1, 2], [0.0, -1.0]), r"-1\.0 in loss_mask"),
        (Example([1, 2], [0.0, float("nan")]), "nan in loss_mask"),
        (Example([1, 2], [0.0, 1.0], advantage=float("nan")), "advantage nan"),
        (Example([1, 2], [0.0, 1.0], old_logprobs=[0.0]), "1 old_logprobs"),
    ],
)
def test_bad_examples_are_named(example: Example, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        pack([Example([1], [0.0]), example], 8)
    assert "example 1 " in str(caught.value)
