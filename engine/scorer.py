"""A decoder that judges steps: the hierarchical reward model (Datarus-R1, arXiv 2508.13382; arXiv 2503.13551).

A step is a turn with the observation that follows it. At its last token two numbers are read: the logit that the step
is sound, given all before it, and the logit that it is sound together with the step before it, as one merged step.
Attention is causal, so what is read there depends on nothing that comes later: one forward pass over a packed
trajectory gives the numbers of all its steps, the same as a pass for each step would.

Legend: T tokens of a packed stream, S steps in it, H hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.linear import ROWS
from .batch import Batch, Example, pack
from .config import ModelConfig
from .model import Attention, Decoder, Linear, PackedAttention
from .shard import ShardedModel
from .step import level


class Scorer(nn.Module):
    """A decoder with a head of two logits, without a bias; the head starts at 0, the decoder empty.

    Its parameters are those of transformers' ``ForSequenceClassification`` of the family.

    Args:
        config: sizes and constants of the decoder.
    """

    labels: ClassVar[tuple[str, ...]] = ("step", "pair")

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.score = Linear(config.hidden_size, len(self.labels), bias=False)
        nn.init.zeros_(self.score.weight)

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks, first to last: the units of sharding."""
        return self.model.layers

    def forward(self, input_ids: Tensor, positions: Tensor, attention: Attention, places: Tensor) -> Tensor:
        """Runs the decoder over a packed stream and reads its head at some places.

        Args:
            input_ids: [T] int64.
            positions: [T] integers, each token's place in its own sequence.
            attention: which tokens see which.
            places: [S] int64, indices of the last tokens of steps; there may be none.

        Returns:
            Logits [S,2] float32: of the step, and of the step merged with the one before it.
        """
        hidden = self.model(input_ids, positions, attention)[places]
        return F.linear(hidden.float(), self.score.weight.float())


@dataclass(frozen=True)
class StepSequence:
    """A trajectory as the scorer reads it, with n steps, at least one.

    Args:
        token_ids: prompt and completion.
        prompt_tokens: length of the prompt, which the sequences of a group may share.
        ends: index of the last token of each of the n steps, ascending.
        step_labels: for training: probability that each step is sound, None where it is not to be learnt; n of them.
        pair_labels: the same of each step merged with the one before it; n of them, the first one None.
        group: of ``Example``.
    """

    token_ids: list[int]
    prompt_tokens: int
    ends: list[int]
    step_labels: list[float | None] = field(default_factory=list)
    pair_labels: list[float | None] = field(default_factory=list)
    group: int = -1

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_labels(self) -> int:
        """How many labels there are to learn."""
        return sum(label is not None for label in (*self.step_labels, *self.pair_labels))

    def to_example(self) -> Example:
        """The sequence for ``pack``, which lays a group's prompt once and keeps all steps with their own sequence."""
        first = self.prompt_tokens
        return Example(self.token_ids, [float(index == first) for index in range(len(self))], group=self.group)


def pack_steps(
    sequences: Sequence[StepSequence], tokens_per_microbatch: int, device: torch.device | str = "cpu"
) -> list[Batch]:
    """Micro-batches of sequences; their ``sequence_ids`` are indices of ``sequences``."""
    return pack([sequence.to_example() for sequence in sequences], tokens_per_microbatch, device, ROWS)


def step_places(batch: Batch, sequences: Sequence[StepSequence]) -> tuple[list[int], Tensor]:
    """Which sequences lie in a batch, and where all their steps end in it: indices [S] int64, sequence by sequence."""
    ids, positions = batch.sequence_ids.tolist(), batch.positions.tolist()
    starts: dict[int, int] = {}
    for place, number in enumerate(ids):
        if number >= 0:
            starts.setdefault(number, place)
    places = [start - positions[start] + end for number, start in starts.items() for end in sequences[number].ends]
    return list(starts), torch.tensor(places, dtype=torch.int64, device=batch.input_ids.device)


def step_logits(scorer: ShardedModel, batch: Batch, places: Tensor) -> Tensor:
    """Logits of a sharded scorer at places of a packed batch: [S,2] float32."""
    attention = PackedAttention(batch.cu_seqlens, batch.max_seqlen, batch.prefix)
    logits: Tensor = scorer(batch.input_ids, batch.positions, attention, places)
    return logits


def step_loss(
    scorer: ShardedModel, batch: Batch, *, sequences: Sequence[StepSequence], divisor: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Binary cross-entropy of all labels of a batch, summed and divided; a loss function for ``engine.step.optimise``.

    Args:
        scorer: sharded; its forward runs once.
        batch: of ``pack_steps(sequences, ...)``, or an empty one.
        sequences: with their labels, which may be any probabilities.
        divisor: number of labels of the whole step, over all ranks.

    Returns:
        The loss, a scalar, and the number of labels that lie on the right side of 1/2.
    """
    numbers, places = step_places(batch, sequences)
    logits = step_logits(scorer, batch, places)  # [S,2]
    rows = [row for n in numbers for row in zip(sequences[n].step_labels, sequences[n].pair_labels, strict=True)]
    none = float("nan")
    labels = torch.tensor([[none if label is None else label for label in row] for row in rows], device=logits.device)
    labels = labels.reshape(logits.shape)
    known = ~labels.isnan()
    logits, labels = logits[known], labels[known]
    loss = F.binary_cross_entropy_with_logits(logits, labels, reduction="sum") / divisor
    return loss, {"right": ((logits > 0) == (labels > 0.5)).sum()}


@torch.no_grad()
def score_steps(
    scorer: ShardedModel, sequences: Sequence[StepSequence], tokens_per_microbatch: int
) -> list[tuple[list[float], list[float]]]:
    """Probabilities that the steps of each sequence are sound, and that its merged pairs are; a collective.

    Args:
        scorer: sharded.
        sequences: this rank's; labels are not looked at.
        tokens_per_microbatch: packed tokens of one forward pass.

    Returns:
        For each sequence of n steps its n step scores and its n - 1 pair scores, in [0, 1].
    """
    found: dict[int, tuple[list[float], list[float]]] = {}
    for batch in level(pack_steps(sequences, tokens_per_microbatch, scorer.device), scorer.mesh):
        numbers, places = step_places(batch, sequences)
        scores = step_logits(scorer, batch, places).sigmoid().T.tolist()
        start = 0
        for number in numbers:
            stop = start + len(sequences[number].ends)
            found[number] = scores[0][start:stop], scores[1][start + 1 : stop]
            start = stop
    return [found[number] for number in range(len(sequences))]
