"""One decoder on packed token streams for the families Qwen2, Qwen3 and Llama 3, and nothing else.

Sequences lie end to end in one stream of tokens, so there is no padding and no batch dimension; what a
token may look at is decided by the attention callable that the caller gives (:class:`PackedAttention` when
training, the sampler's paged one when decoding). Parameter names are Hugging Face's, so that the state
dict is the checkpoint. Sharding and precision are applied from outside.

Legend: T tokens, H hidden, I intermediate, V vocabulary, Hq query heads, Hkv key/value heads, D head size.
"""

import math
from collections.abc import Iterator
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from ..kernels.attention import packed_attention
from ..kernels.linear import linear
from ..kernels.logprob import grouped_logprob
from ..kernels.norm import add_rms_norm, rms_norm
from ..kernels.rotary import apply_rotary
from ..kernels.swiglu import silu_mul
from .config import ModelConfig, RopeScaling


class Attention(Protocol):
    """What a layer calls between its projections: ``(layer, q[T,Hq,D], k[T,Hkv,D], v[T,Hkv,D], cos, sin) -> [T,Hq,D]``.

    Queries and keys come as projected, with the factors [T,1,D] of ``apply_rotary``: a cache turns keys as it
    stores them.
    """

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor: ...


class PackedAttention:
    """Causal attention inside each segment of a packed stream, and to the prompt that a segment goes on behind.

    Args:
        cu_seqlens: [N+1] int32, where each segment begins, and the end of the last.
        max_seqlen: the longest segment, tokens.
        prefix: [N] int32, the segment of each one's shared prompt, -1 for none; None where none has one.
    """

    def __init__(self, cu_seqlens: Tensor, max_seqlen: int, prefix: Tensor | None = None) -> None:
        self.cu_seqlens = cu_seqlens
        self.max_seqlen = max_seqlen
        self.prefix = prefix

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k = apply_rotary(q, k, cos, sin)
        return packed_attention(q, k, v, self.cu_seqlens, self.max_seqlen, self.prefix)


class Linear(nn.Linear):
    """A linear map that leaves initialisation to :meth:`Model.init_weights`."""

    def reset_parameters(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:  # [T,K] -> [T,N]
        return linear(x, self.weight, self.bias)


class Embedding(nn.Embedding):
    """An embedding table that leaves initialisation to :meth:`Model.init_weights`."""

    def reset_parameters(self) -> None:
        pass


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * weight, computed in float32 (Zhang and Sennrich, arXiv 1910.07467, eq. 4)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # [T,H] -> [T,H]
        return rms_norm(x, self.weight, self.eps)

    def after_sum(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # [T,H] twice -> [T,H] twice
        """The norm of x + residual, and that sum."""
        return add_rms_norm(x, residual, self.weight, self.eps)


class Rotary:
    """Rotary position embedding in the half-split layout of Hugging Face's weights (arXiv 2104.09864, eq. 34).

    Channel i of a head is paired with channel i + D/2. Angles come from the configuration alone: no parameter and
    no buffer that a sharded or meta-device model would have to carry.

    Args:
        head_dim: D.
        theta: base of the frequencies.
        scaling: Llama 3's for long contexts, or None.
    """

    def __init__(self, head_dim: int, theta: float, scaling: RopeScaling | None = None) -> None:
        self.head_dim = head_dim
        self.theta = theta
        self.scaling = scaling
        self._signed: dict[torch.device, Tensor] = {}

    def frequencies(self, device: torch.device | str = "cpu") -> Tensor:
        """Radians a token by which each pair of channels turns, [D/2] float32.

        With a scaling, channels that turn less than ``low_freq_factor`` times in the original context are slower by
        ``factor``, those above ``high_freq_factor`` times stay, and those between are blended (Llama 3, arXiv
        2407.21783, as Hugging Face's ``_compute_llama3_parameters`` defines it).
        """
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device) / self.head_dim
        plain = 1.0 / self.theta**exponents
        if self.scaling is None:
            return plain
        low, high = self.scaling.low_freq_factor, self.scaling.high_freq_factor
        turns = self.scaling.original_max_position_embeddings / (2 * math.pi / plain)  # in the original context
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - kept) * plain / self.scaling.factor + kept * plain

    def angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The factors of ``apply_rotary`` for positions [T]: cos and sign-carrying sin, [T,1,D] each."""
        signed = self._signed.get(positions.device)
        if signed is None:
            half = self.frequencies(positions.device)
            # The sign of the sine rides on the frequency: a rotation then needs no negation.
            signed = self._signed[positions.device] = torch.cat((-half, half))
        angle = (positions.to(torch.float32)[:, None] * signed)[:, None, :]
        return angle.cos().to(dtype), angle.sin().to(dtype)


class SelfAttention(nn.Module):
    """Grouped-query attention; Qwen2 has biases on query, key and value, Qwen3 norms over each query and key head."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_size
        queries = config.num_attention_heads * self.head_dim
        keys = config.num_key_value_heads * self.head_dim
        bias, norm = config.model_type == "qwen2", config.model_type == "qwen3"
        self.q_proj = Linear(config.hidden_size, queries, bias=bias)
        self.k_proj = Linear(config.hidden_size, keys, bias=bias)
        self.v_proj = Linear(config.hidden_size, keys, bias=bias)
        self.o_proj = Linear(queries, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if norm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention: Attention) -> Tensor:  # [T,H] -> [T,H]
        heads = (x.shape[0], -1, self.head_dim)
        q = self.q_norm(self.q_proj(x).view(heads))  # [T,Hq,D]
        k = self.k_norm(self.k_proj(x).view(heads))  # [T,Hkv,D]
        v = self.v_proj(x).view(heads)  # [T,Hkv,D]
        return self.o_proj(attention(self.layer, q, k, v, cos, sin).flatten(1))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer, arXiv 2002.05202, eq. 6)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [T,H] -> [T,H]
        return self.down_proj(silu_mul(self.gate_proj(x), self.up_proj(x)))


class Layer(nn.Module):
    """One block: attention, then feed-forward, each on the normalised stream and added to it."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config, layer)
        self.mlp = FeedForward(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention: Attention) -> Tensor:  # [T,H] -> [T,H]
        normalised, x = self.post_attention_layernorm.after_sum(
            self.self_attn(self.input_layernorm(x), cos, sin, attention), x
        )
        return x + self.mlp(normalised)


class Decoder(nn.Module):
    """Embedding, layers and last norm: what Hugging Face names ``model.``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = Rotary(config.head_size, config.rope_theta, config.rope_scaling)

    def forward(self, input_ids: Tensor, positions: Tensor, attention: Attention) -> Tensor:  # [T] -> [T,H]
        x = self.embed_tokens(input_ids)
        cos, sin = self.rotary.angles(positions, x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, attention)
        return self.norm(x)


class Model(nn.Module):
    """A decoder with its output head. Weights start from ``init_weights(0)``, or empty on the meta device.

    Args:
        config: sizes and constants; ``tie_word_embeddings`` makes the embedding serve as the head, and then the
            state dict has no ``lm_head.weight``.
    """

    labels: ClassVar[tuple[str, ...]] = ()  # of a classifier, which this is not

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size, bias=False)
        if not self.model.norm.weight.is_meta:
            self.init_weights(0)

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks, first to last: the units of sharding."""
        return self.model.layers

    @property
    def output_weight(self) -> Tensor:
        """The matrix of the head, [V,H]."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        attention: Attention,
        targets: Tensor | None = None,
        temperature: float = 1.0,
        entropy: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Runs the decoder over a packed stream.

        Args:
            input_ids: [T] int64.
            positions: [T] integers, each token's place in its own sequence.
            attention: which tokens see which; see :class:`Attention`.
            targets: [T] int64, the token to score at each place, -100 for none.
            temperature: divides the logits of the scores.
            entropy: whether the entropy of each place is wanted too.

        Returns:
            Without targets the normalised hidden states [T,H]. With targets ``(logprob[T], entropy[T] or None)`` in
            float32, as ``kernels.grouped_logprob`` defines them.
        """
        hidden = self.model(input_ids, positions, attention)
        if targets is None:
            return hidden
        weight = self.output_weight
        main_grad = getattr(weight, "main_grad", None)  # of engine/unit.py
        return grouped_logprob(hidden, weight, targets, temperature=temperature, entropy=entropy, main_grad=main_grad)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fills every parameter with :meth:`initial_weights`."""
        for name, values in self.initial_weights(seed):
            self.get_parameter(name).copy_(values)

    def initial_weights(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        """Random weights, a whole CPU float32 tensor at a time: the same values for the same seed on every rank.

        Only shapes of the parameters are read, so a model on the meta device, or one whose parameters lie in shards,
        gives them too. Matrices are normal with ``initializer_range``; those that write into the residual stream are
        smaller by sqrt(2 x layers), so that the stream's variance does not grow with depth (GPT-2, Radford et al. 2019,
        2.3). Biases start at 0 and norms at 1.
        """
        generator = torch.Generator().manual_seed(seed)
        residual = 1.0 / math.sqrt(2 * self.config.num_hidden_layers)
        for name, parameter in self.named_parameters():
            values = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
            if parameter.ndim == 1:
                values.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                scale = residual if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                values.normal_(0.0, self.config.initializer_range * scale, generator=generator)
            yield name, values
            del values  # while the next one is made, this one must not stay
