"""Evaluation of a checkpoint: on tables that no stage trained on, or on a benchmark.

    torchrun --standalone --nproc-per-node 2 -m groupwise.recipes.evaluate train model.folder=runs/train/grpo/model
    torchrun ... -m groupwise.recipes.evaluate train model.folder=... evaluate.benchmark=DABench/
    python -m groupwise.recipes.evaluate --compare runs/train/evaluate/sft.json runs/train/evaluate/grpo.json

pass@1 is the mean over all runs of all tasks, pass@k the unbiased estimate over k of them (for DataMind, arXiv
2509.25084, k = 3 at temperature 0.7 and top-p 0.95). The result goes to ``RUN/evaluate/NAME``, ``.json``, ``.md`` and
``.png``. An evaluation that was stopped goes on by the same command, with the chunks of tasks that it has not sampled
yet. ``--compare`` shows two results side by side, with the significance of what differs.
"""

import dataclasses
import hashlib
import json
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..data.benchmarks import Benchmark, BenchmarkItem, read_benchmark
from ..data.outcomes import Outcome, summarise
from ..data.scorers import Rule, score
from ..engine.atomic import write_atomically
from ..engine.errors import UserError
from ..engine.metrics import progress
from ..engine.together import together
from ..rewards.judge import Judge, open_judge
from ..rewards.verdict import Question
from ..rollout.record import read_records
from ..rollout.task import read_tasks
from ..rollout.trajectory import Group
from .command import run_command
from .compare import compare_results
from .policy import Policy, load_policy
from .rollouts import Rollouts, my_share
from .run import Run, launch
from .scoreboard import draw, print_result, to_markdown
from .sources import DESCRIPTION_CHARS

NUM_EXAMPLES = 5  # trajectories kept to be looked at
CHUNK = 32  # tasks of a rank between two steps of the progress bar
LIMITS = ("max_turns", "max_tokens_per_turn", "max_trajectory_tokens", "max_observation_tokens",
          "max_consecutive_errors", "max_wall_s")  # fmt: skip


def evaluate(run: Run, policy: Policy, rollouts: Rollouts, name: str) -> dict[str, Any]:
    """Runs every evaluation task ``evaluate.num_samples`` times and writes ``RUN/evaluate/NAME.json``, .md and .png.

    Each run is kept in ``RUN/trajectories/evaluate/NAME``, with the reward 1 where its answer is right, else 0.

    Returns:
        What ``summarise`` gives; ``benchmark``, its name ("" for the run's own tasks), and ``dropped``, how many of its
        rows for which reason; ``asked``, what the result is a function of; ``examples``, some trajectories as records;
        ``outcomes``, each run. The same on every rank.

    Raises:
        UserError: the file is there and is of another evaluation, or what ``read_benchmark`` and ``summarise`` raise.
    """
    benchmark = _benchmark(run, rollouts)
    asked = _asked(run, policy, benchmark)
    file = run.folder / "evaluate" / f"{name}.json"
    if file.exists():
        return _finished(file, asked)
    together(run.mesh, (lambda: _begin(run, name, asked)) if run.is_main else _nothing)
    judge = _judge(run, benchmark)
    items = {item.task.id: item for item in benchmark.items}
    tasks = [item.task for item in benchmark.items]
    mine = my_share(run, tasks, lambda task: len(task.description) + len(task.question))
    # Ranks with fewer tasks still take part in every gathering of the weights.
    rounds = -(-len(tasks) // (CHUNK * run.mesh.world_size))
    found: list[Outcome] = []
    examples: list[dict[str, Any]] = []
    for index in progress(range(rounds), f"evaluate {name}", rank=run.mesh.rank):
        chunk = [items[task.id] for task in mine[index * CHUNK : (index + 1) * CHUNK]]
        record = f"evaluate/{name}/{index:06d}"
        if not all(run.mesh.all_gather_object(_is_complete(rollouts.file(record), chunk, run))):
            groups = _sample(run, rollouts, chunk, record)
            _score(groups, {item.task.id: item.rule for item in chunk}, judge)
            rollouts.record(record, groups)
        # Whether they were sampled now or before, outcomes are read from the disk: they are the same.
        for line in read_records(rollouts.file(record)):
            found.append(Outcome.of_record(items[line["task"]["id"]], line))
            if line["sample"] == 0 and len(examples) < NUM_EXAMPLES:
                examples.append({**line, "correct": line["reward"] > 0})
    outcomes = [outcome for part in run.mesh.all_gather_object(found) for outcome in part]
    result = {
        "benchmark": benchmark.name,
        **summarise(outcomes, run.config.run.seed),
        "dropped": dict(Counter(drop.reason for drop in benchmark.dropped).most_common()),
        "asked": asked,
        "examples": run.mesh.broadcast_object(examples),
        "outcomes": [outcome.to_dict() for outcome in outcomes],
    }
    if run.is_main:
        write_atomically(file.with_suffix(".md"), to_markdown(result, name))
        draw(result, name, file.with_suffix(".png"))
        write_atomically(file, json.dumps(result, indent=1))  # the last: it says that all is there
    return result


def _benchmark(run: Run, rollouts: Rollouts) -> Benchmark:
    """The benchmark that was named, read by the first rank, or the run's own evaluation tasks."""
    folder = run.config.evaluate.benchmark
    if not folder:
        file = run.folder / "data" / "eval.jsonl"
        if not file.exists():
            raise UserError(f"{file} does not exist; run groupwise.recipes.synthesize first or give evaluate.benchmark")
        return Benchmark("", [BenchmarkItem(task) for task in read_tasks(file)], [])
    shares = run.config.data.mode_shares()
    mode = max(("datamind", "agentic"), key=lambda name: shares[name])
    work, budget = run.folder / "data" / "benchmark", DESCRIPTION_CHARS if run.config.data.detail == "full" else 0

    def read() -> Benchmark | None:
        if not run.is_main:
            return None
        return read_benchmark(folder, work=work, mode=mode, sandbox=rollouts.sandbox, budget=budget)

    found = together(run.mesh, read)[0]
    assert found is not None  # the first rank read it
    return found


def _asked(run: Run, policy: Policy, benchmark: Benchmark) -> dict[str, Any]:
    """What a result is a function of, in a form that can be compared."""
    tasks = json.dumps([(item.task.to_dict(), item.rule) for item in benchmark.items])
    # The weights' bits, summed: the same however they are sharded.
    bits = sum(int(shard.data.view(torch.int32).sum(dtype=torch.int64)) for shard in policy.model.shards)
    total = torch.tensor(bits, dtype=torch.int64, device=run.mesh.device)
    rollout = dataclasses.asdict(run.config.rollout)
    return {
        **dataclasses.asdict(run.config.evaluate),
        **{name: rollout[name] for name in LIMITS},
        "seed": run.config.run.seed,
        "tasks": hashlib.sha256(tasks.encode()).hexdigest()[:16],
        "weights": int(run.mesh.all_reduce(total, over="shards").item()),
    }


def _finished(file: Path, asked: Mapping[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(file.read_text())
    was = result.get("asked", {})
    if changed := [f"{key} {was.get(key)!r} -> {value!r}" for key, value in asked.items() if was.get(key) != value]:
        raise UserError(
            f"{file} is of another evaluation ({', '.join(changed[:3])}); choose another run.name or remove the file"
        )
    return result


def _begin(run: Run, name: str, asked: Mapping[str, Any]) -> None:
    """Keeps the chunks of a stopped evaluation if it was this one, on as many ranks, else removes them."""
    file, this = run.folder / "evaluate" / f"{name}.asked.json", {**asked, "ranks": run.mesh.world_size}
    if not file.exists() or json.loads(file.read_text()) != this:
        shutil.rmtree(run.folder / "trajectories" / "evaluate" / name, ignore_errors=True)
        write_atomically(file, json.dumps(this, indent=1))


def _nothing() -> None:
    """What ranks other than the first do where they only wait for it."""


def _judge(run: Run, benchmark: Benchmark) -> Judge | None:
    """The configured judge, where there are answers for it."""
    spec = run.config.reward.judge
    if not spec or all(item.task.answer_type != "free" for item in benchmark.items):
        return None
    judge = open_judge(spec, run.folder / "judge.jsonl", device=run.mesh.device)
    together(run.mesh, judge.check if run.is_main else _nothing)
    return judge


def _is_complete(file: Path, chunk: Sequence[BenchmarkItem], run: Run) -> bool:
    """Whether a file holds all runs of a chunk with their rewards."""
    expected = list(product((item.task.id for item in chunk), range(run.config.evaluate.num_samples)))
    if not file.exists():
        return False
    records = list(read_records(file))
    found = [(record["task"]["id"], record["sample"]) for record in records]
    return found == expected and all("answer" in record["rewards"] for record in records)


def _sample(run: Run, rollouts: Rollouts, chunk: Sequence[BenchmarkItem], record: str) -> list[Group]:
    settings = run.config.evaluate
    return rollouts.sample(
        [item.task for item in chunk],
        settings.num_samples,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=run.config.run.seed,
        record=record,
    )


def _score(groups: Sequence[Group], rules: Mapping[str, Rule], judge: Judge | None) -> None:
    """Fills the rewards; free text that is not the gold's own words is a judge's, and not scored without one."""
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    verdicts = [score(rules[trajectory.task.id], trajectory).correct for trajectory in trajectories]
    unsure = [place for place, verdict in enumerate(verdicts) if verdict is None]
    if judge is not None and unsure:
        asked = [trajectories[place] for place in unsure]
        said = judge.verdicts([Question(one.task.question, one.task.answer, one.answer or "") for one in asked])
        for place, verdict in zip(unsure, said, strict=True):
            verdicts[place] = verdict
    for trajectory, verdict in zip(trajectories, verdicts, strict=True):
        trajectory.scored = verdict is not None
        trajectory.reward = float(bool(verdict))
        trajectory.rewards = {"answer": trajectory.reward}


def _recipe(run: Run) -> None:
    if not run.config.model.folder:
        raise UserError("evaluate needs a checkpoint; give model.folder=FOLDER")
    folder, benchmark = Path(run.config.model.folder), run.config.evaluate.benchmark
    name = folder.parent.name if folder.name == "model" else folder.name
    name += f"-{Path(benchmark).resolve().name}" if benchmark else ""
    policy = load_policy(run, folder)
    with Rollouts(run, policy) as rollouts:
        result = evaluate(run, policy, rollouts, name)
    run.say(run.planned.report())
    if run.is_main:
        print_result(result, name, Console(highlight=False))
        print(f"files: {run.folder / 'evaluate' / name}.json, .md, .png")
    run.say(json.dumps({key: value for key, value in result.items() if key not in ("examples", "outcomes")}))


if __name__ == "__main__":
    if "--compare" in sys.argv:
        run_command(compare_results)
    else:
        launch(_recipe, claim=False, phases=("load", "rollout"), stages=("evaluate",))
