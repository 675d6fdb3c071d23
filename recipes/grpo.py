"""Group-relative policy optimisation: groups of trajectories with executed code, rewards, clamped-delta loss.

    torchrun --standalone --nproc-per-node 2 -m groupwise.recipes.grpo train

Starts from ``model.folder`` or from the run's SFT model, which also is the frozen reference; takes its tasks from the
data of ``recipes.synthesize``; writes ``RUN/grpo/model``. Source of the objective: DAPO, arXiv 2503.14476, with the
masking of DataMind, arXiv 2509.25084, and the reward curriculum of Datarus-R1, arXiv 2508.13382.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

from ..data.trajectories import Expert
from ..engine.batch import Batch, Example, pack
from ..engine.errors import UserError
from ..engine.metrics import Timer, peak_memory_gib
from ..engine.objective import count, group_advantages, informative, policy_loss, summarise, weigh
from ..engine.planner import PHASES
from ..engine.schedule import Schedule, mixing_schedule
from ..engine.step import Update, level
from ..kernels.linear import ROWS
from ..rewards.curriculum import score, structure_schedule
from ..rollout.trajectory import Group
from .experts import Experts
from .policy import load_policy, load_reference, save_policy
from .rollouts import Rollouts, my_share
from .run import Run, launch
from .training import Training, places


def grpo(run: Run) -> Path:
    """Trains the policy by its own rollouts and returns the folder of the trained model."""
    folder, settings = run.folder / "grpo", run.config.grpo
    if (folder / "model").exists():
        return folder / "model"
    first = Path(run.config.model.folder or run.folder / "sft" / "model")
    policy = load_policy(run, first)
    reference = load_reference(run, first) if settings.beta else None
    experts = Experts(run)
    pool = [expert for expert in experts.all if expert.stratum != "failure"]
    structure = structure_schedule(run.config.reward, settings.steps)
    gamma = mixing_schedule(
        mu_peak=settings.mu_peak,
        mu_valley=settings.mu_valley,
        mu_warmup_steps=settings.mu_warmup_steps,
        mu_decay_steps=settings.mu_decay_steps,
        total_steps=settings.steps,
    )
    loss_fn = partial(
        policy_loss,
        temperature=run.config.rollout.temperature,
        clip_low=settings.epsilon,
        clip_high=settings.epsilon_high,
        dual_clip=settings.dual_clip or None,
        beta=settings.beta,
        delta_max=settings.delta_max,
        importance_correction=settings.importance_correction,
    )
    lr = Schedule("cosine", settings.lr, settings.lr * settings.min_lr_ratio, settings.steps, settings.warmup_steps)
    training = Training(run, policy, "grpo", settings.steps, lr)
    with Rollouts(run, policy) as rollouts:
        for step in training.steps():
            timer = Timer(run.mesh.device)
            mine = my_share(run, drawn(run, pool, settings.prompts_per_step, step), expert_length)
            with timer("generate"):
                groups = rollouts.sample(
                    [expert.task for expert in mine],
                    settings.num_generations,
                    temperature=run.config.rollout.temperature,
                    top_p=run.config.rollout.top_p,
                    seed=run.config.run.seed * 1_000_003 + step,
                    record=f"grpo/{step:06d}",
                )
            with timer("reward"):
                score(groups, tokenizer=policy.tokenizer, settings=run.config.reward, structure_weight=structure(step))
                others = drawn(run, pool, settings.experts_per_step, step, 1)
                shown = mine + my_share(run, others, expert_length)
                imitated = experts.examples(shown, step, policy.tokenizer) if gamma(step) else []
                batches = to_batches(run, groups, imitated)
                rollouts.record(f"grpo/{step:06d}", groups)
            with timer("reference"):
                if reference is not None:
                    for batch in batches:
                        batch.ref_logprob = reference.logprobs(batch, run.config.rollout.temperature)
            with timer("update"):
                update = training.update(step, batches, partial(loss_fn, gamma=gamma(step)))
            record = measure(run, groups, update, timer) | rollouts.metrics()
            if run.config.rollout.exact and record.get("sampling/logp_difference_max"):
                raise UserError(
                    f"rollout.exact: trainer and sampler differ by {record['sampling/logp_difference_max']:g}, "
                    "expected 0; this machine's libraries sum a row otherwise in other company, go on without it"
                )
            training.metrics.log(step, {**record, "gamma": gamma(step)})
    save_policy(run, policy, folder / "model")
    return folder / "model"


def drawn(run: Run, pool: Sequence[Expert], count: int, step: int, stream: int = 0) -> list[Expert]:
    """The ``count`` experts whose tasks a step asks, over all ranks; another stream draws others."""
    return [pool[i] for i in places(step, count, len(pool), run.config.run.seed + stream)]


def expert_length(expert: Expert) -> int:
    """Characters of an expert's trajectory: about how long others of its task will be."""
    return sum(len(text) for _, text in expert.spans)


def to_batches(run: Run, groups: Sequence[Group], imitated: Sequence[Example]) -> list[Batch]:
    """Advantages, loss weights by the global counts, and packing.

    A group without contrast gives no policy gradient: of its task only the expert's trajectory is learnt from, where
    experts are mixed in (DataMind, arXiv 2509.25084). Every rank gets the same number of micro-batches.
    """
    settings = run.config.grpo
    examples = list(imitated)
    for number, group in enumerate(groups):
        if not informative([trajectory.rewards["answer"] for trajectory in group.trajectories]):
            continue
        advantages = group_advantages([t.reward for t in group.trajectories], settings.scale_rewards).tolist()
        for trajectory, advantage in zip(group.trajectories, advantages, strict=True):
            trajectory.advantage = advantage
            examples.append(trajectory.to_example(mask_void=settings.mask_void, group=number))
    counts = count(examples).summed(run.mesh)
    if not counts.tokens + counts.expert_tokens:
        return []  # nothing to learn from: weight decay alone must not move the weights either
    weigh(
        examples,
        counts,
        loss_type=settings.loss_type,
        max_completion_tokens=run.config.rollout.max_trajectory_tokens,
    )
    examples = [example for example in examples if example.loss_tokens]  # the others only counted as sequences
    return level(pack(examples, run.config.optimizer.tokens_per_microbatch, run.mesh.device, ROWS), run.mesh)


def measure(run: Run, groups: Sequence[Group], update: Update, timer: Timer) -> dict[str, float]:
    """The record of a step over all ranks, by the names practitioners read."""
    mine = [
        {
            "group": f"{run.mesh.rank}:{number}",
            "reward": trajectory.reward,
            "parts": trajectory.rewards,
            "tokens": trajectory.completion_tokens,
            "turns": trajectory.turns,
            "clipped": trajectory.status in ("token_limit", "turn_limit", "time_limit"),
            "failed": trajectory.status == "failed",
            "executions": [execution.ok for execution in trajectory.executions],
        }
        for number, group in enumerate(groups)
        for trajectory in group.trajectories
    ]
    rows = [row for part in run.mesh.all_gather_object(mine) for row in part]
    by_group: dict[str, list[float]] = {}
    for row in rows:
        by_group.setdefault(row["group"], []).append(row["reward"])
    executions = [ok for row in rows for ok in row["executions"]]
    record = {
        "reward": fmean(row["reward"] for row in rows),
        "reward_std": fmean(stdev(rewards) for rewards in by_group.values()),
        "frac_reward_zero_std": fmean(len(set(rewards)) == 1 for rewards in by_group.values()),
        "completions/mean_length": fmean(row["tokens"] for row in rows),
        "completions/clipped_ratio": fmean(row["clipped"] for row in rows),
        "completions/failed_ratio": fmean(row["failed"] for row in rows),
        "completions/mean_turns": fmean(row["turns"] for row in rows),
        "tools/failure_frequency": 1 - fmean(executions) if executions else 0.0,
        "loss": update.loss,
        "grad_norm": update.grad_norm,
        "lr": update.lr,
        "skipped_steps": float(update.skipped),
        "perf/peak_memory_gib": peak_memory_gib(run.mesh.device),
    }
    record |= {f"rewards/{name}": fmean(row["parts"][name] for row in rows) for name in rows[0]["parts"]}
    return {**record, **summarise(update.stats), **timer.metrics()}


def _recipe(run: Run) -> None:
    run.say(f"model: {grpo(run)}")
    run.say(run.planned.report())


if __name__ == "__main__":
    launch(_recipe, phases=PHASES)
