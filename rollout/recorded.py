"""A sampler whose turns are written already: ``run_agent`` goes again through the trajectories of a group.

    (again,) = run_agent(Recorded(group, tokenizer), sandbox, [group.task], num_generations=..., ...)

Prompts are rendered, code runs and observations are cut anew; where all is as it was, ``again`` is the group.
"""

from collections.abc import Sequence
from typing import Literal

from ..engine.tokenizer import Tokenizer
from .draw import SamplingParams
from .generation import Completion
from .trajectory import Group, Trajectory

END = "the record has no further turn"


class Recorded:
    """Gives each sample of one group the turns that the model wrote then; what asks for more fails by ``END``.

    Args:
        group: its trajectories in the order of their samples.
        tokenizer: of the policy.
    """

    def __init__(self, group: Group, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._left = [_turns(trajectory, tokenizer, index) for index, trajectory in enumerate(group.trajectories)]
        self._token_ids: dict[int, list[int]] = {}
        self._asked: list[int] = []

    @property
    def has_work(self) -> bool:
        return bool(self._asked)

    def submit(self, prompt_ids: Sequence[int], params: SamplingParams, *, stream: tuple[int, int, int]) -> int:
        """The sample is named by the stream, as in ``run_agent``."""
        self._token_ids[stream[1]] = []
        self.extend(stream[1], prompt_ids, params)
        return stream[1]

    def extend(self, request_id: int, token_ids: Sequence[int], params: SamplingParams) -> None:
        self._token_ids[request_id] += token_ids
        self._asked.append(request_id)

    def cancel(self, request_id: int) -> None:
        self._asked = [asked for asked in self._asked if asked != request_id]

    def poll(self) -> list[Completion]:
        asked, self._asked = self._asked, []
        found = [self._left[request].pop(0) if self._left[request] else _end(request) for request in asked]
        for completion in found:
            self._token_ids[completion.request_id] += completion.token_ids
        return found

    def token_ids(self, request_id: int) -> Sequence[int]:
        return self._token_ids[request_id]

    def is_waiting(self, request_id: int) -> bool:
        return False


def _turns(trajectory: Trajectory, tokenizer: Tokenizer, request: int) -> list[Completion]:
    written = [span for span in trajectory.spans if span.writer == "model"]
    ends: list[Literal["stop", "length", "error"]] = ["stop"] * len(written)
    if trajectory.status == "failed":
        ends[-1:] = ["error"]
    elif trajectory.status == "token_limit" and len(trajectory.executions) < len(written):
        ends[-1:] = ["length"]  # it was cut; else its code ran, and there was no room behind it
    return [
        Completion(
            request,
            span.token_ids,
            span.logprobs,
            span.logprobs,
            end,
            tokenizer.decode(span.token_ids),
            trajectory.error,
        )
        for span, end in zip(written, ends, strict=True)
    ]


def _end(request: int) -> Completion:
    return Completion(request, [], [], [], "error", "", END)
