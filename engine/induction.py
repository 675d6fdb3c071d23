"""Initialisation with an induction circuit, for small models that are trained from nothing.

To answer a question about a table it never saw, a model must copy names it never saw: find the earlier place where the
present token stood, and repeat what came after it. The circuit that does this takes two attention layers (Olsson et
al., arXiv 2209.11895), and from plain random weights it appears late in training. Here its two halves are laid into the
random weights as a start, in the manner of mimetic initialisation (Trockman and Kolter, arXiv 2305.09828); training
moves them freely.

H hidden size, D width of a head.
"""

import math
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor

from .model import Model, SelfAttention

PREVIOUS = 16.0  # attention logit of the previous token over the mean place, layer 0
MATCH = 3.0  # scale of queries and keys that match, layer 1
COPY = 20.0  # scale of what layer 1 copies, in standard deviations of the embedding


@torch.no_grad()
def lay_induction(model: Model, seed: int, alike: Iterable[Sequence[int]] = ()) -> None:
    """Overwrites attention weights of the first two layers, and embeddings of tokens that are alike.

    Layer 0, first key head: rotary phases alone, set by the biases, attend to the previous token; what it was is
    written into a random subspace. Layer 1, every head: the query is the present token, the key is that subspace, so it
    attends to what followed the same token before, and its value is written back as it was read.

    Args:
        model: with at least two layers, initialised.
        seed: of the random subspaces.
        alike: groups of token ids; those of a group start with the embedding of its first, so what followed one of them
            is also copied after another.
    """
    for group in alike:
        ids = torch.tensor(group)
        model.model.embed_tokens.weight[ids[1:]] = model.model.embed_tokens.weight[ids[:1]]
    config, size, hidden = model.config, model.config.head_size, model.config.hidden_size
    sharing = config.num_attention_heads // config.num_key_value_heads  # query heads of a key head
    generator = torch.Generator().manual_seed(seed)
    embedding = model.model.embed_tokens.weight.std().item()
    read, write = _directions(size, hidden, generator), _directions(size, hidden, generator)  # [D,H] each

    first = cast(SelfAttention, model.layers[0].self_attn)
    half = size // 2
    frequency = 1.0 / config.rope_theta ** (torch.arange(half, dtype=torch.float32) / half)
    # The score of distance d is the sum of amplitude^2 cos(frequency (d - 1)) / sqrt(D): its peak is at d = 1.
    amplitude = (PREVIOUS * math.sqrt(size) * frequency / frequency.sum()).sqrt()
    first.k_proj.bias[:size] = torch.cat((amplitude * frequency.cos(), amplitude * frequency.sin()))
    first.q_proj.bias[: sharing * size] = torch.cat((amplitude, torch.zeros(half))).repeat(sharing)
    first.v_proj.weight[:size] = read
    scale = embedding * math.sqrt(hidden / size) / sharing
    first.o_proj.weight[:, : sharing * size] = (scale * write.T).repeat(1, sharing)

    second = cast(SelfAttention, model.layers[1].self_attn)
    for head in range(config.num_key_value_heads):
        rows = slice(head * size, (head + 1) * size)
        queries = slice(head * sharing * size, (head + 1) * sharing * size)
        value = _directions(size, hidden, generator)
        second.k_proj.weight[rows] = MATCH * write
        second.v_proj.weight[rows] = value
        second.q_proj.weight[queries] = (MATCH * read).repeat(sharing, 1)
        second.o_proj.weight[:, queries] = (COPY * embedding / sharing * value.T).repeat(1, sharing)


def _directions(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Random orthonormal rows, [count, size]."""
    return torch.linalg.qr(torch.randn(size, count, generator=generator))[0].T
