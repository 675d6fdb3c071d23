"""One file a kernel; ``eager`` is the oracle of the tests and the path without a GPU."""

from . import eager
from .attention import packed_attention
from .clamped_delta import clamped_delta_loss
from .dispatch import describe, implementation
from .linear import linear
from .logprob import grouped_logprob
from .norm import add_rms_norm, rms_norm
from .paged_attention import paged_attention
from .rotary import apply_rotary, write_rotated
from .sampling import Drawn, sample_tokens
from .swiglu import silu_mul

__all__ = [
    "Drawn",
    "add_rms_norm",
    "apply_rotary",
    "clamped_delta_loss",
    "describe",
    "eager",
    "grouped_logprob",
    "implementation",
    "linear",
    "packed_attention",
    "paged_attention",
    "rms_norm",
    "sample_tokens",
    "silu_mul",
    "write_rotated",
]
