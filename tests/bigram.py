"""A policy that a loop can repeat, and sequences for it."""

import numpy as np
import torch
from torch import Tensor

from groupwise.engine.batch import Example

VOCABULARY = 11


class Bigram:
    """A policy whose log-probabilities depend on the input token alone; its results are float32, or ``dtype``."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(VOCABULARY, VOCABULARY, generator=generator, dtype=torch.float64).requires_grad_()
        self.dtype = dtype

    def __call__(self, input_ids, positions, attention, targets, temperature=1.0, entropy=False):  # type: ignore[no-untyped-def]
        logprobs = (self.table[input_ids] / temperature).log_softmax(-1)
        chosen = logprobs.gather(-1, targets.clamp(min=0)[:, None])[:, 0].masked_fill(targets < 0, 0.0)
        return chosen.to(self.dtype), -(logprobs.exp() * logprobs).sum(-1).to(self.dtype) if entropy else None

    def logprob(self, before: int, token: int, temperature: float = 1.0) -> float:
        row = self.table[before].detach().numpy() / temperature
        return float(row[token] - np.log(np.exp(row).sum()))

    def entropy(self, before: int, temperature: float = 1.0) -> float:
        logprobs = [self.logprob(before, token, temperature) for token in range(VOCABULARY)]
        return -sum(np.exp(logprob) * logprob for logprob in logprobs)

    def score(self, input_ids: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
        """Log-probabilities without a graph."""
        return self(input_ids, None, None, targets, temperature)[0].detach()


def make_examples(seed: int, sequences: int = 6, expert: bool = False) -> list[Example]:
    draw = np.random.default_rng(seed)
    out = []
    for i in range(sequences):
        tokens = int(draw.integers(2, 9))
        ids = draw.integers(0, VOCABULARY, tokens).tolist()
        mask = [0.0, *(draw.random(tokens - 1) < 0.7).astype(float).tolist()]
        old = (-3 * draw.random(tokens)).tolist()
        out.append(Example(ids, mask, float(draw.normal()), old, i, expert and i % 2 == 1))
    out.append(Example([1, 2], [0.0, 0.0], 1.0, [0.0, 0.0]))  # a masked one
    return out
