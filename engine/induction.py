"""Initialisation with an induction circuit, for small models that are trained from nothing.

To answer a question about a table it never saw, a model must copy names it never saw: find the earlier place where the
last two tokens stood, and repeat what came after them. The circuit that does this takes two attention layers (Olsson et
al., arXiv 2209.11895), and from plain random weights it appears late in training. Here it is laid into the random
weights as a start, in the manner of mimetic initialisation (Trockman and Kolter, arXiv 2305.09828); training moves it
freely.

H hidden size, D width of a head.
"""

import math
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor

from .model import Model, SelfAttention

PREVIOUS = 16.0  # attention logit of the token one (or two) before over the mean place, layer 0
MATCH = 20.0  # attention logit of a place where the last two tokens stood before, layer 1
COPY = 1.0  # what layer 1 copies, as a multiple of the embedding: as long as the token itself
GAIN = 3.0  # of the last norm, without which small embeddings cannot make a sharp guess
REACH = 128  # tokens over which a match must survive the rotation of queries and keys


@torch.no_grad()
def lay_induction(model: Model, seed: int, alike: Iterable[Sequence[int]] = ()) -> None:
    """Overwrites the embedding, the attention of the first two layers, and the gain of the last norm.

    The residual stream is split: tokens take H - 2D dimensions, and two registers of D dimensions stay free for what
    the two tokens before were. In layer 0 rotary phases alone, set by the biases, attend one place back (first key
    head) and two (second), and fill the registers. In layer 1 a query is the present token and the first register, a
    key the two registers: they match where the same two tokens came just before, and the token there is copied.

    Args:
        model: initialised, of a shape that ``ModelConfig`` lets have this initialisation.
        seed: of the random subspaces.
        alike: groups of token ids; those of a group start with the embedding of its first, so what followed one of them
            is also copied after another.
    """
    config, size, hidden = model.config, model.config.head_size, model.config.hidden_size
    sharing = config.num_attention_heads // config.num_key_value_heads  # query heads of a key head
    generator = torch.Generator().manual_seed(seed)
    width = hidden - 2 * size  # dimensions of a token
    tokens, *registers = _directions(hidden, hidden, generator).split((width, size, size))
    remembered = _directions(size, width, generator) @ tokens  # [D,H] what a register keeps of a token
    share = math.sqrt(width / size)  # of a token's norm over that of its remembered part

    embedding = model.model.embed_tokens.weight
    norm = embedding.std().item() * math.sqrt(hidden)
    embedding.copy_(embedding @ tokens.T @ tokens * math.sqrt(hidden / width))
    for group in alike:
        ids = torch.tensor(group)
        embedding[ids[1:]] = embedding[ids[:1]]
    if model.lm_head is not None:
        model.lm_head.weight.copy_(embedding)
    model.model.norm.weight.fill_(GAIN)

    first = cast(SelfAttention, model.layers[0].self_attn)
    frequency = model.model.rotary.frequencies()  # [D/2]
    # The score of distance d is the sum of amplitude^2 cos(frequency (d - back)) / sqrt(D): its peak is at d = back.
    amplitude = (PREVIOUS * math.sqrt(size) * frequency / frequency.sum()).sqrt()
    for head, register in enumerate(registers):
        keys, queries = _rows(head, size), _rows(head, size * sharing)
        phase = (head + 1) * frequency
        first.k_proj.bias[keys] = torch.cat((amplitude * phase.cos(), amplitude * phase.sin()))
        first.q_proj.bias[queries] = torch.cat((amplitude, torch.zeros_like(amplitude))).repeat(sharing)
        first.v_proj.weight[keys] = remembered
        scale = norm / math.sqrt(hidden) * share / sharing  # a register is as long as a token
        first.o_proj.weight[:, queries] = (scale * register.T).repeat(1, sharing)

    second = cast(SelfAttention, model.layers[1].self_attn)
    # Channels that turn faster than this cannot match far away.
    slow = (frequency <= max(1.0 / REACH, frequency.min().item())).repeat(2)
    count = int(slow.sum())
    part = math.sqrt(hidden / 3)  # length of token and registers each, normalised
    scale = MATCH / 2 * math.sqrt(size) / (part**2 * count / size)
    for head in range(config.num_key_value_heads):
        keys, queries = _rows(head, size), _rows(head, size * sharing)
        last, before = (_directions(count, size, generator) for _ in range(2))
        match = torch.zeros(2, size, hidden)  # of key and query
        match[0, slow] = last @ registers[0] + before @ registers[1]
        match[1, slow] = scale * (share * last @ remembered + before @ registers[0])
        value = tokens[torch.arange(head * size, (head + 1) * size) % width]  # each head copies its part
        second.k_proj.weight[keys] = match[0]
        second.q_proj.weight[queries] = match[1].repeat(sharing, 1)
        second.v_proj.weight[keys] = value
        second.o_proj.weight[:, queries] = (COPY * norm / part / sharing * value.T).repeat(1, sharing)


def _rows(index: int, count: int) -> slice:
    return slice(index * count, (index + 1) * count)


def _directions(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Random orthonormal rows, [count, size]."""
    return torch.linalg.qr(torch.randn(size, count, generator=generator))[0].T
