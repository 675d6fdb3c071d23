"""A policy in training: its optimiser, its learning rate, its checkpoints and its metrics, for SFT and GRPO alike."""

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial

import numpy as np
import torch

from ..engine.batch import Batch
from ..engine.checkpoint import load_checkpoint
from ..engine.config import OptimizerConfig
from ..engine.manifest import list_checkpoints
from ..engine.metrics import Metrics, cost_line, progress
from ..engine.optim import AdamW
from ..engine.saver import Saver
from ..engine.schedule import Schedule
from ..engine.step import LossFunction, Update, optimise
from .capsule import Capture
from .pace import Pace, traced
from .policy import Policy
from .run import Run

LINE_EVERY = 10  # steps between two lines on the console
COSTS_EVERY = 100  # steps between two lines that say where time goes; the first comes after LINE_EVERY
BETAS = (0.9, 0.95)  # of AdamW
KEPT_CHECKPOINTS = 2


class Training:
    """Steps that resume where the newest checkpoint says.

    Args:
        run: configuration and ranks.
        policy: what is trained; its weights are replaced by the checkpoint's where there is one.
        phase: name of the stage; its checkpoints go to ``RUN/PHASE``, its metrics to ``RUN/PHASE.jsonl``.
        stop: number of steps.
        lr: learning rate by step.
    """

    def __init__(self, run: Run, policy: Policy, phase: str, stop: int, lr: Schedule) -> None:
        settings = run.config.optimizer
        self.run, self.policy, self.phase, self.stop, self.lr = run, policy, phase, stop, lr
        self.folder = run.folder / phase
        self.optimizer = new_optimizer(settings, policy, lr(0))
        self.start = 0
        checkpoints = self.folder / "checkpoints"
        if run.mesh.broadcast_object(bool(list_checkpoints(checkpoints))):
            state = load_checkpoint(checkpoints, model=policy.model, optimizer=self.optimizer, mesh=run.mesh)
            self.start = state["step"]
            run.say(f"{phase}: resumed after step {self.start}")
        self.capture, self.pace = Capture(run, policy.model, phase), Pace(run, policy.config)
        self._costs: list[Mapping[str, float]] = []  # records since the last line on costs
        self.saver = Saver(checkpoints, run.mesh, KEPT_CHECKPOINTS)
        self.metrics = Metrics(
            run.folder, run.mesh, phase=phase, start_step=self.start, total_steps=stop, console_every=LINE_EVERY
        )

    def steps(self) -> Iterator[int]:
        """The steps that are left, with a progress bar; saves in the background when due, and before it obeys a signal.

        A step within which the ranks agreed to stop was given up: the state as it stood before it is saved.

        Raises:
            UserError: a checkpoint could not be written.
            Stopped: a rank was asked to stop, and what is done is saved.
        """
        every, saved = self.run.config.run.checkpoint_every, self.start
        with self.metrics, self.run.stop_between_steps():
            for step in progress(range(self.start, self.stop), self.phase, rank=self.run.mesh.rank):
                self.capture.begin(step)
                self.pace.begin()
                with traced(self.run, self.phase, step):
                    yield step
                self.capture.end()
                done = step if self.run.stopping else step + 1
                self.saver.poll()
                stopping = self.run.agree_to_stop()
                if done > saved and (stopping or (done % every == 0 and done < self.stop)):
                    self.saver.save(self.policy.model, self.optimizer, {"step": done})
                    saved = done
                if stopping:
                    self.saver.wait()
                    raise self.run.stopped()
            self.saver.wait()

    def update(self, step: int, batches: Sequence[Batch], loss_fn: LossFunction) -> Update:
        """One optimisation step on this rank's micro-batches; where no rank has any, nothing moves.

        One that is skipped leaves its capsule.
        """
        settings = self.run.config.optimizer
        self.capture.before()
        with self.pace("update", batches):
            update = optimise(
                self.policy.model,
                self.optimizer,
                batches,
                loss_fn,
                mesh=self.run.mesh,
                lr=self.lr(step),
                max_grad_norm=settings.max_grad_norm,
                reduce_every_microbatch=settings.reduce_every_microbatch,
                keep=partial(self.capture.keep, batches),
            )
        self.capture.after(batches, update)
        return update

    def log(self, step: int, record: Mapping[str, float]) -> None:
        """Writes the record of a step with what it took, and now and then says where time went. Collective."""
        record = {**record, **self.pace.metrics()}
        self.metrics.log(step, record)
        self._costs.append(record)
        made = step + 1 - self.start
        if made == LINE_EVERY or made % COSTS_EVERY == 0 or step + 1 == self.stop:
            self.run.say(f"{self.phase}: {cost_line(self._costs)}")
            self._costs.clear()


def new_optimizer(settings: OptimizerConfig, policy: Policy, lr: float) -> AdamW:
    """The optimiser of a policy, as configured."""
    return AdamW(
        policy.model.shards,
        lr=lr,
        betas=BETAS,
        weight_decay=settings.weight_decay,
        moments_dtype=getattr(torch, settings.moments_dtype),
    )


def places(step: int, size: int, total: int, seed: int) -> list[int]:
    """Which of ``total`` items make step ``step``: epochs in random order, a function of the step alone.

    So a resumed run goes on where it stopped, and every rank draws the same.
    """
    return [_order(seed, place // total, total)[place % total] for place in range(step * size, (step + 1) * size)]


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, total: int) -> list[int]:
    return np.random.default_rng((seed, epoch)).permutation(total).tolist()
