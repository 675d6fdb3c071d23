"""Small models for the tests of the engine: one that is not ours, and a small one of ours with its batches."""

import random

import torch
import torch.nn.functional as F
from torch import nn

from groupwise.engine.batch import Batch, Example, pack
from groupwise.engine.config import ModelConfig
from groupwise.engine.mesh import Mesh
from groupwise.engine.model import Model

VOCABULARY, WIDTH = 29, 12


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH, bias=False)

    def forward(self, x, scale=1.0):
        return x + scale * self.down(torch.tanh(self.up(self.norm(x))))


class Toy(nn.Module):
    """Tied embedding and head, blocks with odd sizes, tuples out, and blocks that a call can leave out."""

    def __init__(self, blocks=3, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(blocks))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor(1.5))

    def forward(self, ids, targets=None, leave_out=(), checkpoint=False):
        x = self.embed(ids)
        for index, layer in enumerate(self.layers):
            if index in leave_out:
                continue
            if checkpoint:
                x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
            else:
                x = layer(x, scale=self.scale)
        logits = self.head(self.norm(x)).float()
        if targets is None:
            return x, logits
        return -F.cross_entropy(logits, targets, reduction="none"), None


def toy_batch(seed, tokens=10):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (2, tokens), generator=generator)


def toy_loss(model, batch, **options):
    """A sum divided by a constant: it adds up over any split."""
    return -model(batch[0], batch[1], **options)[0].sum() / 100


CONFIG = ModelConfig(
    vocab_size=VOCABULARY,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)


def small_model(seed=0):
    """Ours, with random biases and norms, so that a forgotten one shows."""
    model = Model(CONFIG)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def small_batches(seed, tokens=40) -> list[Batch]:
    rng = random.Random(seed)
    examples = []
    for _ in range(6):
        length = rng.randint(4, 15)
        ids = [rng.randrange(VOCABULARY) for _ in range(length)]
        examples.append(Example(token_ids=ids, loss_mask=[0.0] + [1.0] * (length - 1)))
    return pack(examples, tokens)


def small_loss(policy, batch):
    from groupwise.engine.model import PackedAttention

    attention = PackedAttention(batch.cu_seqlens, batch.max_seqlen, batch.prefix)
    logprob, entropy = policy(batch.input_ids, batch.positions, attention, targets=batch.targets, entropy=True)
    stats = {"tokens": (batch.weight != 0).sum(), "entropy_max": entropy.max(), "logprob_min": logprob.min()}
    return -(batch.weight * logprob).sum() / 60, stats


def alone() -> Mesh:
    return Mesh()
