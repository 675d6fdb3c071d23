"""Group-relative policy optimisation: groups of trajectories with executed code, rewards, clamped-delta loss.

    torchrun --standalone --nproc-per-node 2 -m groupwise.recipes.grpo train

Starts from ``model.folder`` or from the run's SFT model, which also is the frozen reference; takes its tasks from the
data of ``recipes.synthesize``, and its hierarchical reward model from ``hrm.folder`` or the run; writes
``RUN/grpo/model``. Source of the objective: DAPO, arXiv 2503.14476, with the masking of DataMind, arXiv 2509.25084, and
the reward curriculum of Datarus-R1, arXiv 2508.13382.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from ..data.trajectories import Expert
from ..engine.batch import Batch, Example, pack
from ..engine.config import Config, GRPOConfig, RewardConfig
from ..engine.doctor import Doctor
from ..engine.errors import UserError
from ..engine.metrics import read_records, say
from ..engine.objective import Stats, count, group_advantages, informative, policy_loss, weigh
from ..engine.planner import PHASES
from ..engine.schedule import mixing, policy_rate
from ..engine.step import level, merged
from ..kernels.linear import ROWS
from ..rollout.trajectory import Group, masked_statuses
from .capsule import Capture
from .experts import Experts
from .measure import measure
from .pace import Pace
from .policy import load_policy, load_reference, save_policy
from .rewarding import Rewarding
from .rollouts import Rollouts, my_share
from .run import Run, Stopped, launch
from .training import Training, places

Sample = Callable[[Sequence[Expert], int], list[Group]]  # tasks of this rank, round -> their groups, with rewards


def grpo(run: Run) -> Path:
    """Trains the policy by its own rollouts and returns the folder of the trained model."""
    folder, settings = run.folder / "grpo", run.config.grpo
    if (folder / "model").exists():
        return folder / "model"
    first = Path(run.config.model.folder or run.folder / "sft" / "model")
    policy = load_policy(run, first)
    reference = load_reference(run, first) if settings.beta else None
    temperature = run.config.rollout.temperature
    experts = Experts(run)
    pool = [expert for expert in experts.all if expert.stratum != "failure"]
    rewarding = Rewarding(run, policy.tokenizer, [expert.task for expert in pool])
    gamma, loss_fn = mixing(settings), objective(settings, temperature)
    training = Training(run, policy, "grpo", settings.steps, policy_rate(settings))
    records = read_records(training.metrics.path) if run.is_main else ()
    doctor = Doctor(folder / "doctor.jsonl", run.mesh, records, training.start)
    with Rollouts(run, policy) as rollouts:
        for step in training.steps():
            sample = partial(sample_round, run, rollouts, rewarding, training.pace, training.capture, step)
            try:
                asked, groups = ask(run, pool, step, sample)
            except Stopped:
                continue  # training.steps saves what was before this step, and ends
            with training.pace("data"):
                others = my_share(run, drawn(run, pool, settings.experts_per_step, step, 1), expert_length)
                imitated = experts.examples([*asked, *others], step, policy.tokenizer) if gamma(step) else []
                minibatches = to_minibatches(run, groups, imitated)
            training.capture.holds(imitated, minibatches)
            every = [batch for batches in minibatches for batch in batches]
            if settings.num_iterations * settings.num_minibatches > 1:
                with training.pace("old_logprob", every):
                    for batch in every:
                        batch.old_logprob = policy.model.logprobs(batch, temperature)
            if reference is not None:
                with training.pace("reference", every):
                    for batch in every:
                        batch.ref_logprob = reference.logprobs(batch, temperature)
            updates = [
                training.update(step, batches, partial(loss_fn, gamma=gamma(step)))
                for _ in range(settings.num_iterations)
                for batches in minibatches
            ]
            record = measure(run, groups, merged(updates)) | rollouts.metrics() | rewarding.metrics(step)
            record["gamma"] = gamma(step)
            if run.config.rollout.exact and record.get("sampling/logp_difference_max"):
                raise UserError(
                    f"rollout.exact: trainer and sampler differ by {record['sampling/logp_difference_max']:g}, "
                    "expected 0; this machine's libraries sum a row otherwise in other company, go on without it"
                )
            training.log(step, record | doctor.examine(step, record))
            if kept := run.config.run.kept_steps:
                rollouts.remove_before(step + 1 - kept)
    save_policy(run, policy, folder / "model")
    return folder / "model"


def objective(settings: GRPOConfig, temperature: float) -> Callable[..., tuple[Tensor, Stats]]:
    """``policy_loss`` as configured; ``gamma`` is left to be given."""
    return partial(
        policy_loss,
        loss_type=settings.loss_type,
        temperature=temperature,
        clip_low=settings.epsilon,
        clip_high=settings.epsilon_high,
        dual_clip=settings.dual_clip or None,
        beta=settings.beta,
        delta_max=settings.delta_max,
        importance_correction=settings.importance_correction,
        entropy_coef=settings.entropy_coef,
    )


def sample_round(
    run: Run,
    rollouts: Rollouts,
    rewarding: Rewarding,
    pace: Pace,
    capture: Capture,
    step: int,
    mine: Sequence[Expert],
    number: int,
) -> list[Group]:
    """Groups for the tasks of this rank, with their rewards, recorded. Every rank calls it together."""
    name = f"grpo/{step:06d}" if number == 0 else f"grpo/{step:06d}.{number}"
    seed = (run.config.run.seed + 1_009 * number) * 1_000_003 + step
    with pace("generate"):
        groups = rollouts.sample(
            [expert.task for expert in mine],
            run.config.grpo.num_generations,
            temperature=run.config.rollout.temperature,
            seed=seed,
            record=name,
        )
    pace.add_tokens("generate", sum(one.completion_tokens for group in groups for one in group.trajectories))
    with pace("reward"):
        rewarding.score(groups, step)
        for group in groups:
            set_advantages(group, run)
        rollouts.record(name, groups)
    capture.add_round(seed, groups)
    return groups


def ask(run: Run, pool: Sequence[Expert], step: int, sample: Sample) -> tuple[list[Expert], list[Group]]:
    """This rank's share of a step's tasks with their groups: sampled, and scored.

    With ``max_sampling_rounds`` over 1, new tasks are asked in the place of those whose groups have no contrast, over
    all ranks, until there are ``prompts_per_step`` groups that have, or the rounds are over (dynamic sampling: DAPO,
    arXiv 2503.14476, 3.2).
    """
    settings = run.config.grpo
    asked: list[Expert] = []
    groups: list[Group] = []
    wanted = settings.prompts_per_step
    for number in range(settings.max_sampling_rounds):
        mine = my_share(run, drawn(run, pool, wanted, step, 1 + number if number else 0), expert_length)
        found = sample(mine, number)
        asked += mine
        groups += found
        contrasted = sum(has_contrast(group, run.config.reward) for group in found)
        wanted -= sum(run.mesh.all_gather_object(contrasted))
        if not wanted:
            break
    if wanted and settings.max_sampling_rounds > 1 and run.is_main:
        say(
            f"step {step + 1}: after {settings.max_sampling_rounds} rounds {settings.prompts_per_step - wanted} of "
            f"{settings.prompts_per_step} groups have contrast; the step goes on with them"
        )
    return asked, groups


def drawn(run: Run, pool: Sequence[Expert], count: int, step: int, stream: int = 0) -> list[Expert]:
    """The ``count`` experts whose tasks a step asks, over all ranks; another stream draws others."""
    return [pool[i] for i in places(step, count, len(pool), run.config.run.seed + stream)]


def expert_length(expert: Expert) -> int:
    """Characters of an expert's trajectory: about how long others of its task will be."""
    return sum(len(text) for _, text in expert.spans)


def has_contrast(group: Group, settings: RewardConfig) -> bool:
    """Whether a group gives a policy gradient: of its scored members some are right and some are wrong.

    Where the right answer is not rewarded, their rewards must differ.
    """
    members = [trajectory for trajectory in group.trajectories if trajectory.scored]
    return informative([t.rewards["answer"] if settings.counts_answers else t.reward for t in members])


def set_advantages(group: Group, run: Run) -> None:
    """Fills ``advantage`` of the scored members of a group that has contrast; all others keep 0."""
    if not has_contrast(group, run.config.reward):
        return
    members = [trajectory for trajectory in group.trajectories if trajectory.scored]
    scaled = run.config.grpo.loss_type != "dr_grpo"  # Dr. GRPO, arXiv 2503.20783
    advantages = group_advantages([t.reward for t in members], scaled).tolist()
    for trajectory, advantage in zip(members, advantages, strict=True):
        trajectory.advantage = advantage


def to_minibatches(run: Run, groups: Sequence[Group], imitated: Sequence[Example]) -> list[list[Batch]]:
    """What each update of a pass learns from: loss weights by its own global counts, packed.

    A group without contrast gives no policy gradient: of its task only the expert's trajectory is learnt from, where
    experts are mixed in (DataMind, arXiv 2509.25084). Every rank gets the same number of micro-batches in each.
    """
    return [_to_batches(run, examples) for examples, _ in to_examples(run.config, groups, imitated)]


def to_examples(
    config: Config, groups: Sequence[Group], imitated: Sequence[Example]
) -> list[tuple[list[Example], list[str]]]:
    """The examples of each mini-batch, not weighed, and in words which expert or trajectory each of them is."""
    parts, settings = config.grpo.num_minibatches, config.grpo
    mask = masked_statuses(settings.mask_void, config.reward.overlong_buffer > 0)
    contrasted = [group for group in groups if has_contrast(group, config.reward)]
    found = []
    for part in range(parts):
        examples = [replace(example) for example in imitated[part::parts]]  # they are to be weighed
        names = [f"expert example {number}" for number in range(len(imitated))[part::parts]]
        for number, group in enumerate(contrasted[part::parts]):
            members = [trajectory for trajectory in group.trajectories if trajectory.scored]
            examples += [trajectory.to_example(mask=mask, group=number) for trajectory in members]
            names += [trajectory.name for trajectory in members]
        found.append((examples, names))
    return found


def _to_batches(run: Run, examples: list[Example]) -> list[Batch]:
    counts = count(examples).summed(run.mesh)
    if not counts.tokens + counts.expert_tokens:
        return []  # nothing to learn from: weight decay alone must not move the weights either
    weigh(
        examples,
        counts,
        loss_type=run.config.grpo.loss_type,
        max_completion_tokens=run.config.rollout.max_trajectory_tokens,
    )
    examples = [example for example in examples if example.loss_tokens]  # the others only counted as sequences
    return level(pack(examples, run.config.optimizer.tokens_per_microbatch, run.mesh.device, ROWS), run.mesh)


def _recipe(run: Run) -> None:
    run.say(f"model: {grpo(run)}")
    run.say(run.planned.report())


if __name__ == "__main__":
    launch(_recipe, phases=PHASES, stages=("grpo",))
