"""Named diagnoses of a GRPO run: what goes wrong, by which figures, and which settings mend it.

    doctor = Doctor(folder / "doctor.jsonl", mesh, read_records(metrics.path), start_step=first)
    for step in range(first, steps):
        ...
        metrics.log(step, record | doctor.examine(step, record))

``diagnose`` is a pure function of the records that ``recipes.grpo`` logs. A value that is absent, null or not finite
says nothing, so a diagnosis whose figures a run does not have is never made.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median, variance

from .metrics import Ranked, drop_from, say
from .step import MAX_BAD_STEPS

Record = Mapping[str, float | None]

PERSIST = 3  # steps in a row: one batch of prompts may be so by chance, three hardly
WINDOW = 20  # steps of a trend: two halves of ten, long enough to average out the luck of a batch
HALF_LEAST = 5  # values that a half of the window must have for its mean
SURENESS = 3.0  # standard errors by which two halves must differ: 1 in 250 by chance, and a diagnosis takes two
QUIET = 10  # steps without a finding after which it is news again: one that flickers is said once

TRUNCATED = 0.95  # share of cut trajectories; the few that end make no contrast
ENTROPY_SHARE = 0.2  # of the entropy at the start: sampled groups then are nearly copies of each other
ENTROPY_FLOOR = 0.01  # nats a token; a trajectory of 100 tokens then is one and the same in a third of the samples
SPIKE = 5.0  # times the median of the window: outside of what learning adds from step to step
KL_LEAST = 0.1  # nats a token; less is no spike, whatever it was before
RATIO_MAX = 10.0  # of a token; the clips begin at 1.28
CLIPPED = 0.2  # share of clipped tokens; a healthy step clips a few in a hundred
DIFFERENCE_MAX = 1.0  # nats: a token's probability is off by the factor e
DIFFERENCE_MEAN = 0.05  # nats a token; bfloat16 gives about a hundredth
ESS_LEAST = 0.9  # share of the tokens that the importance weights leave
FORM_FALL = 0.1  # of a score in [0, 1]: half a check of rewards/tag
SCORE_RISE = 0.02  # of a score in [0, 1], or a reward
LENGTH_RISE = 1.2  # times in ten steps: doubled in forty
UNJUDGED = 0.1  # share of samples without a verdict; groups of 8 then mostly miss one


@dataclass(frozen=True)
class Finding:
    """A diagnosis that was made.

    Args:
        name: stable, in snake case.
        evidence: one sentence with the figures.
        remedy: one sentence that names settings.
    """

    name: str
    evidence: str
    remedy: str


@dataclass(frozen=True)
class Diagnosis:
    """What can be found: ``evidence`` gives the sentence, or None where the records do not show it."""

    name: str
    evidence: Callable[[Sequence[Record]], str | None]
    remedy: str


def diagnose(records: Sequence[Record]) -> list[Finding]:
    """What is wrong at the last of the records.

    Args:
        records: of a run's steps in order: the first PERSIST, which show how it began, and the last WINDOW at least.
    """
    found = [(diagnosis, diagnosis.evidence(records)) for diagnosis in DIAGNOSES]
    return [Finding(diagnosis.name, evidence, diagnosis.remedy) for diagnosis, evidence in found if evidence]


class Doctor:
    """Looks at every step of a run; rank 0 says and writes what is new, once.

    Args:
        file: JSON lines with step, name, evidence and remedy of each finding when it appears; lines of a former run
            from ``start_step`` on are dropped.
        mesh: the other ranks' calls do nothing.
        records: of the steps before ``start_step``.
        start_step: first step of this run.
    """

    def __init__(self, file: Path, mesh: Ranked, records: Sequence[Record] = (), start_step: int = 0) -> None:
        self._file, self._active, self._records = file, mesh.rank == 0, list(records)
        if self._active:
            file.parent.mkdir(parents=True, exist_ok=True)
            drop_from(file, start_step)

    def examine(self, step: int, record: Record) -> dict[str, float]:
        """Says what appears with this record, and returns ``doctor/NAME`` of every diagnosis: 1.0 if made, else 0.0."""
        if not self._active:
            return {}
        findings = {finding.name: finding for finding in diagnose([*self._records, record])}
        recent = self._records[-QUIET:]
        for finding in findings.values():
            if not any(_value(former, f"doctor/{finding.name}") for former in recent):
                say(f"doctor, step {step + 1}: {finding.name}: {finding.evidence} {finding.remedy}")
                with open(self._file, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": step, **asdict(finding)}) + "\n")
        metrics = {f"doctor/{diagnosis.name}": float(diagnosis.name in findings) for diagnosis in DIAGNOSES}
        self._records.append({**record, **metrics})
        del self._records[PERSIST:-WINDOW]  # nothing looks at those
        return metrics


def _zero_reward_std(records: Sequence[Record]) -> str | None:
    if not _lasts(records, "frac_reward_zero_std", lambda share: share >= 1.0):
        return None
    answers = [value for value in _last(records, "rewards/answer") if value is not None]
    right = f" and {fmean(answers):.0%} of the answers are right" if answers else ""
    return f"In {PERSIST} steps every group had equal rewards{right}, so nothing was compared."


def _all_truncated(records: Sequence[Record]) -> str | None:
    if not _lasts(records, "completions/clipped_ratio", lambda share: share >= TRUNCATED):
        return None
    share, tokens = _mean_last(records, "completions/clipped_ratio"), _mean_last(records, "completions/mean_length")
    return f"In {PERSIST} steps {share:.0%} of the trajectories were cut by a limit, at {tokens:.0f} tokens on average."


def _no_policy_tokens(records: Sequence[Record]) -> str | None:
    if any(_last(records, "tokens/policy")) or not _lasts(records, "frac_reward_zero_std", lambda share: share < 1.0):
        return None
    varied = 1 - _mean_last(records, "frac_reward_zero_std")
    return (
        f"In {PERSIST} steps no token bore policy-gradient loss, though {varied:.0%} of the groups had unequal rewards."
    )


def _format_collapse(records: Sequence[Record]) -> str | None:
    for form in ("rewards/tag", "rewards/format"):
        for score in ("rewards/hrm", "rewards/answer"):
            forms, scores = _halves(records, form), _halves(records, score)
            if forms and scores and forms.falls_by(FORM_FALL) and scores.rises_by(SCORE_RISE):
                return f"Over {WINDOW} steps {form} fell {forms} while {score} rose {scores}."
    return None


def _entropy_collapse(records: Sequence[Record]) -> str | None:
    first = [value for record in records[:PERSIST] if (value := _value(record, "entropy")) is not None]
    start = fmean(first) if first else 0.0
    bound = max(ENTROPY_SHARE * start, ENTROPY_FLOOR)
    if not _lasts(records, "entropy", lambda nats: nats < bound):
        return None
    now = _mean_last(records, "entropy")
    return f"Entropy is {now:.4f} nats a token, below {bound:.4f}; it was {start:.4f} at the start."


def _kl_spike(records: Sequence[Record]) -> str | None:
    kl = _value(records[-1], "kl") if records else None
    before = [value for record in records[-WINDOW:-1] if (value := _value(record, "kl")) is not None]
    if kl is None or len(before) < HALF_LEAST or kl <= max(KL_LEAST, SPIKE * median(before)):
        return None
    usual = f"the median of {len(before)} steps before is {median(before):.4f}"
    return f"KL to the reference is {kl:.3f} nats a token, and {usual}."


def _ratio_spike(records: Sequence[Record]) -> str | None:
    last = records[-1] if records else {}
    ratio = _value(last, "ratio/max") or 0.0
    clipped = sum(_value(last, name) or 0.0 for name in ("clip_ratio/low_mean", "clip_ratio/high_mean"))
    if ratio <= RATIO_MAX and clipped <= CLIPPED:
        return None
    return f"The largest ratio of new to old probability is {ratio:.3g}, and {clipped:.1%} of the tokens are clipped."


def _sampler_mismatch(records: Sequence[Record]) -> str | None:
    checks: tuple[tuple[str, Callable[[float], bool]], ...] = (
        ("sampling/logp_difference_max", lambda nats: nats > DIFFERENCE_MAX),
        ("sampling/logp_difference_mean", lambda nats: nats > DIFFERENCE_MEAN),
        ("sampling/ess", lambda share: share < ESS_LEAST),
    )
    seen = [f"{name} is {_mean_last(records, name):.3g}" for name, is_bad in checks if _lasts(records, name, is_bad)]
    if not seen:
        return None
    return f"Trainer and sampler disagree: over {PERSIST} steps {' and '.join(seen)}."


def _length_hacking(records: Sequence[Record]) -> str | None:
    reward, tokens, answer = (
        _halves(records, name) for name in ("reward", "completions/mean_length", "rewards/answer")
    )
    if not (reward and tokens and answer) or answer.rises_by(SCORE_RISE):
        return None
    if not reward.rises_by(SCORE_RISE) or not tokens.rises_by((LENGTH_RISE - 1) * tokens.before):
        return None
    return f"Over {WINDOW} steps reward rose {reward} and length {tokens} tokens, but rewards/answer did not: {answer}."


def _judge_failing(records: Sequence[Record]) -> str | None:
    if not _lasts(records, "rewards/unjudged", lambda share: share > UNJUDGED):
        return None
    return (
        f"In {PERSIST} steps the judge gave no verdict on {_mean_last(records, 'rewards/unjudged'):.0%} of the samples."
    )


def _nonfinite_gradient(records: Sequence[Record]) -> str | None:
    if not records or not _value(records[-1], "skipped_steps"):
        return None
    skipped = sum(1 for record in records[-WINDOW:] if _value(record, "skipped_steps"))
    return f"Loss or gradient is not finite, and {skipped} of the last {len(records[-WINDOW:])} steps were skipped."


DIAGNOSES = (
    Diagnosis(
        "zero_reward_std",
        _zero_reward_std,
        "Raise rollout.temperature or grpo.num_generations, or change how able the model starts by sft.steps.",
    ),
    Diagnosis(
        "all_truncated",
        _all_truncated,
        "Raise rollout.max_tokens_per_turn, rollout.max_trajectory_tokens or rollout.max_turns, or sft.steps so that "
        "the model learns to end.",
    ),
    Diagnosis(
        "no_policy_tokens",
        _no_policy_tokens,
        "Set grpo.mask_void=false if most trajectories are void; else the answers within a group are all right or all "
        "wrong: raise rollout.temperature or grpo.num_generations.",
    ),
    Diagnosis(
        "format_collapse",
        _format_collapse,
        "Raise reward.lambda_min so that structure keeps its weight, or grpo.mu_valley so that experts still show it.",
    ),
    Diagnosis(
        "entropy_collapse",
        _entropy_collapse,
        "Raise grpo.entropy_coef, rollout.temperature or grpo.beta, or lower grpo.lr.",
    ),
    Diagnosis(
        "kl_spike", _kl_spike, "Lower grpo.lr or optimizer.max_grad_norm, or raise grpo.beta; go back to a checkpoint."
    ),
    Diagnosis(
        "ratio_spike",
        _ratio_spike,
        "Lower grpo.lr or optimizer.max_grad_norm, or bound it by grpo.dual_clip and a smaller grpo.delta_max.",
    ),
    Diagnosis(
        "sampler_mismatch",
        _sampler_mismatch,
        "Set grpo.importance_correction=truncated, or optimizer.compute_dtype=float32 to see whether rounding is why; "
        "rollout.exact leaves no difference.",
    ),
    Diagnosis(
        "length_hacking",
        _length_hacking,
        "Raise reward.length_coef or lower reward.length_target, or use grpo.loss_type=dapo, which favours no length.",
    ),
    Diagnosis(
        "judge_failing",
        _judge_failing,
        "Mend the endpoint of reward.judge, whose error its warning gives, or name another one.",
    ),
    Diagnosis(
        "nonfinite_gradient",
        _nonfinite_gradient,
        "Lower grpo.lr or optimizer.max_grad_norm, or set optimizer.compute_dtype=float32; the run stops after "
        f"{MAX_BAD_STEPS} of them in a row.",
    ),
)


@dataclass(frozen=True)
class _Halves:
    """Means of the two halves of a window, and the standard error of their difference."""

    before: float
    after: float
    error: float

    def rises_by(self, least: float) -> bool:
        return self.after - self.before > max(least, SURENESS * self.error)

    def falls_by(self, least: float) -> bool:
        return self.before - self.after > max(least, SURENESS * self.error)

    def __str__(self) -> str:
        return f"from {self.before:.3g} to {self.after:.3g}"


def _halves(records: Sequence[Record], name: str) -> _Halves | None:
    """None where there is no whole window, or too few values in it."""
    window = [_value(record, name) for record in records[-WINDOW:]]
    halves = [[x for x in half if x is not None] for half in (window[: WINDOW // 2], window[WINDOW // 2 :])]
    if len(window) < WINDOW or min(map(len, halves)) < HALF_LEAST:
        return None
    before, after = halves
    error = math.sqrt(variance(before) / len(before) + variance(after) / len(after))
    return _Halves(fmean(before), fmean(after), error)


def _last(records: Sequence[Record], name: str) -> list[float | None]:
    return [_value(record, name) for record in records[-PERSIST:]]


def _lasts(records: Sequence[Record], name: str, is_bad: Callable[[float], bool]) -> bool:
    values = _last(records, name)
    return len(values) == PERSIST and all(value is not None and is_bad(value) for value in values)


def _mean_last(records: Sequence[Record], name: str) -> float:
    """NaN where no step has it."""
    values = [value for value in _last(records, name) if value is not None]
    return fmean(values) if values else math.nan


def _value(record: Record, name: str) -> float | None:
    value = record.get(name)
    return value if value is not None and math.isfinite(value) else None
