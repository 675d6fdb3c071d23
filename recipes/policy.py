"""The model that a recipe trains or runs, with its tokenizer: made, read, written."""

from dataclasses import dataclass
from pathlib import Path

import torch

from ..engine.config import ModelConfig
from ..engine.hf import load_hf, save_hf
from ..engine.induction import lay_induction
from ..engine.model import Model
from ..engine.shard import ShardedModel
from ..engine.tokenizer import Tokenizer
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
    tokenizer.check_fits(run.config.model)
    model = Model(run.config.model)
    model.init_weights(run.config.run.seed)
    if run.config.model.initialization == "induction":
        # An answer repeats what was printed, and both follow their tag.
        names = dict.fromkeys(name for g in GRAMMARS.values() for name in (g.answer, g.result) if name)
        ids = [token for name in names if (token := tokenizer.token_id(f"<{name}>")) is not None]
        lay_induction(model, run.config.run.seed, [ids])
    return _shard(run, model, tokenizer)


def load_policy(run: Run, folder: Path) -> Policy:
    """Reads a Hugging Face folder with its tokenizer.

    Raises:
        UserError: a file or tensor is missing, has another shape, or the vocabulary does not fit.
    """
    tokenizer = Tokenizer.from_folder(folder)
    model = load_hf(folder)
    tokenizer.check_fits(model.config)
    return _shard(run, model, tokenizer)


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


def _shard(run: Run, model: Model, tokenizer: Tokenizer) -> Policy:
    sharded = ShardedModel(
        model.to(run.mesh.device),
        run.mesh,
        compute_dtype=compute_dtype(run),
        reshard_after_forward=run.config.optimizer.reshard_after_forward,
    )
    return Policy(sharded, model.config, tokenizer)
