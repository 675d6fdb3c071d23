"""The hierarchical reward model: the policy's decoder learns which steps of a trajectory are sound.

    torchrun --standalone --nproc-per-node 2 -m groupwise.recipes.hrm train hrm.steps=300

Starts from ``model.folder`` or from the run's SFT model, with a head of zeros; learns from the steps of the expert
trajectories that ``recipes.synthesize`` left and, with ``hrm.search_tasks``, from the policy's own, labelled by where
they lead; writes ``RUN/hrm/model``, a Hugging Face folder. Then it judges the steps of trajectories over the evaluation
tables, which nothing trained on, and writes ``RUN/hrm/report.json``.
Source: Datarus-R1, arXiv 2508.13382; arXiv 2503.13551.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from itertools import count
from pathlib import Path
from statistics import fmean
from typing import Any, cast

from ..data.production import assign_strata, made, scripted_works
from ..data.teachers import STRATA
from ..data.trajectories import Expert, read_experts, write_experts
from ..engine.atomic import write_atomically
from ..engine.errors import UserError
from ..engine.schedule import fitting_rate
from ..engine.scorer import StepSequence, pack_steps, score_steps, step_loss
from ..engine.tokenizer import Tokenizer
from ..rewards.calibration import auc, calibration
from ..rewards.hierarchical import Labels, StepScores, step_labels, step_sequence
from ..rewards.search import grow, tree_sequences
from ..rollout.grammar import GRAMMARS
from ..rollout.task import Task
from ..rollout.trajectory import Group, Writer, encode_spans
from .experts import Experts
from .policy import Policy, load_policy, load_scorer, save_policy
from .rollouts import Rollouts, my_share, open_sandbox
from .run import Run, launch
from .sources import Sources, shares_with_code
from .training import Training, places


def hrm(run: Run) -> Path:
    """Trains the model, measures it, and returns its folder; ``hrm.folder`` is one that is trained already.

    Raises:
        UserError: ``hrm.steps`` is 0 and there is no folder, or no grammar of ``data.modes`` has steps to judge.
    """
    folder, settings = run.folder / "hrm", run.config.hrm
    if settings.folder:
        return Path(settings.folder)
    if not settings.steps:
        raise UserError("hrm.steps is 0, expected some to train the reward model in, or hrm.folder")
    if not shares_with_code(run.config.data.mode_shares()):
        raise UserError(f"data.modes is {run.config.data.modes!r}, expected some datamind or agentic, which have steps")
    if not (folder / "report.json").exists():
        trained = (folder / "model").exists()
        scorer = load_scorer(run, folder / "model") if trained else _trained(run, folder / "model")
        report = assess(run, scorer, _judged(run))
        if run.is_main:
            write_atomically(folder / "report.json", json.dumps(report, indent=1))
        run.mesh.barrier()
    return folder / "model"


def _trained(run: Run, folder: Path) -> Policy:
    settings, mesh = run.config.hrm, run.mesh
    experts = Experts(run)
    first = Path(run.config.model.folder or run.folder / "sft" / "model")
    searched = search(run, first, experts.all) if settings.search_tasks else []
    scorer, taught = load_scorer(run, first, new_head=True), len(experts.all)
    training = Training(run, scorer, "hrm", settings.steps, fitting_rate(settings.lr, settings.steps))
    for step in training.steps():
        drawn = places(step, run.config.sft.sequences_per_step, taught + len(searched), run.config.run.seed)
        with training.pace("data"):
            shown = experts.under_names([experts.all[place] for place in drawn if place < taught], step)
            sequences = [expert_sequence(expert, scorer.tokenizer, settings.labels) for expert in shown]
            sequences += [searched[place - taught] for place in drawn if place >= taught]
            # Every rank draws all of them, so each knows the divisor.
            divisor = sum(sequence.num_labels for sequence in sequences)
            mine = my_share(run, sequences, len)
            batches = pack_steps(mine, run.config.optimizer.tokens_per_microbatch, mesh.device)
        update = training.update(step, batches, partial(step_loss, sequences=mine, divisor=divisor))
        record = {"loss": update.loss, "grad_norm": update.grad_norm, "lr": update.lr}
        training.log(step, {**record, "accuracy": update.stats["right"] / divisor})
    save_policy(run, scorer, folder)
    return scorer


def search(run: Run, folder: Path, experts: Sequence[Expert]) -> list[StepSequence]:
    """The steps of trees that the policy in ``folder`` grows on ``hrm.search_tasks`` of the experts' tasks, labelled.

    They are made once for the run, all ranks together, and kept in ``RUN/hrm/search.jsonl``.
    """
    file, settings, rollout = run.folder / "hrm" / "search.jsonl", run.config.hrm, run.config.rollout
    if not run.mesh.broadcast_object(file.exists()):
        with_code = [expert.task for expert in experts if GRAMMARS[expert.grammar].code]
        drawn = places(0, settings.search_tasks, len(with_code), run.config.run.seed)
        mine = my_share(run, [with_code[place] for place in drawn], lambda task: len(task.description))
        policy, numbers = load_policy(run, folder), count()
        with Rollouts(run, policy) as rollouts:

            def continue_from(tasks: Sequence[Task], openings: Sequence[Sequence[str]], size: int) -> list[Group]:
                depth = next(numbers)
                return rollouts.sample(
                    tasks,
                    size,
                    temperature=rollout.temperature,
                    seed=run.config.run.seed * 1_000_003 + depth,
                    record=f"hrm/{depth:06d}",
                    openings=openings,
                )

            roots = grow(mine, continue_from, policy.tokenizer)
        sequences = [sequence for root in roots for sequence in tree_sequences(root, settings.labels)]
        everyone = [sequence for part in run.mesh.all_gather_object(sequences) for sequence in part]
        if run.is_main:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, (json.dumps(asdict(sequence)) + "\n" for sequence in everyone))
        run.mesh.barrier()
    found = [StepSequence(**json.loads(line)) for line in file.read_text().splitlines()]
    labels = [label for sequence in found for label in sequence.step_labels if label is not None]
    run.say(f"search: {settings.search_tasks} trees, {len(labels)} steps, {fmean(labels or [0.0]):.1%} of them sound")
    return found


def expert_sequence(expert: Expert, tokenizer: Tokenizer, kind: Labels) -> StepSequence:
    """An expert's trajectory with the labels of its steps; the teacher says what it did wrong on purpose."""
    prompt: tuple[Writer, str] = ("prompt", GRAMMARS[expert.grammar].prompt(expert.task, tokenizer))
    spans = encode_spans([prompt, *((cast(Writer, writer), text) for writer, text in expert.spans)], tokenizer)
    turns = [index for index, (writer, _) in enumerate(expert.spans) if writer == "model"]
    mistakes = [number for number, index in enumerate(turns) if index in expert.mistakes]
    right = expert.stratum != "failure"
    return step_sequence(spans, step_labels(expert_outcomes(expert), right=right, kind=kind, mistakes=mistakes))


def expert_outcomes(expert: Expert) -> list[bool | None]:
    """Of each step whether its code ran without an error, None where it ran nothing."""
    writers = [*(writer for writer, _ in expert.spans), "model"]
    return [
        None if writers[index + 1] == "model" else index not in expert.failed
        for index, writer in enumerate(writers[:-1])
        if writer == "model"
    ]


def _judged(run: Run) -> list[Expert]:
    """Trajectories over the evaluation tables, as many of each stratum, made once for the run."""
    file, data, seed = run.folder / "hrm" / "judged.jsonl", run.config.data, run.config.run.seed
    if run.is_main and not file.exists():
        names = json.loads((run.folder / "data" / "report.json").read_text())["evaluation_tables"]
        sources, modes = Sources(run.config, file.parent / "tables", names), shares_with_code(data.mode_shares())
        problems = sources.evaluation_problems(data.num_eval_tasks, "hrm", modes)
        with open_sandbox(run) as sandbox:
            strata = assign_strata(problems, dict.fromkeys(STRATA, 1.0), seed)
            works = scripted_works(problems, strata, sandbox, seed, data.detail)
            found = made(works, threads=2 * run.config.sandbox.workers)
            write_experts(file, (expert for each in found for expert in each.experts))
    run.mesh.barrier()
    return list(read_experts(file))


def assess(run: Run, scorer: Policy, experts: Sequence[Expert]) -> dict[str, Any]:
    """How well the model knows sound steps and sound trajectories, the same on every rank.

    Returns:
        For all trajectories and for each stratum: ``count``, means of ``reward`` and ``model_score``, and the
        calibration of ``steps`` and ``pairs`` against the binary labels. ``auc_reward`` and ``auc_model_score``:
        probability that a trajectory that corrects its mistake has more than one that fails to the end.
    """
    tokens = run.config.optimizer.tokens_per_microbatch
    sequences = [expert_sequence(expert, scorer.tokenizer, "binary") for expert in experts]
    mine = my_share(run, range(len(experts)), lambda index: len(sequences[index]))
    found = score_steps(scorer.model, [sequences[index] for index in mine], tokens)
    scores: dict[int, StepScores] = {}
    for part in run.mesh.all_gather_object(list(zip(mine, found, strict=True))):
        for index, (steps, pairs) in part:
            errors = [not ok for ok in expert_outcomes(experts[index]) if ok is not None]
            scores[index] = StepScores(steps, pairs, errors)
    strata = {name: [i for i, expert in enumerate(experts) if expert.stratum == name] for name in STRATA}
    corrected = [scores[index] for name in ("corrected", "self_corrected") for index in strata[name]]
    failed = [scores[index] for index in strata["failure"]]
    return {
        name: _measured([(sequences[index], scores[index]) for index in indices])
        for name, indices in {"all": range(len(experts)), **strata}.items()
    } | {
        "auc_reward": auc([score.reward for score in corrected], [score.reward for score in failed]),
        "auc_model_score": auc([score.model_score for score in corrected], [score.model_score for score in failed]),
    }


def _measured(judged: Sequence[tuple[StepSequence, StepScores]]) -> dict[str, Any]:
    steps = [label == 1.0 for sequence, _ in judged for label in sequence.step_labels]
    pairs = [label == 1.0 for sequence, _ in judged for label in sequence.pair_labels[1:]]
    return {
        "count": len(judged),
        "reward": fmean(score.reward for _, score in judged) if judged else None,
        "model_score": fmean(score.model_score for _, score in judged) if judged else None,
        "steps": calibration([score for _, scores in judged for score in scores.steps], steps),
        "pairs": calibration([score for _, scores in judged for score in scores.pairs], pairs),
    }


def _recipe(run: Run) -> None:
    folder = hrm(run)
    run.say(f"model: {folder}")
    run.say(run.planned.report())
    if run.is_main and not run.config.hrm.folder:
        report = json.loads((folder.parent / "report.json").read_text())
        steps, pairs = report["all"]["steps"], report["all"]["pairs"]
        print(
            f"{report['all']['count']} trajectories never trained on: steps {steps['accuracy']:.3f} right, calibration "
            f"error {steps['ece']:.3f}; pairs {pairs['accuracy']:.3f}, {pairs['ece']:.3f}; corrected above failed: "
            f"{report['auc_model_score']:.3f} by the model, {report['auc_reward']:.3f} with the rules",
            flush=True,
        )


if __name__ == "__main__":
    launch(_recipe, phases=("load", "rollout", "update", "checkpoint"), stages=("hrm",))
