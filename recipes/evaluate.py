"""Evaluation of a checkpoint on tables that no stage trained on.

    torchrun --standalone --nproc-per-node 2 -m groupwise.recipes.evaluate train model.folder=runs/train/grpo/model

pass@1 is the mean over all runs of all tasks, pass@k the share of tasks that one of the k runs solved (for DataMind,
arXiv 2509.25084, k = 3 at temperature 0.7 and top-p 0.95).
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from ..engine.atomic import write_atomically
from ..engine.errors import UserError
from ..engine.metrics import progress
from ..rewards.answer import trajectory_correct
from ..rollout.task import read_tasks
from .policy import Policy, load_policy
from .rollouts import Rollouts, my_share
from .run import Run, launch

NUM_EXAMPLES = 5  # trajectories kept to be looked at
CHUNK = 32  # tasks of a rank between two steps of the progress bar


@dataclass(frozen=True)
class Outcome:
    """One run of one task."""

    task: str
    task_type: str
    table: str
    correct: bool
    answered: bool
    tokens: int
    turns: int


def evaluate(run: Run, policy: Policy, rollouts: Rollouts, name: str) -> dict[str, Any]:
    """Runs every evaluation task ``evaluate.num_samples`` times and writes ``RUN/evaluate/NAME.json``.

    Each run is kept in ``RUN/trajectories/evaluate/NAME``, with the reward 1 where its answer is right, else 0.

    Returns:
        ``pass_at_1``, ``pass_at_k``, ``k``, ``num_tasks``, ``answered`` (share of runs with an answer), mean ``tokens``
        and ``turns`` of a run, ``by_type`` with the pass@1 of each task type, and ``examples``, some trajectories as
        records. The same on every rank.
    """
    file = run.folder / "evaluate" / f"{name}.json"
    if file.exists():
        return json.loads(file.read_text())
    settings, mesh = run.config.evaluate, run.mesh
    tasks = list(read_tasks(run.folder / "data" / "eval.jsonl"))
    mine = my_share(run, tasks, lambda task: len(task.description) + len(task.question))
    # Ranks with fewer tasks still take part in every gathering of the weights.
    rounds = -(-len(tasks) // (CHUNK * mesh.world_size))
    outcomes: list[Outcome] = []
    examples: list[dict[str, Any]] = []
    for index in progress(range(rounds), f"evaluate {name}", rank=mesh.rank):
        groups = rollouts.sample(
            mine[index * CHUNK : (index + 1) * CHUNK],
            settings.num_samples,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=run.config.run.seed,
            record=f"evaluate/{name}/{index:06d}",
        )
        for group in groups:
            for trajectory in group.trajectories:
                trajectory.reward = float(trajectory_correct(trajectory))
                trajectory.rewards = {"answer": trajectory.reward}
        rollouts.record(f"evaluate/{name}/{index:06d}", groups)
        outcomes += [
            Outcome(
                task=group.task.id,
                task_type=group.task.task_type,
                table=group.task.table,
                correct=trajectory.reward > 0,
                answered=trajectory.answer is not None,
                tokens=trajectory.completion_tokens,
                turns=trajectory.turns,
            )
            for group in groups
            for trajectory in group.trajectories
        ]
        examples += [
            {**first.to_record(policy.tokenizer), "correct": first.reward > 0}
            for first in (group.trajectories[0] for group in groups[: NUM_EXAMPLES - len(examples)])
        ]
    everyone = [outcome for part in mesh.all_gather_object(outcomes) for outcome in part]
    result = {**summarise(everyone), "examples": mesh.broadcast_object(examples)}
    if run.is_main:
        write_atomically(file, json.dumps(result, indent=1))
    return result


def summarise(outcomes: list[Outcome]) -> dict[str, Any]:
    """Scores and means of the runs; see :func:`evaluate`."""
    by_task: dict[str, list[Outcome]] = defaultdict(list)
    by_type: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        by_task[outcome.task].append(outcome)
        by_type[outcome.task_type].append(outcome)
    return {
        "pass_at_1": fmean(o.correct for o in outcomes),
        "pass_at_k": fmean(any(o.correct for o in runs) for runs in by_task.values()),
        "k": max(len(runs) for runs in by_task.values()),
        "num_tasks": len(by_task),
        "answered": fmean(o.answered for o in outcomes),
        "tokens": fmean(o.tokens for o in outcomes),
        "turns": fmean(o.turns for o in outcomes),
        "by_type": {
            name: {"pass_at_1": fmean(o.correct for o in runs), "num_tasks": len({o.task for o in runs})}
            for name, runs in sorted(by_type.items())
        },
    }


def _recipe(run: Run) -> None:
    if not run.config.model.folder:
        raise UserError("evaluate needs a checkpoint; give model.folder=FOLDER")
    folder = Path(run.config.model.folder)
    policy = load_policy(run, folder)
    with Rollouts(run, policy) as rollouts:
        result = evaluate(run, policy, rollouts, folder.parent.name if folder.name == "model" else folder.name)
    run.say(run.planned.report())
    run.say(json.dumps({key: value for key, value in result.items() if key != "examples"}))


if __name__ == "__main__":
    launch(_recipe, claim=False, phases=("load", "rollout"))
