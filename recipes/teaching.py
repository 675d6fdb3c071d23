"""Teachers at work on a run's data: programs that know the answers, or a model whose answers must agree."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import cycle
from math import ceil
from pathlib import Path
from random import Random
from typing import Any

from ..data.databases import Database
from ..data.production import Production, Work, assign_strata, scripted_works
from ..data.queries import Repeats, Subject, synthesize_queries
from ..data.tasks import shares_to_counts
from ..data.taxonomy import TASK_TYPES
from ..data.teaching.chat import Chat, open_chat
from ..data.teaching.consensus import (
    NUM_ATTEMPTS,
    Agreement,
    Consensus,
    Disagreement,
    experts_of,
    finer_workflow,
    reach_consensus,
)
from ..data.teaching.executions import KeptSandbox
from ..data.trajectories import Expert
from ..data.views import View
from ..engine.metrics import say
from ..rollout.agent import Executes
from ..rollout.task import Task
from .run import Run
from .sources import Sources, shares_with_code

ROUNDS = 4  # the first, and those in which other questions stand in for what was dropped
REQUESTS = 8  # at once, of a model


def teach_by_script(run: Run, sources: Sources, production: Production, sandbox: Executes) -> None:
    """Trajectories of the scripted teacher, in the configured strata; what was dropped is made up for."""
    data, seed = run.config.data, run.config.run.seed
    modes = data.mode_shares()
    problems = sources.training_problems(data.num_trajectories, "train", modes)
    strata = assign_strata(problems, data.strata_shares(), seed)
    for number in range(1, ROUNDS + 1):
        strata = production.run(scripted_works(problems, strata, sandbox, seed, data.detail))
        if not strata or number == ROUNDS:
            break
        problems = sources.training_problems(len(strata), f"train{number}", shares_with_code(modes) or modes)


class ModelTeacher:
    """Writes questions and, for each, several trajectories, which are kept if their answers agree.

    What the model said and what code printed is kept on disk: a run that was stopped pays for nothing twice.

    Raises:
        UserError: ``data.teacher`` names no model, or one that gives no reply.
    """

    def __init__(self, run: Run, folder: Path, sandbox: Executes) -> None:
        self._config = run.config
        self._chat: Chat = open_chat(
            run.config.data.teacher, folder / "replies.jsonl", device=run.mesh.device, concurrency=REQUESTS
        )
        self._chat.check()
        self._sandbox = KeptSandbox(sandbox, folder / "executions.jsonl")
        self._workflows = {name: " ".join(kind.workflow) for name, kind in TASK_TYPES.items()}
        self._agreement = Agreement()
        self._critiques: dict[str, list[str]] = defaultdict(list)
        self._results: dict[str, Consensus | Disagreement] = {}

    def teach(self, sources: Sources, production: Production) -> dict[str, Any]:
        """Asks until there are ``data.num_trajectories``, for so many rounds at most, and reports costs and agreement.

        After each round the types whose attempts seldom agreed get a finer workflow.
        """
        wanted, seed = self._config.data.num_trajectories, self._config.run.seed
        subjects, repeats = self._subjects(sources), Repeats()
        modes = self._modes(Random(f"{seed}:modes"))
        asked = 0
        for number in range(ROUNDS):
            missing = wanted - production.report.count
            if missing <= 0:
                break
            rate = max(production.report.count / asked, 0.3) if asked else float(NUM_ATTEMPTS)
            queries, dropped = synthesize_queries(
                self._chat, subjects, ceil(missing / rate), types=list(TASK_TYPES.values()),
                seed=seed * ROUNDS + number, concurrency=REQUESTS, reject=repeats,
            )  # fmt: skip
            production.report.drop(dropped)
            asked += len(queries)
            tasks = [query.to_task(f"train{number}-{index:05d}", next(modes)) for index, query in enumerate(queries)]
            production.run([Work("success", partial(self._experts, task)) for task in tasks])
            self._learn(tasks)
        if production.report.count < wanted:
            say(f"after {ROUNDS} rounds there are {production.report.count} of {wanted} trajectories; it goes on so")
        cost, agreed = self._chat.cost(), self._agreement
        return {
            "teacher": {
                "replies": cost.replies,
                "prompt_tokens": cost.prompt_tokens,
                "completion_tokens": cost.completion_tokens,
            },
            "agreement": {
                name: {
                    "tasks": count,
                    "at_once": agreed.once[name],
                    "critique": agreed.critique[name],
                }
                for name, count in sorted(agreed.tasks.items())
            },
        }

    def _subjects(self, sources: Sources) -> list[Subject]:
        """Tables and databases, under the files that tasks name."""
        views: list[View | Database] = [*sources.training_views(), *sources.training.databases]
        return [
            Subject(
                view.table, (str(view.write(sources.folder / "train" / str(number))),), view.description,
                "sql" if view.file.endswith(".sqlite") else "python",
            )
            for number, view in enumerate(views)
        ]  # fmt: skip

    def _modes(self, rng: Random) -> Iterator[str]:
        counts = shares_to_counts(shares_with_code(self._config.data.mode_shares()), 100)
        order = [mode for mode, count in counts.items() for _ in range(count)]
        rng.shuffle(order)
        return cycle(order)

    def _experts(self, task: Task) -> list[Expert]:
        workflow = self._workflows[task.task_type]
        result = reach_consensus(task, self._chat, self._chat, self._sandbox, workflow=workflow)
        self._results[task.id] = result
        return experts_of(result)

    def _learn(self, tasks: Sequence[Task]) -> None:
        """Counts what agreed, in the order of the tasks, and mends the workflows of the types that seldom do."""
        for task in tasks:
            result = self._results[task.id]
            self._agreement.add(task.task_type, result)
            if isinstance(result, Disagreement) and result.critique:
                self._critiques[task.task_type].append(result.critique)
        for name in self._agreement.seldom():
            if critiques := self._critiques.pop(name, []):
                self._workflows[name] = finer_workflow(self._chat, name, self._workflows[name], critiques)
