"""What a model must compute and read, and how much of it a device can at most: the terms of MFU and MBU.

Counted is what the model asks for, not what an implementation does: no recomputation, no padding, attention as the
causal mask leaves it, and the output head where a loss is.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from .batch import Batch
from .config import ModelConfig


@dataclass(frozen=True)
class Peak:
    """Of a device, by its maker's data sheet: dense bfloat16 operations a second, bytes of its memory a second."""

    flops: float
    bandwidth: float


# By the name that CUDA gives a whole device; what is not here has no MFU rather than a guessed one.
PEAKS = {
    "NVIDIA H200": Peak(989e12, 4.8e12),
    "NVIDIA H100 80GB HBM3": Peak(989e12, 3.35e12),
    "NVIDIA H100 PCIe": Peak(756e12, 2.0e12),
    "NVIDIA A100-SXM4-80GB": Peak(312e12, 2.039e12),
    "NVIDIA A100 80GB PCIe": Peak(312e12, 1.935e12),
    "NVIDIA A100-SXM4-40GB": Peak(312e12, 1.555e12),
}


def peak_of(device: torch.device, dtype: torch.dtype) -> Peak | None:
    """What a device can with weights of a type; None for a device that is not known, and for other types."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    return PEAKS.get(torch.cuda.get_device_name(device))


@dataclass(frozen=True)
class Work:
    """What passes through a model.

    Args:
        tokens: through the layers.
        scored: of them, through the output head.
        pairs: of a query and a key that it sees, itself included.
    """

    tokens: int
    scored: int
    pairs: int


def work_of(batches: Iterable[Batch]) -> Work:
    """What micro-batches ask for: a shared prompt counts once, padding not; scored are the tokens that bear loss.

    It reads the batches from their device, so it waits for what computes there.
    """
    tokens = scored = pairs = 0
    for batch in batches:
        lengths = batch.cu_seqlens.diff().long().cpu()
        live = (batch.sequence_ids[batch.cu_seqlens[:-1].long()] >= 0).cpu()
        before = torch.zeros_like(lengths)  # tokens of the prompt that a segment goes on behind
        if batch.prefix is not None:
            homes = batch.prefix.long().cpu()
            follows = homes >= 0
            before[follows] = lengths[homes[follows]]
            live[homes[follows]] = True
        lengths, before = lengths[live], before[live]
        tokens += int(lengths.sum())
        scored += int((batch.weight != 0).sum())
        pairs += int((lengths * (lengths + 1) // 2 + lengths * before).sum())
    return Work(tokens, scored, pairs)


def forward_flops(config: ModelConfig, work: Work) -> float:
    """Floating-point operations of a forward pass: 2 a token and weight of a product, 4 D a query head and pair.

    Forward and backward take three times as many, so 6 a token and weight. Source: PaLM, arXiv 2204.02311, appendix B
    (which counts every pair of a sequence; here are those that the mask leaves).
    """
    layers = layer_weights(config) * work.tokens
    head = config.vocab_size * config.hidden_size * work.scored
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_size * work.pairs
    return 2.0 * (layers + head) + 4.0 * attention


def layer_weights(config: ModelConfig) -> int:
    """Elements of the matrices of all layers; embedding and head are not among them."""
    channels = (config.num_attention_heads + config.num_key_value_heads) * config.head_size
    return config.num_hidden_layers * config.hidden_size * (2 * channels + 3 * config.intermediate_size)


def decode_weights(config: ModelConfig) -> int:
    """Elements that a decoding step reads, however many sequences it serves: all layers and the head."""
    return layer_weights(config) + config.vocab_size * config.hidden_size
