"""What a policy and its environment wrote, token by token, with who wrote what.

Token in, token out: a trajectory holds the ids that were sampled; nothing here decodes and encodes them again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from ..engine.batch import Example
from .task import Task

if TYPE_CHECKING:
    from ..engine.tokenizer import Tokenizer
    from .sandbox.execution import Execution

Writer = Literal["prompt", "model", "environment", "forced"]
Status = Literal["answered", "void", "turn_limit", "token_limit", "time_limit", "error_limit", "failed"]

# Trajectories that end so carry no policy-gradient loss under `mask_void` (DataMind, arXiv 2509.25084); an
# error_limit is the policy's own doing in well-formed turns, so it keeps its loss. A failed one, for which the model
# gave no finite number or whose task's file is gone, carries none in any case.
TRUNCATED: frozenset[Status] = frozenset({"turn_limit", "token_limit", "time_limit"})
VOID_STATUSES: frozenset[Status] = TRUNCATED | {"void", "failed"}


def masked_statuses(mask_void: bool, keep_truncated: bool) -> frozenset[Status]:
    """How trajectories end that bear no loss: a truncated one does where its length has a cost of its own."""
    return VOID_STATUSES - (TRUNCATED if keep_truncated else frozenset()) if mask_void else frozenset()


@dataclass(slots=True)
class Span:
    """Consecutive tokens of one writer.

    Args:
        writer: "prompt" and "environment" text comes from outside; "model" tokens were sampled; "forced" tokens were
            put into the model's text by the agent: behind a model span a closing tag that it left out, elsewhere a turn
            of an opening (see `agent.run_agent`).
        token_ids: the ids.
        logprobs: model spans: each sampled id's log-probability under the temperature alone, same length; else empty.
    """

    writer: Writer
    token_ids: list[int]
    logprobs: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Trajectory:
    """One sample of a task, from the prompt to its end.

    Args:
        task: what was asked.
        sample: index in its group.
        spans: in order; the first is the prompt.
        status: how it ended; `error` says in one sentence why it failed.
        answer: the final answer's text, None without one.
        executions: the results of the code turns, in order.
        rewards: the reward's parts by name, filled by `rewards`.
        reward, advantage: filled by `rewards` and the objective.
        scored: False where no judge gave a verdict: its group is compared without it.
    """

    task: Task
    sample: int
    spans: list[Span]
    status: Status = "void"
    error: str = ""
    answer: str | None = None
    executions: list[Execution] = field(default_factory=list)
    rewards: dict[str, float] = field(default_factory=dict)
    reward: float = 0.0
    advantage: float = 0.0
    scored: bool = True

    @property
    def name(self) -> str:
        """In words for a person: which sample of which task."""
        return f"sample {self.sample} of task {self.task.id!r}"

    @property
    def token_ids(self) -> list[int]:
        """All ids, prompt included."""
        return [token for span in self.spans for token in span.token_ids]

    @property
    def completion_tokens(self) -> int:
        """Number of tokens that the model wrote."""
        return sum(len(span.token_ids) for span in self.spans if span.writer == "model")

    @property
    def turns(self) -> int:
        """Number of turns, those of an opening included."""
        return len(turn_starts([span.writer for span in self.spans]))

    @property
    def is_void(self) -> bool:
        """Whether `mask_void` takes this trajectory out of the loss."""
        return self.status in VOID_STATUSES

    def model_text(self, tokenizer: Tokenizer) -> list[str]:
        """The text of each turn, in order, with the closing tags that were forced."""
        starts = turn_starts([span.writer for span in self.spans])
        texts = []
        for start, stop in pairwise([*starts, len(self.spans)]):
            written = [span.token_ids for span in self.spans[start:stop] if span.writer != "environment"]
            texts.append(tokenizer.decode([token for ids in written for token in ids]))
        return texts

    def to_record(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """The trajectory in words, for files and for the terminal; training needs the ids and never reads this.

        Execution i is that of code turn i; the last code turn of a trajectory may have none.
        """
        return {
            "task": self.task.to_dict(),
            "sample": self.sample,
            "status": self.status,
            "error": self.error,
            "answer": self.answer,
            "reward": self.reward,
            "rewards": self.rewards,
            "advantage": self.advantage,
            "scored": self.scored,
            "turns": self.turns,
            "completion_tokens": self.completion_tokens,
            "spans": [{"writer": span.writer, "text": tokenizer.decode(span.token_ids)} for span in self.spans],
            "executions": [asdict(execution) for execution in self.executions],
        }

    def to_example(self, *, mask: Collection[Status] = (), group: int = -1) -> Example:
        """The trajectory as a training example: loss weight 1 on each token that the model sampled, else 0.

        Args:
            mask: a trajectory that ended so has weight 0 everywhere, as one that failed or was not scored always has.
            group: number of its group, carried along.
        """
        masked = self.status == "failed" or not self.scored or self.status in mask
        return spans_to_example(self.spans, advantage=self.advantage, masked=masked, group=group)


@dataclass(slots=True)
class Group:
    """The samples of one task, over which advantages are taken."""

    task: Task
    trajectories: list[Trajectory]


def turn_starts(writers: Sequence[Writer]) -> list[int]:
    """Indices of the spans with which turns begin: the model's, and forced ones that complete no other span."""
    return [
        index
        for index, (last, writer) in enumerate(zip((None, *writers), writers, strict=False))
        if writer == "model" or (writer == "forced" and last not in ("model", "forced"))
    ]


def spans_to_example(
    spans: Iterable[Span],
    *,
    advantage: float = 0.0,
    masked: bool = False,
    prompt_weight: float = 0.0,
    group: int = -1,
    expert: bool = False,
) -> Example:
    """Spans as a training example, for rollouts and for expert trajectories alike.

    Args:
        masked: True gives every token the weight 0.
        prompt_weight: weight of the prompt's tokens (SFT of very small models learns the language there too).
        expert: the loss is the likelihood of the text (SFT).

    Returns:
        An example; its first token has weight 0, since nothing predicts it. `old_logprobs` (0 where the model wrote
        nothing) is there only if every model span has its log-probabilities.
    """
    token_ids: list[int] = []
    weights: list[float] = []
    logprobs: list[float] = []
    complete = True
    for span in spans:
        count = len(span.token_ids)
        weight = {"model": 1.0, "prompt": prompt_weight}.get(span.writer, 0.0)
        token_ids += span.token_ids
        weights += [0.0 if masked else weight] * count
        if span.writer == "model" and len(span.logprobs) != count:
            complete = False
        logprobs += span.logprobs if span.writer == "model" and complete else [0.0] * count
    if weights:
        weights[0] = 0.0
    return Example(
        token_ids=token_ids,
        loss_mask=weights,
        advantage=advantage,
        old_logprobs=logprobs if complete else None,
        group=group,
        expert=expert,
    )


def encode_spans(spans: Iterable[tuple[Writer, str]], tokenizer: Tokenizer) -> list[Span]:
    """Tokenises (writer, text) pairs one by one, as a rollout does, so that no token straddles two writers."""
    return [Span(writer, tokenizer.encode(text)) for writer, text in spans]


def cap_text(text: str, tokenizer: Tokenizer, max_tokens: int) -> str:
    """Cuts a long observation in its middle: head and tail stay, a line between says how much is left out.

    Args:
        text: what the code printed.
        max_tokens: the most tokens that the result encodes to; below about 24 the marker line takes most of them.
    """
    # Encoding costs time by length: of very long text only the ends are encoded.
    widest = 32 * max_tokens + 1024
    shown = text if len(text) <= 2 * widest else text[:widest] + text[-widest:]
    ids = tokenizer.encode(shown)
    if len(ids) <= max_tokens and shown is text:
        return text
    keep = min(max_tokens, len(ids))
    while keep > 0:
        head = tokenizer.decode(ids[: keep - keep // 2])
        tail = tokenizer.decode(ids[len(ids) - keep // 2 :])
        capped = f"{head}\n... {len(text) - len(head) - len(tail)} characters left out ...\n{tail}"
        # The marker counts too, and a cut inside a character re-encodes longer, hence the loop.
        excess = len(tokenizer.encode(capped)) - max_tokens
        if excess <= 0:
            return capped
        keep -= excess
    return ""
