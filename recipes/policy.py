"""The model that a recipe trains or runs, with its tokenizer: made, read, written."""

from dataclasses import dataclass
from pathlib import Path

import torch

from ..engine.config import ModelConfig
from ..engine.hf import load_weights, read_config, save_hf
from ..engine.induction import lay_induction
from ..engine.model import Model
from ..engine.reference import Reference
from ..engine.scorer import Scorer
from ..engine.shard import ShardedModel
from ..engine.tokenizer import Tokenizer
from ..rewards.hierarchical import HierarchicalReward
from ..rollout.grammar import GRAMMARS
from .run import Run


@dataclass(frozen=True)
class Policy:
    """Sharded weights, their shape and their tokenizer."""

    model: ShardedModel
    config: ModelConfig
    tokenizer: Tokenizer


def create_policy(run: Run, tokenizer: Tokenizer) -> Policy:
    """Random weights of the configured shape, the same on every rank.

    Raises:
        UserError: the vocabulary does not fit the model.
    """
    config = run.config.model
    tokenizer.check_fits(config)
    if config.initialization == "induction":  # of a small model: it is made whole
        model = Model(config)
        model.init_weights(run.config.run.seed)
        # An answer repeats what was printed, and both follow their tag.
        names = dict.fromkeys(name for g in GRAMMARS.values() for name in (g.answer, g.result) if name)
        ids = [token for name in names if (token := tokenizer.token_id(f"<{name}>")) is not None]
        lay_induction(model, run.config.run.seed, [ids])
        return Policy(_shard(run, model), config, tokenizer)
    model = _without_weights(config)
    weights = model.initial_weights(run.config.run.seed)
    sharded = _shard(run, model)
    sharded.fill(weights)
    return Policy(sharded, config, tokenizer)


def load_policy(run: Run, folder: Path) -> Policy:
    """Reads a Hugging Face folder with its tokenizer.

    Raises:
        UserError: a file or tensor is missing, has another shape, or the vocabulary does not fit.
    """
    tokenizer, config = Tokenizer.from_folder(folder), read_config(folder)
    tokenizer.check_fits(config)
    sharded = _shard(run, _without_weights(config))
    load_weights(sharded, folder)
    return Policy(sharded, config, tokenizer)


def load_scorer(run: Run, folder: Path, *, new_head: bool = False) -> Policy:
    """Reads a Hugging Face folder as a model that judges steps, to be trained.

    Args:
        new_head: the folder is a policy's, and the head starts at 0.

    Raises:
        UserError: a file or tensor is missing, has another shape, or the vocabulary does not fit.
    """
    tokenizer, config = Tokenizer.from_folder(folder), read_config(folder)
    tokenizer.check_fits(config)
    with torch.device("meta"):
        scorer = Scorer(config)
    sharded = _shard(run, scorer)
    load_weights(sharded, folder, zeros=("score.weight",) if new_head else ())
    return Policy(sharded, config, tokenizer)


def load_hierarchical_reward(run: Run, folder: Path) -> HierarchicalReward:
    """Reads what ``recipes.hrm`` wrote, frozen.

    Raises:
        UserError: a file or tensor is missing or has another shape.
    """
    settings = run.config.optimizer
    return HierarchicalReward(
        folder,
        run.mesh,
        tokens_per_microbatch=settings.tokens_per_microbatch,
        dtype=compute_dtype(run),
        offload=settings.offload != "none",
    )


def load_reference(run: Run, folder: Path) -> Reference:
    """Reads a Hugging Face folder as a frozen reference.

    Raises:
        UserError: a file or tensor is missing or has another shape.
    """
    model = _without_weights(read_config(folder))
    reference = Reference(model, run.mesh, compute_dtype(run), offload=run.config.optimizer.offload != "none")
    load_weights(reference.sharded, folder)
    return reference


def save_policy(run: Run, policy: Policy, folder: Path) -> None:
    """Writes a folder that ``load_policy`` and transformers read; every rank calls it."""
    save_hf(policy.model, folder)
    if run.is_main:
        policy.tokenizer.save(folder)
    run.mesh.barrier()


def compute_dtype(run: Run) -> torch.dtype:
    """Type of the gathered weights: as configured, else bfloat16 on CUDA and float32 on a CPU."""
    name = run.config.optimizer.compute_dtype
    if name == "auto":
        name = "bfloat16" if run.mesh.device.type == "cuda" else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def _without_weights(config: ModelConfig) -> Model:
    """A model whose shards are filled later, so that no rank ever holds it whole."""
    with torch.device("meta"):
        return Model(config)


def _shard(run: Run, model: Model | Scorer) -> ShardedModel:
    settings, dtype = run.config.optimizer, compute_dtype(run)
    return ShardedModel(
        model,
        run.mesh,
        compute_dtype=dtype,
        reduce_dtype=torch.float32 if settings.reduce_dtype == "float32" else dtype,
        reshard_after_forward=settings.reshard_after_forward,
        activation_checkpointing=settings.activation_checkpointing == "block",
        offload=settings.offload == "all",
    )
