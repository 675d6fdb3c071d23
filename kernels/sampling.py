"""Drawing a token of each row on the device: Gumbel-max over the tokens that temperature, top_k, top_p and min_p leave.

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import eager
from .eager_sampling import Drawn


def sample_tokens(
    logits: Tensor,
    keys: Tensor,
    positions: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
) -> Drawn:
    """Draw a token of each row; every setting is a row's own, and on the device, which the host never waits for.

    With x = logits / temperature a token v is kept if it passes, in the order of transformers' warpers:

    * top_k: x_v is at least the top_k-th largest; ties with that one are kept.
    * top_p: those kept so far that are more likely than v have a probability below top_p, renormalised; so ties stay or
      go together, and the most likely stays.
    * min_p: the probability of v is at least min_p times the largest.

    The draw is argmax of x_v - log(E_v) over the kept v (Gumbel-max; Maddison, Tarlow and Minka, arXiv 1411.0030), E_v
    = -log(1 - u_v), u_v = (h_v + 0.5) / 2^32, h_v a 32-bit hash of (key, position, v). So a token depends on the key,
    the position and the row's logits and settings alone: not on the batch, nor on the row's place in it. A token that
    is less likely than 2^-32 of the most likely one is drawn too seldom or never.

    Temperature 0 takes the most likely token, the first of equals; its ``logprobs`` are under softmax(logits), its
    ``sampling_logprobs`` 0. A logit of -inf is never drawn. A row with NaN or +inf, or of -inf alone, has ``logprobs``
    NaN and any token in [0,V), and changes no other row.

    Args:
        logits: [N,V] float32, bfloat16 or float16; computed in float32.
        keys: [N] int64, the names of the rows' random streams, any 64 bits.
        positions: [N] int64, the place in the stream, any 64 bits.
        temperature: [N] float32, divides the logits; 0 or more.
        top_k: [N] int32; 0 keeps all.
        top_p: [N] float32 in (0,1]; 1 keeps all.
        min_p: [N] float32 in [0,1]; 0 keeps all.

    Returns:
        (tokens [N] int64, logprobs [N] float32 under softmax(logits / temperature), sampling_logprobs [N] float32 under
        what was drawn from: the kept tokens' probabilities, renormalised).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    settings = {
        "keys": (keys, torch.int64),
        "positions": (positions, torch.int64),
        "temperature": (temperature, torch.float32),
        "top_k": (top_k, torch.int32),
        "top_p": (top_p, torch.float32),
        "min_p": (min_p, torch.float32),
    }
    _check(logits, settings)
    return eager.sample_tokens(logits, keys, positions, temperature, top_k, top_p, min_p)


def _check(logits: Tensor, settings: dict[str, tuple[Tensor, torch.dtype]]) -> None:
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"sample_tokens: logits have shape {list(logits.shape)}; expected [N,V], V at least 1")
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"sample_tokens: logits are {logits.dtype}; cast them to float32, bfloat16 or float16")
    for name, (tensor, dtype) in settings.items():
        if tensor.shape != logits.shape[:1] or tensor.dtype != dtype or tensor.device != logits.device:
            raise ValueError(
                f"sample_tokens: {name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}; expected {dtype} "
                f"[{len(logits)}] on {logits.device}, as logits have {len(logits)} rows there"
            )
