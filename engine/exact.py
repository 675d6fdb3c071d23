"""The exact mode: log-probabilities of the sampler and of the trainer equal to the last bit.

Both run the same operations, and of each a row's result must not depend on the rows beside it, on its place, or on how
many there are. On CUDA all of them are Triton's, linear maps too; in float32 on a CPU they are those of the libraries.
Batches are filled up to a multiple of ``ROWS`` on both sides: a few rows are summed in another order by the libraries,
and the end of an array that fills no vector is computed by other instructions. Attention takes the exact form. Whether
that is enough is a matter of libraries, compilers and devices, so it is tried on the machine, with the model's sizes.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..kernels import apply_rotary, grouped_logprob, linear, rms_norm, silu_mul, write_rotated
from ..kernels.dispatch import MAX_HEAD_SIZE, exact_attention_by, exact_forms
from ..kernels.exact_attention import exact_packed_attention, exact_paged_attention
from .errors import UserError
from .model import Linear, Model

ROWS = 64  # recipes fill their batches up to a multiple of it in any mode: that of ``kernels.linear``
TRIED_ROWS = 5 * ROWS


def check_exact(model: Model) -> None:
    """Try every operation of the exact mode with the model's sizes.

    Raises:
        UserError: the mode is not for the model's dtype and device, or an operation does not keep the bits of a row.
    """
    weight, head = model.output_weight, model.config.head_size
    if not exact_attention_by(weight.device.type, weight.dtype, head):
        raise UserError(
            "the exact mode is for float32 on a CPU, and for bf16, float16 and float32 with heads of at most "
            f"{MAX_HEAD_SIZE} on CUDA with Triton, and the model is {weight.dtype} with heads of {head} on "
            f"{weight.device}; turn it off or change the model's dtype and device"
        )
    with torch.no_grad(), exact_forms(weight.device.type):
        for name, run, inputs in _operations(model):
            whole = run(*(x.clone() for x in inputs))  # SwiGLU may overwrite its own
            for first in (0, ROWS, TRIED_ROWS - ROWS):
                rows = slice(first, first + ROWS)
                if not torch.equal(run(*(x[rows].clone() for x in inputs)), whole[rows]):
                    raise UserError(
                        f"{name} gives a row other bits among {ROWS} rows than among {TRIED_ROWS}, so "
                        "this machine allows no exact mode; turn it off"
                    )
        _try_attention(model)
        _try_cache(model)


def _normal(model: Model) -> Callable[..., Tensor]:
    """What makes random tensors in the model's dtype, on its device."""
    like = model.output_weight
    generator = torch.Generator(like.device).manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator, device=like.device, dtype=like.dtype)


def _operations(model: Model) -> list[tuple[str, Callable[..., Tensor], list[Tensor]]]:
    """Name, function of tensors of rows, and such tensors."""
    config, normal = model.config, _normal(model)
    hidden, head = config.hidden_size, config.head_size
    maps = {
        (*module.weight.shape, module.bias is not None) for module in model.layers.modules() if type(module) is Linear
    }
    operations: list[tuple[str, Callable[..., Tensor], list[Tensor]]] = []
    for out, size, has_bias in sorted(maps):
        weight, bias = normal(out, size), normal(out)
        operations.append((
            f"a linear map from {size} to {out}",
            lambda x, weight=weight, bias=bias if has_bias else None: linear(x, weight, bias),
            [normal(TRIED_ROWS, size)],
        ))  # fmt: skip
    weight = normal(config.vocab_size, hidden).mul_(hidden**-0.5)
    targets = torch.arange(TRIED_ROWS, device=weight.device) * 7919 % config.vocab_size
    gain = torch.ones_like(weight[0])
    rotary = model.model.rotary
    return [
        *operations,
        (f"the norm of {hidden}", lambda x: rms_norm(x, gain, config.rms_norm_eps), [normal(TRIED_ROWS, hidden)]),
        (
            f"SwiGLU of {config.intermediate_size}",
            silu_mul,
            [normal(TRIED_ROWS, config.intermediate_size) for _ in range(2)],
        ),
        (
            f"rotation of heads of {head}",
            lambda q, positions: apply_rotary(q, q.clone(), *rotary.angles(positions, q.dtype))[0],
            [normal(TRIED_ROWS, config.num_attention_heads, head), torch.arange(TRIED_ROWS, device=weight.device)],
        ),
        (
            f"the log-probability of {config.vocab_size} words",
            lambda x, target: grouped_logprob(x, weight, target)[0],
            [normal(TRIED_ROWS, hidden), targets],
        ),
    ]


def _attention_inputs(model: Model) -> tuple[Tensor, Tensor, Tensor]:
    config, normal = model.config, _normal(model)
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    q, k, v = (normal(TRIED_ROWS, count, config.head_size) for count in heads)
    return q, k, v


def _try_attention(model: Model) -> None:
    """A sequence at once beside each of its tokens alone, and beside several in one step."""
    q, k, v = _attention_inputs(model)
    index = partial(torch.tensor, dtype=torch.int32, device=q.device)
    whole = exact_packed_attention(q, k, v, index([0, TRIED_ROWS]), TRIED_ROWS)
    for positions in (*([position] for position in range(0, TRIED_ROWS, 37)), list(range(0, TRIED_ROWS, 11))):
        count = len(positions)
        tables, contexts = index([[0]] * count), index(positions) + 1
        alone = exact_paged_attention(q[positions], k[None], v[None], tables, contexts, index(range(count + 1)), 1)
        if not torch.equal(alone, whole[positions]):
            raise UserError(
                f"attention of {q.shape[1]} heads of {q.shape[2]} gives a token other bits alone than in its "
                "sequence, so this machine allows no exact mode; turn it off"
            )


def _try_cache(model: Model) -> None:
    """Queries and keys as the trainer turns them beside those that are turned on their way into a cache."""
    q, k, v = _attention_inputs(model)
    cos, sin = model.model.rotary.angles(torch.arange(len(q), device=q.device), q.dtype)
    k_cache, v_cache = torch.zeros_like(k)[None], torch.zeros_like(v)[None]
    slots = torch.arange(len(q), device=q.device)
    stored = write_rotated(q.clone(), k.clone(), v, cos, sin, k_cache, v_cache, slots), k_cache[0], v_cache[0]
    if not all(map(torch.equal, stored, (*apply_rotary(q, k, cos, sin), v))):
        raise UserError(
            f"rotation of heads of {q.shape[2]} into a cache gives other bits than by itself, so this machine allows "
            "no exact mode; turn it off"
        )
