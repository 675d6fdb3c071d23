"""Where a policy meets its environment: one sampler and one sandbox that stages share."""

from collections.abc import Callable, Sequence
from statistics import fmean
from types import TracebackType
from typing import Self, TypeVar, cast

from ..engine.config import kv_bytes
from ..engine.metrics import free_memory
from ..engine.model import Model
from ..rollout.agent import AgentLimits, run_agent
from ..rollout.sampler import Sampler, SamplingParams
from ..rollout.sandbox import Limits, Sandbox
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
        self._policy, self._mesh = policy, run.mesh
        self._limits = AgentLimits(
            max_turns=settings.max_turns,
            max_tokens_per_turn=settings.max_tokens_per_turn,
            max_trajectory_tokens=settings.max_trajectory_tokens,
            max_observation_tokens=settings.max_observation_tokens,
            max_consecutive_errors=settings.max_consecutive_errors,
        )
        self.sampler = Sampler(
            cast(Model, policy.model.module),
            policy.tokenizer,
            kv_memory=kv_bytes(settings.kv_memory, memory) / 2**30,
            concurrency=settings.concurrency,
            exact=settings.exact,
        )
        self.sandbox = open_sandbox(run)

    def sample(
        self, tasks: Sequence[Task], num_generations: int, *, temperature: float, top_p: float, seed: int
    ) -> list[Group]:
        """A group of ``num_generations`` trajectories for each task of this rank. Every rank calls it together.

        Raises:
            FloatingPointError: all of them failed for log-probabilities that are not finite.
        """
        params = SamplingParams(
            temperature=temperature, top_p=top_p, max_tokens=self._limits.max_tokens_per_turn, seed=seed
        )
        with self._policy.model.gathered():
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
                )
            finally:
                self.sampler.flush()  # the weights may change now, and an update has use for the cache's memory
        if groups and all(found.status == "failed" for group in groups for found in group.trajectories):
            raise FloatingPointError(
                "the model gave no finite log-probability in any trajectory; its weights are broken"
            )
        return groups

    def metrics(self) -> dict[str, float]:
        """What all ranks sampled since the last call: their sum of tokens a second, and means. Collective."""
        ranks = self._mesh.all_gather_object(self.sampler.metrics())
        found = {name: fmean(rank[name] for rank in ranks) for name in ranks[0]}
        found["sampling/tokens_per_s"] *= len(ranks)
        return found

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


def open_sandbox(run: Run) -> Sandbox:
    """A sandbox with the configured limits."""
    settings = run.config.sandbox
    limits = Limits(
        wall_s=settings.wall_s,
        cpu_s=settings.wall_s,
        memory_gib=settings.memory_gib,
        processes=settings.processes,
        isolation=settings.isolation,
    )
    return Sandbox(limits, workers=settings.workers)
