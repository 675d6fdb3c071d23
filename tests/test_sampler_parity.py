"""Many sequences at once give what transformers gives each alone: the same greedy tokens and log-probabilities."""

import random

import pytest
import torch

from groupwise.engine.config import ModelConfig, RopeScaling
from groupwise.engine.hf import save_hf
from groupwise.engine.model import Model
from groupwise.rollout.sampler import Completion, Sampler, SamplingParams

NEW = 24
VOCAB = 89
# Prompts of every class: inside one block of 16, at its edge, of several blocks, and far longer than one.
LENGTHS = [1, 1, 2, 3, 15, 15, 16, 16, 17, 17, 31, 32, 33, 700]
LENGTHS += random.Random(0).sample(range(4, 30), 22) + random.Random(1).sample(range(34, 150), 24)
LENGTHS += [255, 256, 450, 699]
RNG = random.Random(2)
PROMPTS = [[RNG.randrange(VOCAB) for _ in range(length)] for length in LENGTHS]
TIE = 1e-5  # nats: tokens may differ from there on where both are as likely as each other, as far as float32 tells


class NoText:
    """No id is the end, so every completion has its full length."""

    vocab_size = VOCAB
    eos_id = -1

    def decode(self, ids):
        return ""


@pytest.fixture(scope="module", params=["qwen2", "qwen3", "llama"])
def pair(request, tmp_path_factory):
    """A model with random biases, norms and wide attention, and the same as transformers loads it."""
    from transformers import AutoModelForCausalLM

    model = Model(
        ModelConfig(
            model_type=request.param,
            vocab_size=VOCAB,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=1024,
            rope_theta=5000.0,
            rope_scaling=RopeScaling(8.0, 1.0, 4.0, 64) if request.param == "llama" else None,
            tie_word_embeddings=request.param == "qwen2",
        )
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.5 if parameter.ndim == 1 else 1.5 * parameter.shape[-1] ** -0.5
            parameter.normal_(1.0 if "norm" in name else 0.0, scale, generator=generator)
    folder = tmp_path_factory.mktemp(request.param)
    save_hf(model, folder)
    return model, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def greedy(pair) -> list[Completion]:
    return sample(pair[0], 0.0)


def sample(model: Model, temperature: float) -> list[Completion]:
    sampler = Sampler(model, NoText(), kv_memory=0.05)
    return sampler.generate(PROMPTS, SamplingParams(temperature=temperature, max_tokens=NEW))


def by_length(count: int) -> list[list[int]]:
    """Indices of the prompts in batches of similar length, so that little is padded."""
    order = sorted(range(len(PROMPTS)), key=lambda i: len(PROMPTS[i]))
    return [order[i : i + count] for i in range(0, len(order), count)]


def padded(rows: list[list[int]], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), both [rows, longest]."""
    longest = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        fill = [0] * (longest - len(row))
        ids.append(fill + row if left else row + fill)
        mask.append(fill + [1] * len(row) if left else [1] * len(row) + fill)
    return torch.tensor(ids), torch.tensor(mask)


def transformers_logprobs(theirs, completions: list[Completion]) -> list[torch.Tensor]:
    """Of a full forward pass over prompt and completion: [NEW, VOCAB] at the places that drew the completion."""
    found: dict[int, torch.Tensor] = {}
    for batch in by_length(16):
        ids, mask = padded([PROMPTS[i] + completions[i].token_ids[:-1] for i in batch], left=False)
        with torch.no_grad():
            logits = theirs(ids, attention_mask=mask).logits
        for i, row in zip(batch, logits, strict=True):
            start = len(PROMPTS[i]) - 1
            found[i] = row[start : start + NEW].log_softmax(1)
    return [found[i] for i in range(len(PROMPTS))]


def test_greedy_tokens_are_those_of_generate(pair, greedy):
    from transformers import GenerationConfig

    theirs = pair[1]
    settings = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
    compared = 0
    logprobs = transformers_logprobs(theirs, greedy)
    for batch in by_length(16):
        ids, mask = padded([PROMPTS[i] for i in batch], left=True)
        out = theirs.generate(ids, attention_mask=mask, generation_config=settings)[:, ids.shape[1] :].tolist()
        for i, expected in zip(batch, out, strict=True):
            got = greedy[i].token_ids
            place = next((n for n in range(NEW) if got[n] != expected[n]), NEW)
            compared += place
            if place < NEW:
                gap = (logprobs[i][place, expected[place]] - logprobs[i][place, got[place]]).abs().item()
                assert gap < TIE, (len(PROMPTS[i]), place, gap)
    assert compared > 0.99 * NEW * len(PROMPTS)
    assert len({tuple(completion.token_ids) for completion in greedy}) > 60  # none goes the same way as another


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logprobs_are_those_of_a_full_pass(pair, greedy, temperature):
    model, theirs = pair
    completions = sample(model, temperature) if temperature else greedy
    for completion, rows in zip(completions, transformers_logprobs(theirs, completions), strict=True):
        assert len(completion.token_ids) == len(completion.logprobs) == NEW
        expected = rows[torch.arange(NEW), completion.token_ids]
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-5, rtol=0)
