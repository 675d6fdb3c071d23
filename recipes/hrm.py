"""The hierarchical reward model: the policy's decoder learns which steps of a trajectory are sound.

    torchrun --standalone --nproc-per-node 2 -m groupwise.recipes.hrm train hrm.steps=300

Starts from ``model.folder`` or from the run's SFT model, with a head of zeros; learns from the steps of the expert
trajectories that ``recipes.synthesize`` left; writes ``RUN/hrm/model``, a Hugging Face folder. Then it judges the steps
of trajectories over the evaluation tables, which nothing trained on, and writes ``RUN/hrm/report.json``.
Source: Datarus-R1, arXiv 2508.13382; arXiv 2503.13551.
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, cast

from ..data.tables import find_tables, split_tables
from ..data.tasks import evaluation_views, make_problems
from ..data.teachers import STRATA
from ..data.trajectories import Expert, build_trajectories, read_experts, write_experts
from ..engine.atomic import write_atomically
from ..engine.errors import UserError
from ..engine.schedule import fitting_rate
from ..engine.scorer import StepSequence, pack_steps, score_steps, step_loss
from ..engine.tokenizer import Tokenizer
from ..rewards.calibration import auc, calibration
from ..rewards.hierarchical import Labels, StepScores, step_labels, step_sequence
from ..rollout.grammar import GRAMMARS
from ..rollout.trajectory import Writer, encode_spans
from .experts import Experts
from .policy import Policy, load_scorer, save_policy
from .rollouts import my_share, open_sandbox
from .run import Run, launch
from .training import Training, places


def hrm(run: Run) -> Path:
    """Trains the model, measures it, and returns its folder; ``hrm.folder`` is one that is trained already.

    Raises:
        UserError: ``hrm.steps`` is 0 and there is no folder.
    """
    folder, settings = run.folder / "hrm", run.config.hrm
    if settings.folder:
        return Path(settings.folder)
    if not settings.steps:
        raise UserError("hrm.steps is 0, expected some to train the reward model in, or hrm.folder")
    if not (folder / "report.json").exists():
        trained = (folder / "model").exists()
        scorer = load_scorer(run, folder / "model") if trained else _trained(run, folder / "model")
        report = judge(run, scorer, _judged(run))
        if run.is_main:
            write_atomically(folder / "report.json", json.dumps(report, indent=1))
        run.mesh.barrier()
    return folder / "model"


def _trained(run: Run, folder: Path) -> Policy:
    settings, mesh = run.config.hrm, run.mesh
    experts = Experts(run)
    first = Path(run.config.model.folder or run.folder / "sft" / "model")
    scorer = load_scorer(run, first, new_head=True)
    training = Training(run, scorer, "hrm", settings.steps, fitting_rate(settings.lr, settings.steps))
    for step in training.steps():
        drawn = places(step, run.config.sft.sequences_per_step, len(experts.all), run.config.run.seed)
        shown = experts.under_names([experts.all[place] for place in drawn], step)
        sequences = [expert_sequence(expert, scorer.tokenizer, settings.labels) for expert in shown]
        # Every rank draws all of them, so each knows the divisor.
        divisor = sum(sequence.num_labels for sequence in sequences)
        mine = my_share(run, sequences, len)
        batches = pack_steps(mine, run.config.optimizer.tokens_per_microbatch, mesh.device)
        update = training.update(step, batches, partial(step_loss, sequences=mine, divisor=divisor))
        record = {"loss": update.loss, "grad_norm": update.grad_norm, "lr": update.lr}
        training.metrics.log(step, {**record, "accuracy": update.stats["right"] / divisor})
    save_policy(run, scorer, folder)
    return scorer


def expert_sequence(expert: Expert, tokenizer: Tokenizer, kind: Labels) -> StepSequence:
    """An expert's trajectory with the labels of its steps; the teacher says what it did wrong on purpose."""
    prompt: tuple[Writer, str] = ("prompt", GRAMMARS[expert.grammar].prompt(expert.task, tokenizer))
    spans = encode_spans([prompt, *((cast(Writer, writer), text) for writer, text in expert.spans)], tokenizer)
    turns = [index for index, (writer, _) in enumerate(expert.spans) if writer == "model"]
    mistakes = [number for number, index in enumerate(turns) if index in expert.mistakes]
    right = expert.stratum != "failure"
    return step_sequence(spans, step_labels(expert_outcomes(expert), right=right, kind=kind, mistakes=mistakes))


def expert_outcomes(expert: Expert) -> list[bool | None]:
    """Of each step whether its code ran without an error, None where it ran nothing.

    Of a teacher's mistakes only the slips of the stratum self_corrected run; all other code that it shows does.
    """
    writers = [*(writer for writer, _ in expert.spans), "model"]
    return [
        None if writers[index + 1] == "model" else expert.stratum == "self_corrected" or index not in expert.mistakes
        for index, writer in enumerate(writers[:-1])
        if writer == "model"
    ]


def _judged(run: Run) -> list[Expert]:
    """Trajectories over the evaluation tables, as many of each stratum, made once for the run."""
    file, data, seed = run.folder / "hrm" / "judged.jsonl", run.config.data, run.config.run.seed
    if run.is_main and not file.exists():
        tables, _ = find_tables(data.tables or None)
        _, held_out = split_tables(tables, seed=seed)
        views = evaluation_views(held_out, data.num_eval_tasks // 2 + 1, seed=seed)
        modes = {mode: share for mode, share in data.mode_shares().items() if GRAMMARS[mode].code}  # steps to judge
        folder = file.parent / "tables"
        problems = make_problems(views, data.num_eval_tasks, seed=seed, name="hrm", folder=folder, modes=modes)
        with open_sandbox(run) as sandbox:
            experts, _ = build_trajectories(problems, sandbox, seed=seed, strata=dict.fromkeys(STRATA, 1.0))
        write_experts(file, experts)
    run.mesh.barrier()
    return list(read_experts(file))


def judge(run: Run, scorer: Policy, experts: Sequence[Expert]) -> dict[str, Any]:
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
    launch(_recipe, phases=("load", "update", "checkpoint"))
