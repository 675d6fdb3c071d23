"""The scorer: what it reads, how it learns, and that transformers reads the same from its folder."""

import json
import random
from functools import partial

import pytest
import torch
from distributed import run_ranks
from toys import CONFIG, VOCABULARY, alone, small_model

from groupwise.engine.batch import empty_batch
from groupwise.engine.config import ModelConfig
from groupwise.engine.errors import UserError
from groupwise.engine.hf import load_weights, save_hf
from groupwise.engine.model import PackedAttention
from groupwise.engine.optim import AdamW
from groupwise.engine.scorer import Scorer, StepSequence, pack_steps, score_steps, step_loss, step_places
from groupwise.engine.shard import ShardedModel
from groupwise.engine.step import optimise


def small_scorer(config: ModelConfig = CONFIG, seed: int = 0) -> Scorer:
    scorer = Scorer(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in scorer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return scorer


def sequences(seed: int, count: int = 7) -> list[StepSequence]:
    """Random trajectories of 1 to 5 steps, each two with the same prompt."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(VOCABULARY) for _ in range(rng.randint(2, 6))] for _ in range(count)]
    found = []
    for number in range(count):
        prompt = prompts[number // 2]
        ids, ends = list(prompt), []
        for _ in range(rng.randint(1, 5)):
            ids += [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 6))]
            ends.append(len(ids) - 1)
        labels = [rng.choice([0.0, 0.5, 1.0, None]) for _ in ends]
        pairs = [None, *(rng.choice([0.0, 1.0, None]) for _ in ends[1:])]
        found.append(StepSequence(ids, len(prompt), ends, labels, pairs, group=number // 2))
    return found


def alone_in_pieces(scorer: Scorer, sequence: StepSequence) -> list[tuple[float, float]]:
    """Both probabilities of each step by a forward pass over what lies before its end, and nothing else."""
    rows = []
    for end in sequence.ends:
        ids = torch.tensor(sequence.token_ids[: end + 1])
        attention = PackedAttention(torch.tensor([0, len(ids)], dtype=torch.int32), len(ids))
        hidden = scorer.model(ids, torch.arange(len(ids)), attention)[-1]
        rows.append(tuple(torch.sigmoid(scorer.score.weight.double() @ hidden.double()).tolist()))
    return rows


@pytest.mark.parametrize("budget", [40, 1000])
def test_packed_scores_are_those_of_each_step_alone(budget: int) -> None:
    data, scorer = sequences(1), small_scorer()
    expected = [alone_in_pieces(scorer, sequence) for sequence in data]
    batches = pack_steps(data, budget)
    assert any(batch.prefix is not None for batch in batches)  # prompts are laid once
    got = score_steps(ShardedModel(scorer, alone()), data, budget)
    for rows, (steps, pairs) in zip(expected, got, strict=True):
        assert steps == pytest.approx([step for step, _ in rows], abs=1e-5)
        assert pairs == pytest.approx([pair for _, pair in rows[1:]], abs=1e-5)


def test_steps_that_samples_have_in_common_are_read_for_each_of_them() -> None:
    ids = [1, 2, 3, 4, 5, 6, 7, 8]
    data = [StepSequence([*ids, last], 2, [3, 6, 8], group=0) for last in (9, 10, 10)]
    scorer = small_scorer()
    got = score_steps(ShardedModel(scorer, alone()), data, 100)
    for sequence, (steps, _) in zip(data, got, strict=True):
        assert steps == pytest.approx([step for step, _ in alone_in_pieces(scorer, sequence)], abs=1e-5)


def test_places_are_the_last_tokens_of_steps() -> None:
    data = sequences(2)
    for batch in pack_steps(data, 60):
        numbers, places = step_places(batch, data)
        assert batch.input_ids[places].tolist() == [data[n].token_ids[end] for n in numbers for end in data[n].ends]
        assert batch.positions[places].tolist() == [end for n in numbers for end in data[n].ends]


def naive_loss(scorer: Scorer, data: list[StepSequence]) -> tuple[torch.Tensor, int]:
    """Binary cross-entropy label by label, in float64 from its definition."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for sequence in data:
        ids = torch.tensor(sequence.token_ids)
        attention = PackedAttention(torch.tensor([0, len(ids)], dtype=torch.int32), len(ids))
        logits = scorer.score(scorer.model(ids, torch.arange(len(ids)), attention)).double()
        for row, labels in enumerate((sequence.step_labels, sequence.pair_labels)):
            for end, label in zip(sequence.ends, labels, strict=True):
                if label is not None:
                    p = torch.sigmoid(logits[end, row])
                    total = total - label * p.log() - (1 - label) * (1 - p).log()
                    count += 1
    return total, count


def test_the_loss_and_its_gradient_are_those_of_the_definition() -> None:
    data = sequences(3)
    plain = small_scorer()
    expected, count = naive_loss(plain, data)
    assert count == sum(sequence.num_labels for sequence in data)
    (expected / count).backward()
    model = ShardedModel(small_scorer(), alone())
    loss = 0.0
    for batch in [*pack_steps(data, 50), empty_batch()]:
        part, stats = step_loss(model, batch, sequences=data, divisor=count)
        model.backward(part)
        loss += part.item()
        assert torch.isfinite(part)
        assert 0 <= stats["right"] <= count
    assert loss == pytest.approx(expected.item() / count, rel=1e-5)
    grads = {slot.name: s.grad[here] for s in model.shards for slot, here, _ in s.overlaps()}
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad.reshape(-1), rtol=1e-4, atol=1e-6)


def separable(count: int) -> list[StepSequence]:
    """A step with token 3 is unsound; a merged pair is what its later step is."""
    rng = random.Random(5)
    found = []
    for _ in range(count):
        ids, ends, labels = [1, 2], [], []
        for _ in range(rng.randint(1, 4)):
            bad = rng.random() < 0.5
            ids += [3 if bad else 4, 5]
            ends.append(len(ids) - 1)
            labels.append(float(not bad))
        found.append(StepSequence(ids, 2, ends, labels, [None, *labels[1:]]))
    return found


def fit(mesh, steps: int = 20, dtype: torch.dtype = torch.float32):
    data = separable(24)
    scorer = Scorer(CONFIG)
    scorer.model.load_state_dict(small_model().model.state_dict())
    model = ShardedModel(scorer, mesh, compute_dtype=dtype)
    optimizer = AdamW(model.shards, lr=0.03)
    divisor = sum(sequence.num_labels for sequence in data)
    mine = data[mesh.rank :: mesh.world_size]
    losses = []
    for _ in range(steps):
        loss_fn = partial(step_loss, sequences=mine, divisor=divisor)
        update = optimise(model, optimizer, pack_steps(mine, 120), loss_fn, mesh=mesh, lr=0.03, max_grad_norm=1.0)
        assert not update.skipped
        losses.append(update.loss)
    # Ranks with other numbers of micro-batches, and one with none, keep company.
    scores = score_steps(model, data if mesh.rank == 0 else [], 30)
    return losses, scores, update.stats["right"] / divisor


def test_learns_what_can_be_told_and_two_ranks_learn_the_same() -> None:
    losses, scores, right = fit(alone())
    assert losses[0] == pytest.approx(0.693147, abs=1e-5)  # a head of zeros knows nothing
    assert losses[-1] < 0.02
    assert right == 1.0
    for sequence, (steps, pairs) in zip(separable(24), scores, strict=True):
        assert [score > 0.5 for score in steps] == [label == 1 for label in sequence.step_labels]
        assert [score > 0.5 for score in pairs] == [label == 1 for label in sequence.pair_labels[1:]]
    (two, their_scores, _), (same, nothing, _) = run_ranks(fit, 2)
    assert two == same == pytest.approx(losses, rel=1e-2, abs=1e-4)
    assert nothing == []
    for mine, theirs in zip(scores, their_scores, strict=True):
        assert theirs[0] == pytest.approx(mine[0], abs=1e-2)


def test_gradients_are_finite_in_bfloat16() -> None:
    losses, _, _ = fit(alone(), steps=8, dtype=torch.bfloat16)
    assert losses[-1] < 0.9 * losses[0]


FAMILIES = {
    "qwen2": CONFIG,
    "qwen3": ModelConfig(**{**CONFIG.__dict__, "model_type": "qwen3", "head_dim": 6, "tie_word_embeddings": False}),
    "llama": ModelConfig(**{**CONFIG.__dict__, "model_type": "llama"}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_the_folder_and_gives_the_same_logits(family: str, tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    scorer = small_scorer(FAMILIES[family], seed=4)
    save_hf(ShardedModel(scorer, alone()), tmp_path)
    theirs, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(theirs).__name__.lower() == f"{family}forsequenceclassification"
    assert theirs.config.id2label == {0: "step", 1: "pair"}
    data = sequences(6)
    read = ShardedModel(Scorer(FAMILIES[family]), alone())
    load_weights(read, tmp_path)
    for sequence, (steps, pairs) in zip(data, score_steps(read, data, 100), strict=True):
        for index, end in enumerate(sequence.ends):
            with torch.no_grad():
                logits = theirs(torch.tensor([sequence.token_ids[: end + 1]])).logits[0]
            assert torch.sigmoid(logits[0]).item() == pytest.approx(steps[index], abs=1e-5)
            if index:
                assert torch.sigmoid(logits[1]).item() == pytest.approx(pairs[index - 1], abs=1e-5)


def test_a_scorer_starts_from_a_policy_and_neither_is_taken_for_the_other(tmp_path) -> None:
    policy = small_model(seed=3)
    save_hf(policy, tmp_path / "policy")
    scorer = ShardedModel(small_scorer(), alone())
    load_weights(scorer, tmp_path / "policy", zeros=("score.weight",))
    state = dict(scorer.state_dict_full())
    assert not state.pop("score.weight").any()
    for name, tensor in state.items():
        assert torch.equal(tensor, policy.state_dict()[name])
    assert all(scores == [0.5] * len(scores) for pair in score_steps(scorer, sequences(1), 99) for scores in pair)
    with pytest.raises(UserError, match=r"lacks the tensor score\.weight"):
        load_weights(scorer, tmp_path / "policy")
    save_hf(scorer, tmp_path / "scorer")
    assert json.loads((tmp_path / "scorer/config.json").read_text())["architectures"] == [
        "Qwen2ForSequenceClassification"
    ]
    with pytest.raises(UserError, match=r"holds the tensor score\.weight"):
        load_weights(ShardedModel(small_model(), alone()), tmp_path / "scorer")
