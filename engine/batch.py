"""Packed batches: examples laid end to end, every tensor aligned to the index that predicts.

Index t of a batch predicts the token at t + 1 of the same segment. So ``targets``, ``weight``, ``advantage`` and every
log-probability at t speak of token t + 1, and the last index of a segment predicts nothing: target -100, weight 0.

A segment is an example, or what the examples of a group have in common: a prompt that bears no loss is laid once, and
the group's examples go on behind it, each seeing the prompt and itself.

Shapes: T tokens of the batch, N segments in it.
"""

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .errors import UserError

IGNORE = -100  # the target that has no loss, as in PyTorch's cross-entropy


@dataclass
class Example:
    """One sequence to learn from; lists are aligned with ``token_ids``.

    Args:
        token_ids: prompt and completion as they were sampled.
        loss_mask: weight of the loss of predicting token i, at least 0 and exactly 0 at i = 0; fractions are allowed.
        advantage: group-relative advantage that all tokens of the sequence share.
        old_logprobs: log-probability of token i at rollout, 0 where it was not sampled; None for an expert's text.
        group: index of the task's group in the step, -1 where there is none; a group's common prompt is laid once.
        expert: the loss is the likelihood of the text (SFT) and not the policy gradient.
    """

    token_ids: list[int]
    loss_mask: list[float]
    advantage: float = 0.0
    old_logprobs: list[float] | None = None
    group: int = -1
    expert: bool = False

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def loss_tokens(self) -> int:
        """Number of tokens whose loss has a weight other than 0."""
        return sum(weight != 0.0 for weight in self.loss_mask)


@dataclass
class Batch:
    """One micro-batch: N segments end to end, T tokens.

    Args:
        input_ids: [T] int64.
        positions: [T] int64, each token's place in its example.
        cu_seqlens: [N+1] int32, bounds of the segments, from 0 to T.
        max_seqlen: length of the longest segment.
        prefix: [N] int32, the segment that each one goes on behind, -1 for none; None where none does.
        targets: [T] int64, the next token of the segment, -100 at its last index.
        weight: [T] float32, weight of the loss of the target.
        advantage: [T] float32.
        rollout_logprob: [T] float32, the sampler's log-probability of the target, 0 where there is none.
        sequence_ids: [T] int64, index of the example in the list that was packed, -1 for a shared prompt, for padding
            and in an empty batch.
        expert: [T] bool, the target's loss is the likelihood (SFT).
        old_logprob: [T] float32, the trainer's own before the update; None until it is computed.
        ref_logprob: [T] float32, the reference's; None where no reference is used.
    """

    input_ids: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    prefix: Tensor | None
    targets: Tensor
    weight: Tensor
    advantage: Tensor
    rollout_logprob: Tensor
    sequence_ids: Tensor
    expert: Tensor
    old_logprob: Tensor | None = None
    ref_logprob: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """T, the tokens that pass through the model."""
        return self.input_ids.numel()

    @property
    def is_empty(self) -> bool:
        """Whether this is ``empty_batch``: one token that only takes part in the collectives."""
        return self.num_tokens == 1 and int(self.sequence_ids[0]) < 0


@dataclass(frozen=True)
class _Part:
    """What lies together: the examples ``members``, and before them the ``shared`` tokens with which all begin."""

    members: list[int]
    shared: int
    tokens: int


def pack(
    examples: Sequence[Example], tokens_per_microbatch: int, device: torch.device | str = "cpu", multiple: int = 1
) -> list[Batch]:
    """Lay examples end to end in as few micro-batches as first-fit decreasing finds, of nearly equal size.

    An example is never split. Examples of one group lie together, as far as the budget allows, and share what they
    begin with, up to the last token before their loss. The result depends on the examples alone.

    Args:
        examples: sequences of any lengths; an empty list gives no batch.
        tokens_per_microbatch: the most tokens of examples in one batch.
        device: where the tensors go.
        multiple: a last segment of padding, which bears no loss, makes the tokens of each batch a multiple of this.

    Raises:
        UserError: an example is empty, longer than the budget, or its lists do not agree.
    """
    for index, example in enumerate(examples):
        _check(index, example, tokens_per_microbatch)
    parts = [part for group in _groups(examples) for part in _split(examples, group, tokens_per_microbatch)]
    lengths = [part.tokens for part in parts]
    bins = _bins(lengths, tokens_per_microbatch)
    return [_lay(examples, [parts[i] for i in bin], torch.device(device), multiple) for bin in bins]


def empty_batch(device: torch.device | str = "cpu") -> Batch:
    """A batch of one token and no loss, for a rank that has nothing left but must take part in every collective."""
    batch = _lay([Example(token_ids=[0], loss_mask=[0.0])], [_Part([0], 0, 1)], torch.device(device), 1)
    batch.sequence_ids.fill_(-1)
    return batch


def balance(examples: Sequence[Example], world_size: int) -> list[list[Example]]:
    """Deal examples to ranks so that each has nearly the same number of tokens; order is kept within a rank.

    Every rank that calls this with the same list gets the same lists. With fewer examples than ranks some are empty.
    """
    parts = _spread([len(example) for example in examples], world_size)
    return [[examples[index] for index in part] for part in parts]


def _check(index: int, example: Example, budget: int) -> None:
    tokens = len(example.token_ids)
    if tokens == 0:
        raise UserError(f"example {index} has no tokens; leave it out before packing")
    if tokens > budget:
        raise UserError(
            f"example {index} has {tokens} tokens but tokens_per_microbatch is {budget}; "
            f"raise tokens_per_microbatch to at least {tokens} or shorten the example"
        )
    if len(example.loss_mask) != tokens:
        raise UserError(f"example {index} has {tokens} tokens but {len(example.loss_mask)} in loss_mask; give one each")
    if example.loss_mask[0] != 0.0:
        raise UserError(
            f"example {index} has loss_mask {example.loss_mask[0]} at its first token; nothing predicts it, use 0"
        )
    if not all(0.0 <= weight < math.inf for weight in example.loss_mask):
        worst = next(weight for weight in example.loss_mask if not 0.0 <= weight < math.inf)
        raise UserError(f"example {index} has {worst} in loss_mask; weights must be finite and at least 0")
    if not math.isfinite(example.advantage):
        raise UserError(f"example {index} has advantage {example.advantage}; the reward it came from must be finite")
    if example.old_logprobs is not None and len(example.old_logprobs) != tokens:
        given = len(example.old_logprobs)
        raise UserError(f"example {index} has {tokens} tokens but {given} old_logprobs; give one each")


def _groups(examples: Sequence[Example]) -> list[list[int]]:
    """Indices by group, in the order of their first; an example without a group is one of its own."""
    groups: dict[tuple[int, int], list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault((example.group, -1 if example.group >= 0 else index), []).append(index)
    return list(groups.values())


def _split(examples: Sequence[Example], group: list[int], budget: int) -> list[_Part]:
    """The group as one part, as several where the budget is too small, or as lone examples where nothing is shared."""
    lengths = [len(examples[i]) for i in group]
    shared = _shared_tokens([examples[i] for i in group]) if len(group) > 1 else 0
    if shared == 0:
        return [_Part([i], 0, length) for i, length in zip(group, lengths, strict=True)]
    own = [length - shared for length in lengths]
    return [
        _Part([group[i] for i in part], shared, shared + sum(own[i] for i in part))
        if len(part) > 1
        else _Part([group[part[0]]], 0, lengths[part[0]])
        for part in _bins(own, budget - shared)
    ]


def _shared_tokens(group: Sequence[Example]) -> int:
    """Tokens with which all of a group begin, save the one whose place predicts the first token with a loss."""
    ids = [example.token_ids for example in group]
    common = next((i for i, tokens in enumerate(zip(*ids, strict=False)) if len(set(tokens)) > 1), min(map(len, ids)))
    first_loss = min(next((i for i, weight in enumerate(e.loss_mask) if weight), len(e)) for e in group)
    return min(common, first_loss - 1)


def _bins(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices of the members of each micro-batch, ascending inside and by first member outside."""
    fitted: list[list[int]] = []
    room: list[int] = []
    for index in _longest_first(lengths):
        place = next((i for i, free in enumerate(room) if free >= lengths[index]), len(fitted))
        if place == len(fitted):
            fitted.append([])
            room.append(budget)
        fitted[place].append(index)
        room[place] -= lengths[index]
    even = _spread(lengths, len(fitted))
    # Spreading evenly can overfill a bin where the fit was tight; then the fit itself is the answer.
    bins = even if all(sum(lengths[i] for i in part) <= budget for part in even) else fitted
    return sorted(sorted(part) for part in bins if part)


def _spread(lengths: list[int], parts: int) -> list[list[int]]:
    """Longest first, each to the part with the fewest tokens so far; then the fewest members, then the lowest index."""
    heap = [(0, 0, part) for part in range(parts)]
    members: list[list[int]] = [[] for _ in range(parts)]
    for index in _longest_first(lengths):
        tokens, count, part = heap[0]
        members[part].append(index)
        heapq.heapreplace(heap, (tokens + lengths[index], count + 1, part))
    return [sorted(part) for part in members]


def _longest_first(lengths: list[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))


def _lay(examples: Sequence[Example], parts: Sequence[_Part], device: torch.device, multiple: int) -> Batch:
    segments: list[tuple[int, int, int, int]] = []  # example, its first and last token here, the prompt's segment
    for part in sorted(parts, key=lambda part: part.members[0]):
        home = -1
        if part.shared:
            home = len(segments)
            segments.append((part.members[0], 0, part.shared, -1))
        segments += [(index, part.shared, len(examples[index]), home) for index in part.members]
    filler = -sum(stop - first for _, first, stop, _ in segments) % multiple
    if filler:
        examples = [*examples, Example(token_ids=[0] * (filler + 1), loss_mask=[])]  # a prompt that nothing follows
        segments.append((len(examples) - 1, 0, filler, -1))
    lengths = [stop - first for _, first, stop, _ in segments]
    bounds = [0, *itertools.accumulate(lengths)]
    total = bounds[-1]
    input_ids, positions, targets, sequence_ids = np.zeros((4, total), dtype=np.int64)
    weight, advantage, rollout_logprob = np.zeros((3, total), dtype=np.float32)
    expert = np.zeros(total, dtype=np.bool_)
    targets[:] = IGNORE
    for (index, first, stop, _), start, end in zip(segments, bounds[:-1], bounds[1:], strict=True):
        example = examples[index]
        input_ids[start:end] = example.token_ids[first:stop]
        positions[start:end] = np.arange(first, stop)
        if stop < len(example):  # a shared prompt predicts nothing
            sequence_ids[start:end] = -1
            continue
        predicting = slice(start, end - 1)
        targets[predicting] = example.token_ids[first + 1 :]
        weight[predicting] = example.loss_mask[first + 1 :]
        advantage[predicting] = example.advantage
        sequence_ids[start:end] = index
        expert[predicting] = example.expert
        if example.old_logprobs is not None:
            rollout_logprob[predicting] = example.old_logprobs[first + 1 :]
    homes = [home for *_, home in segments]
    return Batch(
        input_ids=torch.from_numpy(input_ids).to(device),
        positions=torch.from_numpy(positions).to(device),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32, device=device),
        max_seqlen=max(lengths),
        prefix=None if max(homes) < 0 else torch.tensor(homes, dtype=torch.int32, device=device),
        targets=torch.from_numpy(targets).to(device),
        weight=torch.from_numpy(weight).to(device),
        advantage=torch.from_numpy(advantage).to(device),
        rollout_logprob=torch.from_numpy(rollout_logprob).to(device),
        sequence_ids=torch.from_numpy(sequence_ids).to(device),
        expert=torch.from_numpy(expert).to(device),
    )
