"""What a run's trajectories earn: its curriculum, its hierarchical reward model and its judge."""

from collections.abc import Sequence
from pathlib import Path

from ..engine.errors import UserError
from ..engine.together import together
from ..engine.tokenizer import Tokenizer
from ..rewards.curriculum import score, structure_schedule
from ..rewards.judge import open_judge
from ..rollout.task import Task
from ..rollout.trajectory import Group
from .policy import load_hierarchical_reward
from .run import Run


class Rewarding:
    """Scores groups step by step, as configured.

    Args:
        run: configuration and ranks.
        tokenizer: of the policy, and of the reward model.
        tasks: all that may be asked.

    Raises:
        UserError: there are answers in free text and no judge, the judge does not answer, the reward model is not
            there, or the overlong cost would begin before the first token.
    """

    def __init__(self, run: Run, tokenizer: Tokenizer, tasks: Sequence[Task]) -> None:
        self._run, self._tokenizer, settings = run, tokenizer, run.config.reward
        self._structure = structure_schedule(settings, run.config.grpo.steps)
        limit = run.config.rollout.max_trajectory_tokens
        if settings.overlong_buffer >= limit:
            raise UserError(
                f"reward.overlong_buffer is {settings.overlong_buffer}, expected less than "
                f"rollout.max_trajectory_tokens {limit}; lower it"
            )
        free = next((task for task in tasks if task.answer_type == "free"), None)
        if free is not None and not settings.judge:
            raise UserError(f"the answer of task {free.id!r} is free text, but reward.judge is empty; name a judge")
        self._judge = None
        if settings.judge:
            self._judge = open_judge(settings.judge, run.folder / "judge.jsonl", device=run.mesh.device)
            together(run.mesh, self._judge.check if run.is_main else lambda: None)
        self._hrm = None
        if run.config.scores_steps:
            self._hrm = load_hierarchical_reward(run, Path(run.config.hrm.folder or run.folder / "hrm" / "model"))

    def score(self, groups: Sequence[Group], step: int) -> None:
        """Fills the rewards of this rank's groups. Every rank calls it together."""
        config = self._run.config
        score(
            groups,
            tokenizer=self._tokenizer,
            settings=config.reward,
            structure_weight=self._structure(step),
            max_trajectory_tokens=config.rollout.max_trajectory_tokens,
            semantic=self._hrm,
            judge=self._judge,
        )

    def metrics(self, step: int) -> dict[str, float]:
        """The weight of structure at a step, and the judge's figures of all ranks since the last call. Collective."""
        found = {"reward/structure_weight": self._structure(step)} if self._run.config.reward.kind == "datarus" else {}
        if self._judge is not None:
            ranks = self._run.mesh.all_gather_object(self._judge.metrics())
            found |= {name: sum(rank[name] for rank in ranks) for name in ranks[0]}
        return found
