"""Strict configuration: frozen dataclasses, read from TOML, changed by dotted overrides.

    python -m groupwise.recipes.grpo train grpo.steps=10 grpo.lr=1e-4

Every setting is described where it is defined; ``--help`` of any recipe prints them. An unknown key, a wrong type or
a value out of range is a :class:`UserError` that names the key, the value and what was expected.
"""

import dataclasses
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .errors import UserError
from .settings import build, describe, kv_bytes, nearest, read_toml, setting, settings_of, shares, step_numbers

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives."""

    name: str = setting("train", "folder of this run, below run.folder")
    folder: str = setting("runs", "folder of all runs")
    seed: int = setting(0, "seed of data, initialisation and sampling", minimum=0)
    shard_size: int = setting(
        0, "ranks that hold one copy of the model, a divisor of all; 0: all ranks, one copy", minimum=0, changeable=True
    )
    timeout_s: int = setting(
        600, "seconds after which a collective that does not complete ends the run", minimum=1, changeable=True
    )
    attention: Literal["auto", "flash-attn", "varlen", "xformers", "triton", "sdpa"] = setting(
        "auto", "what serves the attention of training; auto: the first of them that the machine has", changeable=True
    )
    checkpoint_every: int = setting(50, "optimiser steps between checkpoints", minimum=1, changeable=True)
    kept_steps: int = setting(
        0, "newest GRPO steps whose trajectories stay on disk; 0: all of them", minimum=0, changeable=True
    )
    capture_steps: str = setting("", 'GRPO steps to keep for recipes.replay, such as "0,50"', changeable=True)
    profile_steps: str = setting("", 'steps of each stage whose trace is kept, such as "12"', changeable=True)

    def __post_init__(self) -> None:
        step_numbers("run.capture_steps", self.capture_steps)
        step_numbers("run.profile_steps", self.profile_steps)


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's change of the rotary frequencies, which lengthens the context; see ``engine.model.Rotary``.

    Raises:
        UserError: ``high_freq_factor`` is not above ``low_freq_factor``, or ``factor`` is not positive.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        if self.factor <= 0:
            raise UserError(f"the factor of the rope scaling is {self.factor:g}, expected more than 0; correct it")
        if self.high_freq_factor <= self.low_freq_factor:
            raise UserError(
                f"the high_freq_factor of the rope scaling is {self.high_freq_factor:g}, expected more than its "
                f"low_freq_factor {self.low_freq_factor:g}; correct one of them"
            )


@dataclass(frozen=True)
class ModelConfig:
    """Family and shape of a decoder. The defaults are the small analyst of the main job."""

    folder: str = setting("", "Hugging Face folder to start from; empty: random weights of the shape below")
    model_type: Literal["qwen2", "qwen3", "llama"] = setting(
        "qwen2", "family; qwen2: biases on query, key and value; qwen3: norms on query and key; llama: neither"
    )
    vocab_size: int = setting(512, "rows of the embedding", minimum=1)
    hidden_size: int = setting(128, "width", minimum=2)
    intermediate_size: int = setting(384, "width of the SwiGLU", minimum=1)
    num_hidden_layers: int = setting(4, "decoder layers", minimum=1)
    num_attention_heads: int = setting(4, "query heads", minimum=1)
    num_key_value_heads: int = setting(2, "key and value heads; divides num_attention_heads", minimum=1)
    head_dim: int = setting(0, "width of a head; 0: hidden_size / num_attention_heads", minimum=0)
    rope_theta: float = setting(10000.0, "base of the rotary frequencies", minimum=1)
    tie_word_embeddings: bool = setting(True, "output head shares the embedding")
    initialization: Literal["normal", "induction"] = setting(
        "normal", "random weights; induction: with a circuit that copies laid into them, for small models from nothing"
    )
    # No settings: a Hugging Face folder brings its own, and random weights have no reason for others.
    max_position_embeddings: int = 32768  # tokens of the longest sequence
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"model.num_key_value_heads is {self.num_key_value_heads}, which does not divide "
                f"model.num_attention_heads {self.num_attention_heads}; choose a divisor"
            )
        if not self.head_dim and self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"model.hidden_size {self.hidden_size} is no multiple of model.num_attention_heads "
                f"{self.num_attention_heads}; change one of them or set model.head_dim"
            )
        if self.head_size % 2:
            raise UserError(f"the width of a head is {self.head_size}, rotary embeddings need an even one")
        if self.initialization == "induction":
            if self.model_type != "qwen2":
                raise UserError(
                    f"model.initialization 'induction' is laid into biases, which model.model_type {self.model_type!r} "
                    "has not; choose 'qwen2' or initialization 'normal'"
                )
            sizes = {"num_hidden_layers": 2, "num_key_value_heads": 2, "hidden_size": 3 * self.head_size}
            for name, least in sizes.items():
                if getattr(self, name) < least:
                    raise UserError(
                        f"model.{name} is {getattr(self, name)}, but model.initialization 'induction' takes at least "
                        f"{least}; raise it or choose 'normal'"
                    )

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class DataConfig:
    """Tables, tasks and expert trajectories."""

    tables: str = setting("", "folder of .csv, .xlsx, .sqlite; empty: tables of scikit-learn and statsmodels")
    teacher: str = setting(
        "scripted", "scripted: programs that know the answers; MODEL@URL: an OpenAI-compatible endpoint; or a folder"
    )
    detail: Literal["short", "full"] = setting(
        "short",
        "short: small tables under invented names, told by their columns alone, one form of each program, as a model "
        "from nothing can learn them; full: real names, more of the table, many forms, questions of several steps",
    )
    num_trajectories: int = setting(3000, "expert trajectories for SFT", minimum=1)
    num_eval_tasks: int = setting(240, "tasks on the tables kept for evaluation", minimum=1)
    strata: str = setting(
        "40/35/15/10",
        "percent of trajectories that succeed, correct an error, notice and redo a wrong step, fail to the end",
    )
    modes: str = setting("90/5/5", "percent of trajectories in the grammars datamind, agentic, reflection")

    def __post_init__(self) -> None:
        self.strata_shares()
        self.mode_shares()

    def strata_shares(self) -> dict[str, float]:
        """Share of each stratum, in all 1 (Datarus-R1, arXiv 2508.13382, has 40/35/15/10)."""
        return shares("data.strata", self.strata, ("success", "corrected", "self_corrected", "failure"))

    def mode_shares(self) -> dict[str, float]:
        """Share of each grammar, in all 1."""
        return shares("data.modes", self.modes, ("datamind", "agentic", "reflection"))


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and the optimisation step, of every recipe."""

    weight_decay: float = setting(0.1, "decoupled decay of matrices; vectors are not decayed", minimum=0)
    max_grad_norm: float = setting(1.0, "global norm to which gradients are clipped", minimum=0)
    tokens_per_microbatch: int = setting(
        8192, "packed tokens in one forward and backward of a rank", minimum=1, changeable=True
    )
    compute_dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "type of gathered weights; auto: bfloat16 on CUDA, float32 on a CPU"
    )
    moments_dtype: Literal["float32", "bfloat16"] = setting("float32", "type of AdamW's moments")
    reduce_dtype: Literal["float32", "compute"] = setting(
        "float32", "type in which gradients are summed over ranks; compute: that of the gathered weights"
    )
    reduce_every_microbatch: bool = setting(
        True,
        "sum gradients over ranks after each micro-batch; false: after the last, whole gradients stay till then",
        changeable=True,
    )
    reshard_after_forward: bool = setting(True, "free a block's weights after its forward pass", changeable=True)
    activation_checkpointing: Literal["none", "block"] = setting(
        "none", "block: keep each block's input only, and compute the block again in the backward pass", changeable=True
    )
    offload: Literal["none", "reference", "all"] = setting(
        "none", "what lives in the host's memory; all: master weights, moments and reference", changeable=True
    )


@dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning on expert trajectories."""

    steps: int = setting(500, "optimiser steps", minimum=1)
    sequences_per_step: int = setting(32, "trajectories in a step, over all ranks", minimum=1)
    lr: float = setting(
        3e-3, "peak learning rate, after a tenth of the steps; it falls by a cosine to a tenth", minimum=0
    )
    wordings: int = setting(
        0, "learn from the first so many wordings of each kind of question, leave the others to GRPO; 0: all", minimum=0
    )


@dataclass(frozen=True)
class RolloutConfig:
    """Sampling and the many-turn loop."""

    temperature: float = setting(1.0, "softmax temperature of training rollouts", minimum=0)
    kv_memory: str = setting(
        "0.25", "memory of the KV cache on a rank: GiB, or a share of the device's such as 40%", changeable=True
    )
    exact: bool = setting(
        False, "log-probabilities of sampler and trainer equal to the last bit, slower; on a CPU in float32 only"
    )
    concurrency: int = setting(0, "sequences that decode together; 0: all that fit", minimum=0, changeable=True)
    max_turns: int = setting(10, "model turns of a trajectory", minimum=1)
    max_tokens_per_turn: int = setting(2048, "tokens the model may write in a turn", minimum=1)
    max_trajectory_tokens: int = setting(8192, "tokens of a trajectory, prompt included", minimum=1)
    max_observation_tokens: int = setting(1024, "tokens of an observation; head and tail are kept", minimum=8)
    max_consecutive_errors: int = setting(5, "failed executions in a row that end a trajectory", minimum=1)
    max_wall_s: float = setting(0.0, "wall seconds of a trajectory; 0: no limit, time decides nothing", minimum=0)

    def __post_init__(self) -> None:
        kv_bytes(self.kv_memory, 2**40)


@dataclass(frozen=True)
class SandboxConfig:
    """Limits of one execution of model code."""

    wall_s: float = setting(20.0, "wall seconds, and CPU seconds of a process", minimum=0.01)
    memory_gib: float = setting(1.0, "address space", minimum=0.01)
    execution: Literal["replay", "forked"] = setting(
        "replay",
        "how a trajectory's state is kept: earlier code runs again, or a paused process holds it",
        changeable=True,
    )
    packages: str = setting(
        "",
        "packages that code may have installed by importing them, separated by blanks, import=distribution where the "
        "names differ; none: nothing is installed",
    )
    workers: int = setting(2, "executions at once on a rank", minimum=1, changeable=True)
    isolation: Literal["auto", "none"] = setting(
        "auto", "auto: what the kernel enforces, refuse where it enforces nothing; none: run all the same"
    )


@dataclass(frozen=True)
class HRMConfig:
    """The hierarchical reward model, which scores the steps of a trajectory (datarus)."""

    folder: str = setting("", "folder of a trained one; empty: the run's own, where hrm.steps trains it")
    steps: int = setting(
        0, "optimiser steps, of sft.sequences_per_step trajectories each; 0: none is trained", minimum=0
    )
    lr: float = setting(1e-3, "peak learning rate, which moves as that of SFT", minimum=0)
    search_tasks: int = setting(
        0, "tasks on which the policy's own steps are labelled, by how many of their continuations are right", minimum=0
    )
    labels: Literal["binary", "graded"] = setting(
        "binary", "of a step: 0 or 1; graded: 1/2 where it ran and its trajectory's answer is wrong"
    )


@dataclass(frozen=True)
class RewardConfig:
    """What a trajectory earns."""

    kind: Literal["datarus", "datamind"] = setting("datarus", "form of the total reward")
    answer_weight: float = setting(1.0, "weight of the right answer (datarus)", minimum=0)
    lambda_max: float = setting(0.9, "weight of structure at the first step (datarus)", minimum=0, maximum=1)
    lambda_min: float = setting(0.1, "weight of structure at the last step (datarus)", minimum=0, maximum=1)
    lambda_schedule: Literal["constant", "linear", "cosine"] = setting("cosine", "way from lambda_max to lambda_min")
    length_coef: float = setting(0.1, "cost of tokens over length_target (datarus)", minimum=0)
    length_target: int = setting(512, "completion tokens that cost nothing (datarus)", minimum=1)
    overlong_buffer: int = setting(
        0,
        "last tokens before rollout.max_trajectory_tokens, over which the reward falls by 1, and what is truncated "
        "keeps its loss; 0: no such cost",
        minimum=0,
    )
    judge: str = setting(
        "", "of free-text answers: MODEL@URL of an OpenAI-compatible endpoint, or a checkpoint's folder; empty: none"
    )

    @property
    def counts_answers(self) -> bool:
        """Whether the right answer is rewarded: then groups differ by their answers, else by their rewards."""
        return self.kind == "datamind" or self.answer_weight > 0


@dataclass(frozen=True)
class GRPOConfig:
    """Group-relative policy optimisation."""

    steps: int = setting(50, "optimiser steps", minimum=1)
    prompts_per_step: int = setting(16, "tasks in a step, over all ranks", minimum=1)
    num_generations: int = setting(8, "trajectories of a task: the group", minimum=2)
    max_sampling_rounds: int = setting(
        1, "rounds of new tasks in the place of those whose group has no contrast; 1: none are replaced", minimum=1
    )
    num_iterations: int = setting(1, "passes over a step's trajectories", minimum=1)
    num_minibatches: int = setting(1, "updates in a pass, of as many groups each", minimum=1)
    lr: float = setting(3e-4, "learning rate after warm-up", minimum=0)
    warmup_steps: int = setting(5, "linear warm-up", minimum=0)
    min_lr_ratio: float = setting(1.0, "share of grpo.lr at the end of its cosine; 1: constant", minimum=0, maximum=1)
    experts_per_step: int = setting(
        0, "expert trajectories imitated in a step beside those of its tasks, over all ranks", minimum=0
    )
    mu_peak: float = setting(0.0, "weight of the experts' likelihood at first; 0: RL alone", minimum=0, maximum=1)
    mu_valley: float = setting(0.0, "weight of the experts' likelihood at the end of its decay", minimum=0, maximum=1)
    mu_decay_steps: int = setting(0, "steps in which that weight falls to mu_valley, by a cosine", minimum=0)
    loss_type: Literal["dapo", "grpo", "dr_grpo", "gspo", "cispo"] = setting(
        "dapo",
        "mean over all tokens; grpo: over each trajectory's; dr_grpo: sum by a constant, advantages not "
        "divided by the deviation; gspo: grpo with one ratio a trajectory; cispo: dapo with clipped ratios as weights",
    )
    epsilon: float = setting(0.2, "lower clip of the ratio", minimum=0, maximum=1)
    epsilon_high: float = setting(0.28, "upper clip of the ratio", minimum=0)
    dual_clip: float = setting(
        0.0, "bound of the ratio of tokens of negative advantage, above 1 + grpo.epsilon_high; 0: none", minimum=0
    )
    beta: float = setting(0.0, "weight of the k3 KL to the reference policy", minimum=0)
    delta_max: float = setting(4.0, "bound of log-probability differences", minimum=0)
    importance_correction: Literal["none", "truncated", "mask"] = setting(
        "none",
        "weight of a token by trainer's over sampler's probability; truncated: at most 2; mask: 0 beyond 2",
    )
    entropy_coef: float = setting(0.0, "weight of the policy's entropy, which is added to what is maximised", minimum=0)
    mask_void: bool = setting(True, "no policy-gradient loss on trajectories with a void turn or no answer")

    def __post_init__(self) -> None:
        if self.dual_clip and self.dual_clip <= 1 + self.epsilon_high:
            raise UserError(
                f"grpo.dual_clip is {self.dual_clip:g}, expected 0 or more than 1 + grpo.epsilon_high, "
                f"{1 + self.epsilon_high:g}; raise it"
            )
        if self.dual_clip and self.loss_type == "cispo":
            raise UserError(f"grpo.dual_clip is {self.dual_clip:g}, but cispo bounds every ratio; leave it at 0")
        if self.num_minibatches > self.prompts_per_step:
            raise UserError(
                f"grpo.num_minibatches is {self.num_minibatches}, expected at most grpo.prompts_per_step, "
                f"{self.prompts_per_step}; lower it"
            )


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation on tables never trained on, or on a benchmark."""

    benchmark: str = setting("", "folder of a benchmark's files; empty: the tasks on the run's tables kept apart")
    num_samples: int = setting(3, "runs of each task: pass@1 is their mean, pass@k their union", minimum=1)
    temperature: float = setting(0.7, "softmax temperature", minimum=0)
    top_p: float = setting(0.95, "nucleus", minimum=0, maximum=1)


@dataclass(frozen=True)
class Config:
    """One run of any recipe."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    hrm: HRMConfig = field(default_factory=HRMConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    @property
    def scores_steps(self) -> bool:
        """Whether GRPO has the hierarchical reward model beside it."""
        return self.reward.kind == "datarus" and bool(self.hrm.folder or self.hrm.steps)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Nested plain values, as TOML and JSON write them."""
        return dataclasses.asdict(self)


SECTIONS: dict[str, type] = {f.name: f.default_factory for f in dataclasses.fields(Config)}  # type: ignore[misc]


def is_changeable(section: str, key: str) -> bool:
    """Whether a run that is resumed may have another value of a setting: it says how to compute, and not what."""
    return any(f.name == key and f.metadata["changeable"] for f in settings_of(SECTIONS[section]))


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Reads a TOML file and applies overrides.

    Args:
        path: a file, or the name of a file in ``configs/`` without its ending; None: the defaults.
        overrides: ``section.key=value``, the value in TOML's spelling or a bare string; ``key=value`` where only one
            section has that key.

    Raises:
        UserError: absent or malformed file, unknown section or key, wrong type, value out of bounds.
    """
    values: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    if path is not None:
        for name, section in read_toml(path, CONFIGS).items():
            if name not in SECTIONS:
                raise UserError(f"{path}: unknown section [{name}]{nearest(name, SECTIONS)}")
            if not isinstance(section, dict):
                raise UserError(f"{path}: {name} is {section!r}, expected a section [{name}]")
            values[name].update(section)
    for override in overrides:
        name, key, value = _parse_override(override)
        values[name][key] = value
    return Config(**{name: build(name, cls, values[name]) for name, cls in SECTIONS.items()})


def describe_settings() -> str:
    """Every setting with its type, default and description: the text of ``--help``."""
    return "\n".join(line for name, cls in SECTIONS.items() for line in describe(name, cls))


def _parse_override(text: str) -> tuple[str, str, Any]:
    dotted, equals, raw = text.partition("=")
    if not equals:
        raise UserError(f"{text!r} is no override; write section.key=value")
    known = {f"{name}.{f.name}" for name, cls in SECTIONS.items() for f in settings_of(cls)}
    if "." not in dotted:
        homes = [key for key in known if key.split(".")[1] == dotted]
        if len(homes) > 1:
            raise UserError(f"{dotted!r} is a key of several sections; write one of {', '.join(sorted(homes))}")
        dotted = homes[0] if homes else dotted
    if dotted not in known:
        leaves = known | {key.split(".")[1] for key in known}
        raise UserError(f"unknown configuration key {dotted!r}{nearest(dotted, leaves)}")
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw
    name, key = dotted.split(".")
    return name, key, value
