"""Whether a plan fits the memory there is, and the smallest change that makes it fit.

check_fits(config, plan, memory=141e9)  # a UserError names the change, which was planned too
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .config import Config
from .errors import UserError
from .planner import PHASES, Plan, compute_bytes, plan_memory

# The rest of a GPU is for the CUDA context, NCCL, cuBLAS and what the allocator cannot use again; not yet measured.
USABLE_SHARE = 0.92
MORE_RANKS = (1, 2, 4, 8, 16)  # times as many


def fits(plan: Plan, memory: float) -> bool:
    """Whether every phase fits a rank's memory, in bytes: of a GPU a share, of a CPU all that is available."""
    return plan.peak <= memory * (USABLE_SHARE if plan.device_type == "cuda" else 1.0)


def check_fits(config: Config, plan: Plan, memory: float) -> None:
    """Refuse a plan for which a rank's ``memory`` in bytes is too small.

    Raises:
        UserError: it does not fit; the sentence names the smallest change that does, if there is one.
    """
    if fits(plan, memory):
        return
    phases = tuple(phase.name for phase in plan.phases)
    proposal = propose(config, plan.num_ranks, plan.device_type, memory, phases)
    usable = f", {USABLE_SHARE:.0%} of it for tensors" if plan.device_type == "cuda" else ""
    advice = f"no setting and no {MORE_RANKS[-1]} times as many ranks make it fit, take a smaller model"
    if proposal is not None:
        ranks = f" on {proposal.num_ranks} ranks" if proposal.num_ranks != plan.num_ranks else ""
        advice = f"it fits{ranks}{' with ' if proposal.overrides else ''}{' '.join(proposal.overrides)}"
        host = max(phase.host_bytes for phase in proposal.plan.phases)
        beside = f", and {host / 1e9:.1f} GB of the host's memory" if host and plan.device_type == "cuda" else ""
        advice += f" ({proposal.plan.peak / 1e9:.1f} GB{beside})"
    raise UserError(
        f"phase {plan.fullest.name} needs {plan.peak / 1e9:.1f} GB on each of {plan.num_ranks} ranks and one has "
        f"{memory / 1e9:.1f} GB{usable}; {advice}"
    )


@dataclass(frozen=True)
class Proposal:
    """A change that fits: overrides of settings, the number of ranks, and the plan that says so."""

    overrides: tuple[str, ...]
    num_ranks: int
    plan: Plan


def propose(
    config: Config, num_ranks: int, device_type: str, memory: float, phases: Sequence[str] = PHASES
) -> Proposal | None:
    """The smallest change after which the plan fits: as few settings as can be, the cheapest first, then more ranks.

    Every change is planned before it is proposed. None where no setting and none of ``MORE_RANKS`` does.
    """
    options = list(_options(config, device_type))
    for factor in MORE_RANKS:
        for count in range(len(options) + 1):
            for chosen in itertools.combinations(options, count):
                for values in itertools.product(*(values for _, _, values in chosen)):
                    changed = config
                    for (section, key, _), value in zip(chosen, values, strict=True):
                        part = dataclasses.replace(getattr(changed, section), **{key: value})
                        changed = dataclasses.replace(changed, **{section: part})
                    plan = plan_memory(changed, num_ranks * factor, device_type, phases)
                    if fits(plan, memory):
                        names = (f"{s}.{k}={_spell(v)}" for (s, k, _), v in zip(chosen, values, strict=True))
                        return Proposal(tuple(names), num_ranks * factor, plan)
    return None


def _options(config: Config, device_type: str) -> Iterator[tuple[str, str, list[Any]]]:
    """Settings that save memory and their better values, what costs least first."""
    settings, rollout = config.optimizer, config.rollout
    tokens, kv = settings.tokens_per_microbatch, float(rollout.kv_memory)
    model = config.model
    channels = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_size  # keys and values of a token
    trajectory = rollout.max_trajectory_tokens * channels * compute_bytes(config, device_type) / 2**30
    shorter = [tokens >> i for i in range(1, 5) if tokens >> i >= rollout.max_trajectory_tokens]
    table: list[tuple[str, str, list[Any]]] = [
        ("optimizer", "reshard_after_forward", [] if settings.reshard_after_forward else [True]),
        ("optimizer", "reduce_every_microbatch", [] if settings.reduce_every_microbatch else [True]),
        ("run", "shard_size", [0] if config.run.shard_size else []),
        ("optimizer", "tokens_per_microbatch", shorter),  # an example is never split
        ("optimizer", "activation_checkpointing", ["block"] if settings.activation_checkpointing == "none" else []),
        ("rollout", "kv_memory", [f"{kv * x:g}" for x in (0.75, 0.5, 0.25, 0.125) if kv * x > trajectory]),
    ]
    if device_type == "cuda":
        places = ["none", "reference", "all"]
        table.append(("optimizer", "offload", places[places.index(settings.offload) + 1 :]))
    if settings.moments_dtype == "float32":
        table.append(("optimizer", "moments_dtype", ["bfloat16"]))
    return (option for option in table if option[2])


def _spell(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
