"""The frozen policy that the KL term is measured against: the sharded blocks, without gradients or moments."""

import torch
from torch import nn

from .batch import Batch
from .mesh import Mesh
from .shard import ShardedModel


class Reference:
    """A frozen sharded copy that gives log-probabilities and nothing else.

    Args:
        model: a model of its own (its parameters are taken over), with the weights to freeze or, if
            :meth:`load_from` follows, with any.
        mesh: the ranks.
        dtype: of the shards, of what is gathered, and so of the arithmetic: the policy's compute dtype.
        offload: the shards live in the host's memory.
    """

    def __init__(self, model: nn.Module, mesh: Mesh, dtype: torch.dtype = torch.float32, offload: bool = False) -> None:
        self.sharded = ShardedModel(model, mesh, compute_dtype=dtype, trainable=False, offload=offload)

    def logprobs(self, batch: Batch, temperature: float = 1.0) -> torch.Tensor:
        """Log-probability of each target of a packed batch: [T] float32; every rank must call it."""
        return self.sharded.logprobs(batch, temperature)

    @torch.no_grad()
    def load_from(self, policy: ShardedModel) -> None:
        """Freeze the policy's weights of this moment, shard by shard; nothing travels.

        Raises:
            ValueError: the policy has other parameters.
        """
        for own, theirs in zip(self.sharded.shards, policy.shards, strict=True):
            if own.slots != theirs.slots:
                raise ValueError(f"unit {own.name!r} of the reference has other parameters than the policy's.")
            own.data.copy_(theirs.data)
