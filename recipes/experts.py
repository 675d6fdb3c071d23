"""The expert trajectories of a run, as examples to imitate."""

import json
from collections.abc import Sequence
from random import Random
from typing import cast

from ..data.renaming import renamed
from ..data.trajectories import Expert, read_experts
from ..engine.batch import Example
from ..engine.errors import UserError
from ..engine.tokenizer import Tokenizer
from ..rollout.grammar import GRAMMARS
from ..rollout.trajectory import Writer, encode_spans, spans_to_example
from .run import Run


class Experts:
    """Reads the shards in ``RUN/data``.

    Raises:
        UserError: the data was not made yet, or a trajectory is in another grammar than its task asks for.
    """

    def __init__(self, run: Run) -> None:
        folder = run.folder / "data"
        self.all: list[Expert] = list(read_experts(folder))
        for expert in self.all:
            if expert.grammar != expert.task.mode:
                raise UserError(
                    f"the expert trajectory of task {expert.task.id!r} is in the grammar {expert.grammar!r}, but its "
                    f"task asks for {expert.task.mode!r}; synthesize again, or leave it out"
                )
        self._avoid: list[str] = json.loads((folder / "report.json").read_text())["evaluation_headers"]
        # A model that learns invented names by heart fails on the next table.
        self._fresh_names = run.config.data.detail == "short"
        self._seed = run.config.run.seed

    def in_wordings(self, count: int) -> list[Expert]:
        """Those whose question is in one of the first ``count`` wordings of its operation; all for 0.

        Raises:
            UserError: there is none.
        """
        found = [expert for expert in self.all if not count or expert.wording < count]
        if not found:
            raise UserError(
                f"none of {len(self.all)} trajectories is in the first {count} wordings of its question; raise "
                "sft.wordings or data.num_trajectories"
            )
        return found

    def examples(
        self, chosen: Sequence[Expert], step: int, tokenizer: Tokenizer, prompt_weight: float = 0.0
    ) -> list[Example]:
        """Trajectories as token ids, under the names that they have at this step."""
        return [_example(expert, tokenizer, prompt_weight) for expert in self.under_names(chosen, step)]

    def under_names(self, chosen: Sequence[Expert], step: int) -> list[Expert]:
        """Trajectories under the names that they have at this step: new ones each time where their detail is short."""
        if not self._fresh_names:
            return list(chosen)
        return [renamed(e, Random(f"{self._seed}:{e.task.id}:{step}"), self._avoid) for e in chosen]


def _example(expert: Expert, tokenizer: Tokenizer, prompt_weight: float) -> Example:
    """What the teacher wrote wrong on purpose is read, not imitated."""
    spans: list[tuple[Writer, str]] = [("prompt", GRAMMARS[expert.grammar].prompt(expert.task, tokenizer))]
    for index, (writer, text) in enumerate(expert.spans):
        spans.append(("forced" if index in expert.mistakes else cast(Writer, writer), text))
    return spans_to_example(encode_spans(spans, tokenizer), prompt_weight=prompt_weight, expert=True)
