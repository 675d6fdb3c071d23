"""Where a policy meets its environment: one sampler and one sandbox that stages share."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Self, TypeVar, cast

from ..engine.config import RolloutConfig
from ..engine.metrics import free_memory
from ..engine.model import Model
from ..engine.settings import kv_bytes
from ..rollout.agent import AgentLimits, run_agent
from ..rollout.record import Recorder, write_records
from ..rollout.sampler import Sampler, SamplingParams
from ..rollout.sandbox import Installer, Limits, Sandbox
from ..rollout.spread import spread
from ..rollout.task import Task
from ..rollout.trajectory import Group
from .policy import Policy
from .run import Run

Item = TypeVar("Item")


class Rollouts:
    """Samples groups of trajectories from a policy whose weights may change between calls.

    Args:
        run: configuration and ranks.
        policy: what is sampled from; its weights are whole, and the sampler has its cache, only while it samples.
    """

    def __init__(self, run: Run, policy: Policy) -> None:
        settings, memory = run.config.rollout, free_memory(run.mesh.device, run.mesh.local_world_size)
        self._run, self._policy, self._mesh = run, policy, run.mesh
        self._folder = run.folder / "trajectories"
        self._limits = agent_limits(settings)
        self._waited_s = 0.0  # since the last metrics
        self.sampler = Sampler(
            cast(Model, policy.model.module),
            policy.tokenizer,
            kv_memory=kv_bytes(settings.kv_memory, memory) / 2**30,
            concurrency=settings.concurrency,
            exact=settings.exact,
        )
        self.sandbox = open_sandbox(run)

    def sample(
        self,
        tasks: Sequence[Task],
        num_generations: int,
        *,
        temperature: float,
        seed: int,
        record: str,
        top_p: float = 1.0,
        openings: Sequence[Sequence[str]] | None = None,
    ) -> list[Group]:
        """A group of ``num_generations`` trajectories for each task of this rank. Every rank calls it together.

        What is trained on is drawn with ``top_p`` 1: a nucleus would leave tokens out that the policy's probability, on
        which ratios rest, still counts.

        They are written into ``RUN/trajectories/RECORD.rankRANK.jsonl`` as they end. ``openings`` are those of
        ``run_agent``.

        Raises:
            RuntimeError: all of them failed, by log-probabilities that are not finite or by files that are gone.
            Stopped: on all ranks, as soon as one of them was asked to stop.
        """
        params = SamplingParams(
            temperature=temperature, top_p=top_p, max_tokens=self._limits.max_tokens_per_turn, seed=seed
        )
        if self._mesh.rank == 0:
            for file in self._folder.glob(f"{record}.rank*.jsonl"):  # of a run that was stopped, on more ranks
                if int(file.stem.rpartition("rank")[2]) >= self._mesh.world_size:
                    file.unlink()
        with self._policy.model.gathered(), Recorder(self.file(record), self._policy.tokenizer) as recorder:
            try:
                groups = run_agent(
                    self.sampler,
                    self.sandbox,
                    tasks,
                    tokenizer=self._policy.tokenizer,
                    num_generations=num_generations,
                    params=params,
                    limits=self._limits,
                    seed=seed,
                    openings=openings,
                    progress=recorder.add,
                    waited=self._add_wait,
                    stop=lambda: self._mesh.watch.stop_requested,
                )
            finally:
                self.sampler.flush()  # the weights may change now, and an update has use for the cache's memory
        if self._run.agree_to_stop():
            raise self._run.stopped()
        found = [trajectory for group in groups for trajectory in group.trajectories]
        if found and all(trajectory.status == "failed" for trajectory in found):
            raise RuntimeError(f"all {len(found)} trajectories failed, the first of them so: {found[0].error}")
        return groups

    def record(self, name: str, groups: Sequence[Group]) -> None:
        """Writes what ``sample`` recorded under a name once more, with rewards and advantages."""
        write_records(self.file(name), groups, self._policy.tokenizer)

    def remove_before(self, step: int) -> None:
        """Removes what this rank recorded of the GRPO steps before one."""
        for file in self._folder.glob(f"grpo/*.rank{self._mesh.rank}.jsonl"):
            if int(file.name.partition(".")[0]) < step:
                file.unlink()

    def file(self, name: str) -> Path:
        """Where this rank's trajectories of a record are."""
        return self._folder / f"{name}.rank{self._mesh.rank}.jsonl"

    def metrics(self) -> dict[str, float]:
        """What all ranks sampled since the last call: their sum of tokens a second, and means. Collective.

        ``tools/wait_s`` are seconds in which code ran and nobody had a token to decode.
        """
        ranks = self._mesh.all_gather_object(self.sampler.metrics() | {"tools/wait_s": self._waited_s})
        self._waited_s = 0.0
        found = {name: fmean(rank[name] for rank in ranks) for name in ranks[0]}
        found["sampling/tokens_per_s"] *= len(ranks)
        return found

    def _add_wait(self, seconds: float) -> None:
        self._waited_s += seconds

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.sandbox.close()


def my_share(run: Run, items: Sequence[Item], cost: Callable[[Item], float]) -> list[Item]:
    """Those of ``items`` that this rank samples: nearly as many as every other, of nearly the same cost."""
    shares = spread([cost(item) for item in items], run.mesh.world_size)
    return [items[index] for index in shares[run.mesh.rank]]


def agent_limits(settings: RolloutConfig) -> AgentLimits:
    """When a trajectory ends, as configured."""
    return AgentLimits(
        max_turns=settings.max_turns,
        max_tokens_per_turn=settings.max_tokens_per_turn,
        max_trajectory_tokens=settings.max_trajectory_tokens,
        max_observation_tokens=settings.max_observation_tokens,
        max_consecutive_errors=settings.max_consecutive_errors,
        max_wall_s=settings.max_wall_s or None,
    )


def open_sandbox(run: Run) -> Sandbox:
    """A sandbox with the configured limits."""
    settings = run.config.sandbox
    limits = Limits(
        wall_s=settings.wall_s,
        cpu_s=settings.wall_s,
        memory_gib=settings.memory_gib,
        isolation=settings.isolation,
    )
    allowed = settings.packages.split()
    installer = Installer(allowed, str(run.folder / f"packages/rank{run.mesh.rank}")) if allowed else None
    return Sandbox(limits, workers=settings.workers, execution=settings.execution, installer=installer)
