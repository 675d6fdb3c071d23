"""The exact mode: log-probabilities of the sampler and of the trainer equal to the last bit, in float32 on a CPU.

Both run the same operations, and of each a row's result must not depend on the rows beside it, on its place, or on how
many there are. Batches are filled up to a multiple of ``ROWS`` on both sides: a few rows are summed in another order by
the libraries, and the end of an array that fills no vector is computed by other instructions. Attention takes the exact
form. Whether that is enough is the libraries' matter, so it is tried on the machine, with the sizes of the model.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels import apply_rotary, grouped_logprob, linear, rms_norm, silu_mul
from ..kernels.exact_attention import exact_packed_attention, exact_paged_attention
from .errors import UserError
from .model import Linear, Model

ROWS = 64  # recipes fill their batches up to a multiple of it in any mode: that of ``kernels.linear``
TRIED_ROWS = 5 * ROWS


def check_exact(model: Model) -> None:
    """Try every operation of the exact mode with the model's sizes.

    Raises:
        UserError: the model is not float32 on a CPU, or an operation does not keep the bits of a row.
    """
    weight = model.output_weight
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        raise UserError(
            f"the exact mode is for float32 on a CPU, and the model is {weight.dtype} on {weight.device}; "
            "turn it off or change the model's dtype and device"
        )
    with torch.no_grad():
        for name, run, inputs in _operations(model):
            whole = run(*(x.clone() for x in inputs))  # SwiGLU may overwrite its own
            for first in (0, ROWS, TRIED_ROWS - ROWS):
                rows = slice(first, first + ROWS)
                if not torch.equal(run(*(x[rows].clone() for x in inputs)), whole[rows]):
                    raise UserError(
                        f"{name} gives a row other bits among {ROWS} rows than among {TRIED_ROWS}, so the libraries of "
                        "this machine allow no exact mode; turn it off"
                    )
        _try_attention(model)


def _operations(model: Model) -> list[tuple[str, Callable[..., Tensor], list[Tensor]]]:
    """Name, function of tensors of rows, and such tensors."""
    config, generator = model.config, torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(TRIED_ROWS, *shape, generator=generator)

    hidden, head = config.hidden_size, config.head_size
    maps = {
        (*module.weight.shape, module.bias is not None) for module in model.layers.modules() if type(module) is Linear
    }
    operations: list[tuple[str, Callable[..., Tensor], list[Tensor]]] = []
    for out, size, has_bias in sorted(maps):
        weight, bias = torch.randn(out, size, generator=generator), torch.randn(out, generator=generator)
        operations.append((
            f"a linear map from {size} to {out}",
            lambda x, weight=weight, bias=bias if has_bias else None: linear(x, weight, bias),
            [normal(size)],
        ))  # fmt: skip
    weight = torch.randn(config.vocab_size, hidden, generator=generator) * hidden**-0.5
    targets = torch.randint(config.vocab_size, (TRIED_ROWS,), generator=generator)
    return [
        *operations,
        (f"the norm of {hidden}", lambda x: rms_norm(x, torch.ones(hidden), config.rms_norm_eps), [normal(hidden)]),
        (f"SwiGLU of {config.intermediate_size}", silu_mul, [normal(config.intermediate_size) for _ in range(2)]),
        (
            f"rotation of heads of {head}",
            lambda q, positions: apply_rotary(q, q, *model.model.rotary.angles(positions, q.dtype))[0],
            [normal(config.num_attention_heads, head), torch.arange(TRIED_ROWS)],
        ),
        (
            f"the log-probability of {config.vocab_size} words",
            lambda x, target: grouped_logprob(x, weight, target)[0],
            [normal(hidden), targets],
        ),
    ]


def _try_attention(model: Model) -> None:
    """A sequence at once beside each of its tokens alone, and beside several in one step."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    q, k, v = (torch.randn(TRIED_ROWS, n, config.head_size, generator=generator) for n in heads)
    whole = exact_packed_attention(q, k, v, torch.tensor([0, TRIED_ROWS], dtype=torch.int32), TRIED_ROWS)
    for positions in (*([position] for position in range(0, TRIED_ROWS, 37)), list(range(0, TRIED_ROWS, 11))):
        count = len(positions)
        bounds, contexts = torch.arange(count + 1, dtype=torch.int32), torch.tensor(positions, dtype=torch.int32) + 1
        tables = torch.zeros(count, 1, dtype=torch.int32)
        alone = exact_paged_attention(q[positions], k[None], v[None], tables, contexts, bounds, 1)
        if not torch.equal(alone, whole[positions]):
            raise UserError(
                f"attention of {heads[0]} heads of {config.head_size} gives a token other bits alone than in its "
                "sequence, so the libraries of this machine allow no exact mode; turn it off"
            )
