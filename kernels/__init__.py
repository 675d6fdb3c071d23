"""One file a kernel; ``eager`` is the oracle of the tests and the path without a GPU."""

from . import eager
from .attention import packed_attention, paged_attention
from .clamped_delta import clamped_delta_loss
from .dispatch import describe, implementation
from .logprob import grouped_logprob

__all__ = [
    "clamped_delta_loss",
    "describe",
    "eager",
    "grouped_logprob",
    "implementation",
    "packed_attention",
    "paged_attention",
]
