"""A small model and what samples from it, for the tests of the sampler."""

import random
from typing import Any

import torch

from groupwise.engine.config import ModelConfig
from groupwise.engine.model import Model, PackedAttention
from groupwise.rollout.cache import KVCache
from groupwise.rollout.generation import Completion
from groupwise.rollout.sampler import Sampler

CONFIG = ModelConfig(
    vocab_size=89,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
)
BLOCK = 4


class Letters:
    """A vocabulary in which one text has many spellings, and id 7 is the end."""

    vocab_size = 89
    eos_id = 7
    pieces = tuple(map(str.encode, ("a", "b", "</", "cod", "code", "e>", ">", "<end>", "</code>", "xe>y", "", "é")))
    pieces += (b"\xc3", b"\xa9")

    def decode(self, ids):
        parts = (self.pieces[i] if i < len(self.pieces) else f"[{i}]".encode() for i in ids)
        return b"".join(parts).decode("utf-8", "replace")


def random_model(config: ModelConfig = CONFIG) -> Model:
    """Wide weights, so that likelihoods differ much, and none is alike."""
    model = Model(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.5 if parameter.ndim == 1 else 1.2 * parameter.shape[-1] ** -0.5
            parameter.normal_(1.0 if "norm" in name else 0.0, scale, generator=generator)
    return model


def sampler(model: Model, blocks: int = 4000, **settings: Any) -> Sampler:
    gib = (blocks + 0.5) * KVCache.block_bytes(CONFIG, BLOCK, torch.float32) / 2**30
    return Sampler(model, Letters(), kv_memory=gib, block_size=BLOCK, **settings)


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(14, 89) for _ in range(length)] for length in lengths]


def full_logprobs(model: Model, prompt: list[int], completion: list[int], temperature: float) -> torch.Tensor:
    device = model.output_weight.device
    ids = torch.tensor(prompt + completion, device=device)
    bounds = torch.tensor([0, len(ids) - 1], dtype=torch.int32, device=device)
    attention = PackedAttention(bounds, len(ids) - 1)
    with torch.no_grad():
        logprob, _ = model(
            ids[:-1], torch.arange(len(ids) - 1, device=device), attention, targets=ids[1:], temperature=temperature
        )
    return logprob[len(prompt) - 1 :]


def drain(engine: Sampler) -> dict[int, Completion]:
    done = {}
    while engine.has_work:
        done.update((each.request_id, each) for each in engine.poll())
    return done


def tokens(completions: list[Completion]) -> list[list[int]]:
    return [each.token_ids for each in completions]
