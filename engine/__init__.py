"""One model on many ranks: configuration, decoder, sharding, reference, optimiser, checkpoints, objective."""

from .checkpoint import load_checkpoint, save_checkpoint
from .config import Config, load_config
from .errors import UserError
from .hf import load_hf, load_weights, read_config, save_hf
from .mesh import Mesh
from .model import Model
from .optim import AdamW
from .reference import Reference
from .saver import Saver
from .shard import ShardedModel
from .tokenizer import Tokenizer

__all__ = [
    "AdamW",
    "Config",
    "Mesh",
    "Model",
    "Reference",
    "Saver",
    "ShardedModel",
    "Tokenizer",
    "UserError",
    "load_checkpoint",
    "load_config",
    "load_hf",
    "load_weights",
    "read_config",
    "save_checkpoint",
    "save_hf",
]
