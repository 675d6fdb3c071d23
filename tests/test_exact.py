"""The exact mode on a CPU: a log-probability is the same to the bit decoded step by step and in the trainer's batch."""

import random
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from packings import PLAIN, SHARED, as_index, bounds_of, by_the_query, make_packing, passes, slopes
from torch import Tensor

from groupwise.engine.batch import Batch, Example, pack
from groupwise.engine.config import ModelConfig, RopeScaling
from groupwise.engine.errors import UserError
from groupwise.engine.exact import ROWS, check_exact
from groupwise.engine.model import Model, PackedAttention
from groupwise.kernels import apply_rotary, dispatch, grouped_logprob
from groupwise.kernels.exact_attention import exact_packed_attention, exact_paged_attention

BLOCK = 16
SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
# Family, head size, query heads a key head, vocabulary.
MODELS = [
    ("qwen2", 8, 1, 512),
    ("qwen2", 64, 2, 5000),
    ("qwen3", 32, 3, 512),
    ("qwen3", 8, 2, 512),
    ("llama", 64, 3, 512),
    ("llama", 32, 1, 5000),
]


@pytest.fixture
def exact() -> Iterator[None]:
    if dispatch.implementation("cpu", "linear") != "onednn":
        pytest.skip("PyTorch has no oneDNN here")
    dispatch.force("packed_attention", "exact", "cpu")
    yield
    dispatch.force("packed_attention", "auto", "cpu")


@pytest.fixture
def threads() -> Iterator[None]:
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)


def make_model(family: Any, size: int, group: int, vocab: int) -> Model:
    """Random weights wide enough that log-probabilities differ, and biases and norms too."""
    model = Model(
        ModelConfig(
            model_type=family,
            vocab_size=vocab,
            hidden_size=48,
            intermediate_size=72,
            num_hidden_layers=2,
            num_attention_heads=2 * group,
            num_key_value_heads=2,
            head_dim=size,
            rope_scaling=SCALING if family == "llama" else None,
        )
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.5 if parameter.ndim == 1 else 1.5 * parameter.shape[-1] ** -0.5
            parameter.normal_(1.0 if "norm" in name else 0.0, scale, generator=generator)
    return model


def make_examples(vocab: int) -> list[Example]:
    """Two groups with prompts of their own, and one alone; completions of several lengths."""
    rng = random.Random(0)
    examples = []
    for group, (prompt, completions) in enumerate([(150, (3, 30, 17)), (21, (70, 9)), (5, (40,))]):
        start = [rng.randrange(vocab) for _ in range(prompt)]
        for length in completions:
            ids = start + [rng.randrange(vocab) for _ in range(length)]
            examples.append(Example(ids, [0.0] * prompt + [1.0] * length, group=group))
    return examples


class Cache:
    """Keys and values of all sequences in blocks in a random order, and the attention over them."""

    def __init__(self, model: Model, tokens: int, sequences: int) -> None:
        config = model.config
        columns = -(-tokens // BLOCK)
        order = torch.randperm(columns * sequences, generator=torch.Generator().manual_seed(1))
        self.tables = order.int().view(sequences, columns)
        shape = (config.num_hidden_layers, columns * sequences, BLOCK, config.num_key_value_heads, config.head_size)
        self.keys, self.values = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (2, 3))

    def step(self, model: Model, chunks: dict[int, tuple[list[int], int]]) -> Tensor:
        """Hidden rows of the new tokens of some sequences, each (ids, tokens that the cache has), and filling rows."""
        numbers = list(chunks)
        lengths = [len(ids) for ids, _ in chunks.values()]
        positions = torch.cat([torch.arange(done, done + len(ids)) for ids, done in chunks.values()])
        sequence = torch.tensor(numbers).repeat_interleave(torch.tensor(lengths))
        places = self.tables[sequence, positions // BLOCK].long() * BLOCK + positions % BLOCK
        bounds, tables = bounds_of(lengths), self.tables[numbers]
        contexts = torch.tensor([done + len(ids) for ids, done in chunks.values()], dtype=torch.int32)

        def attention(layer: int, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            q, k = apply_rotary(q, k, cos, sin)
            for cache, new in ((self.keys[layer], k), (self.values[layer], v)):
                cache.flatten(0, 1)[places] = new[: len(places)]
            return exact_paged_attention(
                q, self.keys[layer], self.values[layer], tables, contexts, bounds, max(lengths)
            )

        filler = -len(positions) % ROWS
        ids = torch.tensor([token for ids, _ in chunks.values() for token in ids] + [0] * filler)
        return model(ids, torch.cat((positions, torch.zeros(filler, dtype=torch.int64))), attention)


@torch.no_grad()
def step_by_step(model: Model, examples: list[Example], seed: int) -> list[list[float]]:
    """Log-probability of each token but the first, with a random set of sequences and chunks in each step."""
    rng = random.Random(seed)
    cache = Cache(model, max(map(len, examples)), len(examples))
    done = [0] * len(examples)
    found: list[list[float]] = [[] for _ in examples]
    while any(count < len(example) - 1 for count, example in zip(done, examples, strict=True)):
        left = [n for n, example in enumerate(examples) if done[n] < len(example) - 1]
        chunks = {}
        for n in rng.sample(left, rng.randint(1, len(left))):
            # A prompt comes in chunks; then tokens come one by one, and at times several at once, as an observation.
            length = rng.choice([64, 100]) if examples[n].loss_mask[done[n]] == 0 else rng.choice([1, 1, 1, 1, 11])
            chunks[n] = (examples[n].token_ids[done[n] : min(done[n] + length, len(examples[n]) - 1)], done[n])
        hidden = cache.step(model, chunks)
        targets = []
        for n, (ids, start) in chunks.items():
            targets += examples[n].token_ids[start + 1 : start + len(ids) + 1]
        filled = torch.tensor(targets + [-100] * (len(hidden) - len(targets)))
        logprobs = grouped_logprob(hidden, model.output_weight, filled, temperature=0.7)[0].tolist()
        for n, (ids, _) in chunks.items():
            found[n] += logprobs[: len(ids)]
            del logprobs[: len(ids)]
            done[n] += len(ids)
    return found


def trained(model: Model, batch: Batch) -> Tensor:
    attention = PackedAttention(batch.cu_seqlens, batch.max_seqlen, batch.prefix)
    return model(batch.input_ids, batch.positions, attention, batch.targets, temperature=0.7)[0]


@pytest.mark.usefixtures("exact", "threads")
@pytest.mark.parametrize(("family", "size", "group", "vocab"), MODELS)
def test_sampler_and_trainer_agree_to_the_bit(family: str, size: int, group: int, vocab: int) -> None:
    model, examples = make_model(family, size, group, vocab), make_examples(vocab)
    for budget, threads, other_threads in ((10000, 2, 1), (280, 1, 2)):
        torch.set_num_threads(threads)
        rows: list[dict[int, float]] = [{} for _ in examples]
        for batch in pack(examples, budget, multiple=ROWS):
            logprob = trained(model, batch)
            assert logprob.requires_grad
            columns = (batch.sequence_ids, batch.positions, batch.targets, logprob)
            for n, position, target, value in zip(*(x.tolist() for x in columns), strict=True):
                if target >= 0:
                    rows[n][position] = value
        torch.set_num_threads(other_threads)
        for own, decoded in zip(rows, step_by_step(model, examples, budget), strict=True):
            assert max(abs(value - decoded[position]) for position, value in own.items()) == 0.0


@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (7, 1)])
def test_values_and_gradients_are_those_of_attention(heads: tuple[int, int]) -> None:
    for lengths, prefix in [*PLAIN, *SHARED, ([150, 20, 140], [-1, 0, 0])]:
        tensors = make_packing(lengths, heads)
        form = partial(exact_packed_attention, cu_seqlens=bounds_of(lengths), max_seqlen=max(lengths))
        got = passes(partial(form, prefix=as_index(prefix)), tensors, slopes(tensors[0]))
        expected = passes(partial(by_the_query, lengths=lengths, prefix=prefix), tensors, slopes(tensors[0]))
        for each, true in zip(got, expected, strict=True):
            torch.testing.assert_close(each, true, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("exact")
def test_gradients_are_those_of_the_usual_mode() -> None:
    model, examples = make_model("qwen3", 8, 2, 512), make_examples(512)
    (batch,) = pack(examples, 10000, multiple=ROWS)
    gradients = []
    for name in ("exact", "sdpa"):
        dispatch.force("packed_attention", name, "cpu")
        total = (trained(model, batch) * batch.weight).sum()
        gradients.append(torch.autograd.grad(total, list(model.parameters())))
    for got, usual in zip(*gradients, strict=True):
        torch.testing.assert_close(got, usual, rtol=1e-3, atol=1e-4 * usual.abs().max().item())


@pytest.mark.usefixtures("exact")
def test_libraries_that_do_not_keep_the_bits_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("qwen3", 8, 2, 512)
    check_exact(model)
    with pytest.raises(UserError, match=r"float32 on a CPU, .* and the model is torch\.bfloat16"):
        check_exact(make_model("qwen3", 8, 2, 512).bfloat16())
    monkeypatch.setattr("groupwise.engine.exact.silu_mul", lambda gate, up: gate * up / len(gate))
    with pytest.raises(UserError, match="SwiGLU of 72 gives a row other bits among 64 rows than among 320"):
        check_exact(model)


def test_rows_that_fill_up_are_zeros() -> None:
    q, cache = torch.randn(6, 2, 8), torch.randn(3, 4, 1, 8)
    out = exact_paged_attention(q, cache, cache, torch.tensor([[2, -1]], dtype=torch.int32),
                                torch.tensor([3], dtype=torch.int32), bounds_of([2]), 2)  # fmt: skip
    assert (out[2:] == 0).all()
    assert (out[:2] != 0).all()


def test_other_dtypes_are_left_to_the_usual_attention() -> None:
    dispatch.force("packed_attention", "exact", "cpu")
    try:
        served = [dispatch.packed_attention_by("cpu", dtype, 8, True) for dtype in (torch.float32, torch.float64)]
        assert served == ["exact", "sdpa"]
    finally:
        dispatch.force("packed_attention", "auto", "cpu")
