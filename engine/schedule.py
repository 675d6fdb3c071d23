"""Step -> value, pure: the learning rate, the reward curriculum's lambda and the SFT/RL mixing coefficient gamma."""

import math
from dataclasses import dataclass

from .config import GRPOConfig
from .errors import UserError

KINDS = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class Schedule:
    """A value that rises to ``start`` during a warm-up, then goes to ``end`` and stays there.

    Warm-up: ``start * (step + 1) / (warmup + 1)`` for steps before ``warmup``, so the first step already moves and
    step ``warmup`` has ``start`` exactly. Then, with p the share done of the ``steps - warmup`` remaining steps:
    constant keeps ``start`` (``end`` does not matter), linear is ``start + (end - start) * p``, and cosine is
    ``end + (start - end) * (1 + cos(pi * p)) / 2``.

    Args:
        kind: "constant", "linear" or "cosine".
        start: value after the warm-up.
        end: value from step ``steps`` on.
        steps: number of steps in all, the warm-up included.
        warmup: number of steps of the warm-up.

    Raises:
        UserError: the kind is unknown, a value is not finite, or the steps do not add up.
    """

    kind: str
    start: float
    end: float
    steps: int
    warmup: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"schedule {self.kind!r} is unknown; use one of {', '.join(KINDS)}")
        if not (math.isfinite(self.start) and math.isfinite(self.end)):
            raise UserError(f"schedule goes from {self.start} to {self.end}; both values must be finite")
        if self.warmup < 0 or self.steps < 1:
            raise UserError(
                f"schedule has {self.steps} steps with {self.warmup} of warm-up; "
                "give at least 1 step and no negative warm-up"
            )
        if self.warmup > self.steps:
            raise UserError(
                f"schedule's warm-up of {self.warmup} steps is longer than its {self.steps} steps; "
                "shorten the warm-up or run longer"
            )

    def __call__(self, step: int) -> float:
        """The value at ``step``, counted from 0; past the last step it stays at the end."""
        if step < 0:
            raise ValueError(f"step {step} is negative; steps are counted from 0")
        if step < self.warmup:
            return self.start * (step + 1) / (self.warmup + 1)
        if self.kind == "constant":
            return self.start
        if step >= self.steps:
            return self.end
        progress = (step - self.warmup) / (self.steps - self.warmup)
        if self.kind == "linear":
            return self.start + (self.end - self.start) * progress
        return self.end + (self.start - self.end) * (1.0 + math.cos(math.pi * progress)) / 2.0


def mixing_schedule(
    *, mu_peak: float, mu_valley: float, mu_decay_steps: int, total_steps: int, mu_warmup_steps: int = 0
) -> Schedule:
    """gamma of ``gamma * SFT + (1 - gamma) * RL``: up to ``mu_peak``, then by a cosine down to ``mu_valley``.

    Source: DataMind, arXiv 2509.25084, dynamic mixing of the two losses.

    Raises:
        UserError: a coefficient is outside [0, 1], the peak is below the valley, or the steps are more than the run's.
    """
    if not 0.0 <= mu_valley <= mu_peak <= 1.0:
        raise UserError(f"mu_peak {mu_peak} and mu_valley {mu_valley} must keep 0 <= mu_valley <= mu_peak <= 1")
    if mu_warmup_steps < 0 or mu_decay_steps < 0:
        raise UserError(f"mu_warmup_steps {mu_warmup_steps} and mu_decay_steps {mu_decay_steps} must not be negative")
    steps = mu_warmup_steps + mu_decay_steps
    if steps > total_steps:
        raise UserError(
            f"mu_warmup_steps {mu_warmup_steps} + mu_decay_steps {mu_decay_steps} = {steps} is more than the run's "
            f"{total_steps} steps, so mu_valley is never reached; shorten them or run longer"
        )
    return Schedule("cosine", start=mu_peak, end=mu_valley, steps=max(steps, 1), warmup=mu_warmup_steps)


def mixing(settings: GRPOConfig) -> Schedule:
    """The weight of the experts' likelihood by step, as configured."""
    return mixing_schedule(
        mu_peak=settings.mu_peak,
        mu_valley=settings.mu_valley,
        mu_decay_steps=settings.mu_decay_steps,
        total_steps=settings.steps,
    )


def policy_rate(settings: GRPOConfig) -> Schedule:
    """Learning rate of GRPO: a linear warm-up, then a cosine down to a share of the peak.

    Raises:
        UserError: the warm-up is longer than the run.
    """
    if settings.warmup_steps > settings.steps:
        raise UserError(
            f"grpo.warmup_steps is {settings.warmup_steps}, more than the run's {settings.steps} steps; shorten it or "
            "raise grpo.steps"
        )
    return Schedule("cosine", settings.lr, settings.lr * settings.min_lr_ratio, settings.steps, settings.warmup_steps)


def fitting_rate(peak: float, steps: int) -> Schedule:
    """Learning rate of supervised training: up to ``peak`` in a tenth of the steps, then by a cosine down to a tenth.

    Source: DataMind, arXiv 2509.25084, warm-up ratio 0.1 and cosine.
    """
    return Schedule("cosine", peak, peak / 10, steps, warmup=steps // 10)
