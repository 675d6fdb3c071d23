"""A step of GRPO again, from its capsule: what came out of it is computed anew, and the first difference is named.

    python -m groupwise.recipes.replay RUN/capsules/grpo/step-000050.rank0.safetensors [MODEL]

A capsule of several ranks is replayed by as many: start it with torchrun. MODEL holds the weights from before the step:
a Hugging Face folder, or a checkpoint, with whose moments later updates of the step are replayed too. Left out, it is
the run's checkpoint of that step or, for step 0, the model that the run began with.

In this order: the weights by their hashes; prompts; what the weights say of each token; observations, for which the
code runs again in the sandbox; rewards and their parts; advantages; packed batches; old and reference
log-probabilities; losses and gradient norms. Each is computed from what the capsule holds of the one before, so what is
named first is where it began. On the same layout (ranks, device,
threads, versions, kernels) all must be equal to the last bit; on another one floating-point numbers may differ by 1e-3,
and by 0.05 where the model computes in bfloat16, absolutely or of their value. Status 0: nothing differs; 1: something
does; 2: a mistake of the user.
"""

import dataclasses
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..engine.checkpoint import load_checkpoint
from ..engine.config import SECTIONS, Config
from ..engine.errors import UserError
from ..engine.manifest import list_checkpoints
from ..engine.optim import AdamW
from ..engine.reference import Reference
from ..engine.schedule import mixing
from ..engine.settings import build, settings_of
from ..engine.shard import ShardedModel
from ..engine.step import optimise
from ..rollout.agent import run_agent
from ..rollout.draw import SamplingParams
from ..rollout.grammar import GRAMMARS
from ..rollout.recorded import Recorded
from ..rollout.trajectory import Group, Trajectory
from .capsule import Capsule, hashes, layout, tensors_of, token_logprobs
from .grpo import objective, set_advantages, to_examples, to_minibatches
from .policy import Policy, compute_dtype, load_policy, load_reference
from .rewarding import Rewarding
from .rollouts import agent_limits, open_sandbox
from .run import Run, launch
from .training import new_optimizer

DIFFERS = 1  # status
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # absolute and relative, on another layout


class Difference(NamedTuple):
    """Something that came out otherwise."""

    where: str
    then: object
    now: object

    def __str__(self) -> str:
        return f"{self.where}: {_shown(self.then)} in the capsule, {_shown(self.now)} again"


Differences = Iterator[Difference]


class Replay:
    """The stages of a step, each of which gives what differs, in order. Every rank calls them together.

    Args:
        run: with the capsule's configuration.
        capsule: of this rank.
        model: folder of the weights, None for the run's own.

    Raises:
        UserError: the weights are not there or are of another model.
    """

    def __init__(self, run: Run, capsule: Capsule, model: Path | None) -> None:
        self._run, self._capsule, self._step = run, capsule, int(capsule.facts["step"])
        self._first = Path(run.config.model.folder or run.folder / "sft" / "model")
        self._policy, self._optimizer, has_moments = self._load(model)
        self._updates = list(enumerate(capsule.facts["updates"]))[capsule.facts["first_update"] :]
        self.updates_left = 0 if has_moments else len(self._updates) - 1
        is_same = layout(run.mesh) == capsule.facts["layout"]
        self.tolerance = 0.0 if is_same else TOLERANCES[compute_dtype(run)]
        self.stages: dict[str, Callable[[], Differences]] = {
            "weights": self.weights,
            "prompts": self.prompts,
            "tokens": self.tokens,
            "observations": self.observations,
            "rewards": self.rewards,
            "advantages": self.advantages,
            "packed batches": self.batches,
            "log-probabilities": self.logprobs,
            "losses and gradient norms": self.updates,
        }

    def _load(self, model: Path | None) -> tuple[Policy, AdamW, bool]:
        """The policy before the step, its optimiser, and whether that has its moments."""
        if model is None:
            model = _weights_of(self._run.folder / "grpo" / "checkpoints", self._step, self._first)
        if not model.is_dir():
            raise UserError(f"there is no model {model}; give a Hugging Face folder or a checkpoint")
        is_checkpoint = bool(list_checkpoints(model))
        policy = load_policy(self._run, self._first if is_checkpoint else model)
        optimizer = new_optimizer(self._run.config.optimizer, policy, 0.0)
        if is_checkpoint:
            load_checkpoint(model, model=policy.model, optimizer=optimizer, mesh=self._run.mesh)
        return policy, optimizer, is_checkpoint

    def first_difference(self) -> str:
        """Runs the stages until one differs on any rank, and says where; empty: nothing differs."""
        for name, stage in self.stages.items():
            found = self._run.mesh.all_gather_object(list(stage()))  # to its end: there are collectives in it
            for rank, differences in enumerate(found):
                if differences:
                    return f"{name} differ, first on rank {rank}: {differences[0]}"
            self._run.say(f"{name}: as they were")
        return ""

    def weights(self) -> Differences:
        """Master weights before the step, by the hash of this rank's part of each."""
        then, now = self._capsule.facts["weights"], hashes(self._policy.model)
        for name in [*now, *(name for name in then if name not in now)]:
            yield from self._compare(f"hash of {name}", then.get(name), now.get(name))

    def prompts(self) -> Differences:
        """The ids of the prompts, rendered anew."""
        tokenizer = self._policy.tokenizer
        for trajectory in _members(self._capsule.rounds()):
            now = tokenizer.encode(GRAMMARS[trajectory.task.mode].prompt(trajectory.task, tokenizer))
            yield from self._compare_lists(f"{trajectory.name}, token id", trajectory.spans[0].token_ids, now)

    def tokens(self) -> Differences:
        """The log-probability of each token by the weights before the step: an altered token has another one."""
        rounds, then = self._capsule.rounds(), self._capsule.tensors["trainer_logprob"]
        now, start = token_logprobs(self._run, self._policy.model, rounds), 0
        for trajectory in _members(rounds):
            ids = trajectory.token_ids
            here = slice(start, start + len(ids))
            start += len(ids)
            place = _first_place(then[here], now[here], self.tolerance)
            if place is not None:
                where = f"{trajectory.name}, log-probability of token {place} (id {ids[place]})"
                yield Difference(where, then[here][place].item(), now[here][place].item())

    def observations(self) -> Differences:
        """What the code printed, what the model read of it, and how the trajectories ended."""
        limits = dataclasses.replace(agent_limits(self._run.config.rollout), max_wall_s=None)
        with open_sandbox(self._run) as sandbox:
            for group in chain(*self._capsule.rounds()):
                (again,) = run_agent(
                    Recorded(group, self._policy.tokenizer),
                    sandbox,
                    [group.task],
                    tokenizer=self._policy.tokenizer,
                    num_generations=len(group.trajectories),
                    params=SamplingParams(),
                    limits=limits,
                    seed=0,
                )
                for then, now in zip(group.trajectories, again.trajectories, strict=True):
                    yield from self._compare_trajectories(then, now)

    def _compare_trajectories(self, then: Trajectory, now: Trajectory) -> Differences:
        for number, (one, other) in enumerate(zip(then.executions, now.executions, strict=False)):
            for name in ("verdict", "output", "table"):
                where = f"{then.name}, {name} of execution {number}"
                yield from self._compare(where, getattr(one, name), getattr(other, name))
        for number, (span, other_span) in enumerate(zip(then.spans, now.spans, strict=False)):
            where = f"{then.name}, span {number}"
            yield from self._compare(f"{where}, writer", span.writer, other_span.writer)
            yield from self._compare_lists(f"{where} ({span.writer}), token id", span.token_ids, other_span.token_ids)
        if then.status != "time_limit":  # that end was the clock's
            yield from self._compare(f"{then.name}, executions", len(then.executions), len(now.executions))
            yield from self._compare(f"{then.name}, spans", len(then.spans), len(now.spans))
            for name in ("status", "answer"):
                yield from self._compare(f"{then.name}, {name}", getattr(then, name), getattr(now, name))

    def rewards(self) -> Differences:
        """Rewards and their parts, of the trajectories in the capsule."""
        then, now = self._capsule.rounds(), self._capsule.rounds()
        tasks = [group.task for group in chain(*then)]
        rewarding = Rewarding(self._run, self._policy.tokenizer, tasks)
        for groups in now:
            rewarding.score(groups, self._step)
        for one, other in zip(_members(then), _members(now), strict=True):
            for name in dict.fromkeys([*other.rewards, *one.rewards]):
                yield from self._compare(f"{one.name}, rewards/{name}", one.rewards.get(name), other.rewards.get(name))
            yield from self._compare(f"{one.name}, scored", one.scored, other.scored)
            yield from self._compare(f"{one.name}, reward", one.reward, other.reward)

    def advantages(self) -> Differences:
        """Advantages, by the rewards in the capsule."""
        now = self._capsule.rounds()
        for group in chain(*now):
            for trajectory in group.trajectories:
                trajectory.advantage = 0.0
            set_advantages(group, self._run)
        for one, other in zip(_members(self._capsule.rounds()), _members(now), strict=True):
            yield from self._compare(f"{one.name}, advantage", one.advantage, other.advantage)

    def batches(self) -> Differences:
        """What is learnt from: ids, positions, bounds, weights, advantages, the sampler's log-probabilities."""
        groups = list(chain(*self._capsule.rounds()))
        then, now = self._capsule.minibatches("cpu"), to_minibatches(self._run, groups, self._capsule.imitated())
        yield from self._compare("mini-batches", len(then), len(now))
        for part, (ours, theirs) in enumerate(zip(then, now, strict=False)):
            yield from self._compare(f"micro-batches of mini-batch {part}", len(ours), len(theirs))
            for number, (one, other) in enumerate(zip(ours, theirs, strict=False)):
                again = tensors_of(other)
                for name, tensor in tensors_of(one).items():
                    if name not in ("old_logprob", "ref_logprob"):
                        yield from self._compare_tensors(part, number, name, tensor, again.get(name))

    def logprobs(self) -> Differences:
        """Of the policy before the step, and of the reference, on the batches in the capsule."""
        temperature = self._run.config.rollout.temperature
        models: dict[str, ShardedModel | Reference] = {}
        if self._capsule.facts["first_update"] == 0:  # else they are of weights that the capsule does not know
            models["old_logprob"] = self._policy.model
        if self._run.config.grpo.beta:
            models["ref_logprob"] = load_reference(self._run, self._first)
        for part, batches in enumerate(self._capsule.minibatches(self._run.mesh.device)):
            for number, batch in enumerate(batches):
                for name, model in models.items():
                    then = getattr(batch, name)
                    if then is not None:
                        now = model.logprobs(batch, temperature)
                        yield from self._compare_tensors(part, number, name, then, now)

    def updates(self) -> Differences:
        """Loss, gradient norm and statistics of the first update, and of the others where there are moments."""
        settings, mesh = self._run.config.optimizer, self._run.mesh
        minibatches = self._capsule.minibatches(mesh.device)
        gamma = mixing(self._run.config.grpo)(self._step)
        loss_fn = partial(objective(self._run.config.grpo, self._run.config.rollout.temperature), gamma=gamma)
        for number, then in self._updates[: len(self._updates) - self.updates_left]:
            update = optimise(
                self._policy.model,
                self._optimizer,
                minibatches[then["minibatch"]],
                loss_fn,
                mesh=mesh,
                lr=then["lr"],
                max_grad_norm=settings.max_grad_norm,
                reduce_every_microbatch=settings.reduce_every_microbatch,
            )
            now = dataclasses.asdict(update)
            for name in ("loss", "grad_norm", "skipped"):
                yield from self._compare(f"update {number}, {name}", then[name], now[name])
            for name in dict.fromkeys([*then["stats"], *now["stats"]]):
                where = f"update {number}, statistic {name}"
                yield from self._compare(where, then["stats"].get(name), now["stats"].get(name))

    # Comparisons -----------------------------------------------------------------------------------------------

    def _compare(self, where: str, then: object, now: object) -> Differences:
        if isinstance(then, float) and isinstance(now, float):
            pair = torch.tensor([then, now], dtype=torch.float64)
            same = _first_place(pair[:1], pair[1:], self.tolerance) is None
        else:
            same = then == now
        if not same:
            yield Difference(where, then, now)

    def _compare_lists(self, where: str, then: Sequence[int], now: Sequence[int]) -> Differences:
        for place, (one, other) in enumerate(zip(then, now, strict=False)):
            yield from self._compare(f"{where} {place}", one, other)
        yield from self._compare(f"{where}s", len(then), len(now))

    def _compare_tensors(
        self, part: int, number: int, name: str, then: Tensor | None, now: Tensor | None
    ) -> Differences:
        where = f"micro-batch {number} of mini-batch {part}, {name}"
        if then is None or now is None or then.shape != now.shape:
            found = [None if tensor is None else list(tensor.shape) for tensor in (then, now)]
            yield Difference(f"{where}, shape", *found)
            return
        then, now = then.cpu(), now.cpu()
        place = _first_place(then, now, self.tolerance)
        if place is not None:
            where += f"[{place}]{self._whose(part, number, name, place)}"
            yield Difference(where, then[place].item(), now[place].item())

    def _whose(self, part: int, number: int, name: str, place: int) -> str:
        """Which example the place of a batch belongs to, in words."""
        batch = self._capsule.minibatches("cpu")[part][number]
        if name in ("cu_seqlens", "prefix"):
            return ""
        sequence, position = int(batch.sequence_ids[place]), int(batch.positions[place])
        groups = list(chain(*self._capsule.rounds()))
        examples, names = to_examples(self._run.config, groups, self._capsule.imitated())[part]
        bearing = [name for example, name in zip(examples, names, strict=True) if example.loss_tokens]
        whose = bearing[sequence] if 0 <= sequence < len(bearing) else "a shared prompt or padding"
        return f" ({whose}, position {position})"


def replay(run: Run) -> None:
    """Runs the stages until one differs, and says what; then ends the process with status 1.

    Raises:
        UserError: the launch has another number of ranks than the capsule, or the ranks' capsules are of several steps.
    """
    path, model = _arguments(sys.argv[1:])
    capsule = Capsule(path)
    facts, mesh = capsule.facts, run.mesh
    if facts["layout"]["world_size"] != mesh.world_size:
        ranks = facts["layout"]["world_size"]
        raise UserError(
            f"{path} is of {ranks} ranks and this launch has {mesh.world_size}; "
            f"start it with torchrun --standalone --nproc-per-node {ranks}"
        )
    if len(set(mesh.all_gather_object(json.dumps([facts["step"], facts["config"]])))) > 1:
        raise UserError(f"the capsules beside {path} are of several runs; keep those of one launch together")
    again = Replay(run, capsule, model)
    run.say(f"step {facts['step']} of {facts['phase']} from {path}")
    if again.tolerance:
        run.say(f"another layout than the capsule's: floating-point numbers may differ by {again.tolerance:g}")
    if (left := again.updates_left) > 0:
        run.say(f"the last {left} updates are left out: they need a checkpoint from before the step, for its moments")
    difference = again.first_difference()
    run.say(difference or "nothing differs")
    if difference:
        mesh.close()
        sys.exit(DIFFERS)


def _weights_of(checkpoints: Path, step: int, first: Path) -> Path:
    """Where a run has the weights from before a step."""
    found = [path for path in list_checkpoints(checkpoints) if path.name.endswith(f"-step-{step}")]
    if not found and step:
        raise UserError(f"there is no checkpoint of step {step} in {checkpoints}; name a model folder or a checkpoint")
    return found[0] if found else first


def _first_place(then: Tensor, now: Tensor, tolerance: float) -> int | None:
    """The first index at which two tensors [n] differ; NaN is like NaN."""
    if then.is_floating_point():
        same = torch.isclose(now.to(then.dtype), then, rtol=tolerance, atol=tolerance, equal_nan=True)
    else:
        same = then == now
    return None if bool(same.all()) else int((~same).nonzero()[0])


def _members(rounds: Sequence[Sequence[Group]]) -> list[Trajectory]:
    return [trajectory for group in chain(*rounds) for trajectory in group.trajectories]


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:100]} … {text[-100:]}"


def _arguments(argv: Sequence[str]) -> tuple[Path, Path | None]:
    """This rank's capsule, and the folder of the weights."""
    if not 1 <= len(argv) <= 2:
        raise UserError(f"{len(argv)} arguments, expected CAPSULE [MODEL]; see --help")
    rank, path = os.environ.get("RANK", "0"), Path(argv[0])
    mine = path.with_name(re.sub(r"\.rank\d+\.", f".rank{rank}.", path.name)) if "WORLD_SIZE" in os.environ else path
    return mine, Path(argv[1]) if len(argv) == 2 else None


def configuration(argv: Sequence[str]) -> Config:
    """The configuration of a command line's capsule, with the run folder that the capsule lies in.

    Raises:
        UserError: there is no whole capsule, it is of no GRPO step, or this version has other settings.
    """
    path, _ = _arguments(argv)
    capsule = Capsule(path)
    if capsule.facts["phase"] != "grpo":
        raise UserError(f"{path} is of a step of {capsule.facts['phase']}, expected one of grpo")
    sections = {}
    try:
        for name, cls in SECTIONS.items():
            fixed = {field.name for field in dataclasses.fields(cls)} - {field.name for field in settings_of(cls)}
            stored = capsule.facts["config"][name].items()
            sections[name] = build(name, cls, {key: value for key, value in stored if key not in fixed})
    except (UserError, KeyError) as error:
        raise UserError(
            f"{path} has a configuration of another version: {error}; replay it with that version"
        ) from error
    folder = path.absolute().parents[2]
    sections["run"] = dataclasses.replace(sections["run"], name=folder.name, folder=str(folder.parent))
    return Config(**sections)


if __name__ == "__main__":
    launch(replay, claim=False, configure=configuration)
