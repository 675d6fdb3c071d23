"""Drawing a token of each row beside softmax and multinomial, beside a sort for top_p, and beside a copy of the logits.

    python -m groupwise.bench.sampling [--shapes 64x151936] [--out FILE]

A shape is rows x vocabulary; logits are bfloat16 on a GPU, float32 on a CPU. ``draw`` keeps all tokens, ``top_p`` and
``top_k`` some, and ``greedy`` takes the most likely. ``speedup`` is the time of plain PyTorch, which sorts where tokens
are left out, over ours; ``share_of_limit`` is the time of one copy that moves as many bytes as the logits take, timed
in the same run, over ours.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from groupwise.bench import common
from groupwise.kernels import implementation, sample_tokens

GPU_SHAPES = [(1, 151936), (16, 151936), (64, 151936), (256, 151936), (1024, 32768)]
CPU_SHAPES = [(64, 8192), (16, 151936)]
# temperature, top_k, top_p, min_p
KINDS = {
    "draw": (0.9, 0, 1.0, 0.0),
    "top_p": (0.9, 0, 0.9, 0.0),
    "top_k": (0.9, 50, 1.0, 0.0),
    "greedy": (0.0, 0, 1.0, 0.0),
}
FLOPS_A_LOGIT = 40  # a division, two logarithms, an exponential and a hash: about so many


def plain(logits: Tensor, temperature: float, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """A token of each row and its log-probability, with the same settings for all rows."""
    if temperature == 0:
        logprobs, tokens = torch.log_softmax(logits.float(), 1).max(1)
        return tokens, logprobs
    logprobs = torch.log_softmax(logits.float() / temperature, 1)
    chances = logprobs.exp()
    if top_k or top_p < 1:
        chances, order = chances.sort(dim=1, descending=True)
        if top_k:
            chances[:, top_k:] = 0
        if top_p < 1:
            chances.masked_fill_(chances.cumsum(1) - chances >= top_p * chances.sum(1, keepdim=True), 0)
        tokens = order.gather(1, torch.multinomial(chances, 1))
    else:
        tokens = torch.multinomial(chances, 1)
    return tokens[:, 0], logprobs.gather(1, tokens)[:, 0]


def make_inputs(kind: str, shape: tuple[int, ...], device: str, seed: int) -> tuple[Tensor, ...]:
    """What sample_tokens takes, and bytes to copy."""
    rows, vocabulary = shape
    generator = torch.Generator(device).manual_seed(seed)
    logits = torch.randn(rows, vocabulary, generator=generator, device=device) * 3
    logits = logits.bfloat16() if device == "cuda" else logits
    keys = torch.randint(2**62, (rows,), generator=generator, device=device)
    dtypes = (torch.float32, torch.int32, torch.float32, torch.float32)
    settings = [
        torch.full((rows,), value, dtype=dtype, device=device) for value, dtype in zip(KINDS[kind], dtypes, strict=True)
    ]
    positions = torch.arange(rows, device=device)
    return logits, keys, positions, *settings, torch.empty(logits.nbytes // 2, dtype=torch.uint8, device=device)


def check(kind: str, inputs: tuple[Tensor, ...]) -> None:
    """Stop unless the log-probabilities and the mass of what is kept are right, and two runs draw the same."""
    first, again = (sample_tokens(*inputs[:-1]) for _ in range(2))
    if not all(torch.equal(a, b) for a, b in zip(first, again, strict=True)):
        sys.exit(f"sampling: {kind} draws something else in a second run")
    temperature, top_k, top_p, _ = KINDS[kind]
    exact = torch.log_softmax(inputs[0].double() / (temperature or 1.0), 1)
    wrong = (first.logprobs - exact.gather(1, first.tokens[:, None])[:, 0]).abs().max()
    if not wrong <= 2e-5:
        sys.exit(f"sampling: logprobs of {kind} are wrong by {wrong:.2e}; 2e-5 is allowed")
    if kind == "greedy":
        return
    chances = exact.exp()
    ordered = chances.sort(dim=1, descending=True).values
    last = (
        (ordered.cumsum(1) < top_p).sum(1) if top_p < 1 else torch.full_like(first.tokens, (top_k or len(exact[0])) - 1)
    )
    # Equals of the last that is kept are kept too. Which one is the last is a matter of rounding.
    kept = torch.where(chances >= ordered.gather(1, last[:, None]), chances, 0.0).sum(1)
    wrong = ((first.logprobs - first.sampling_logprobs).double().exp() - kept).abs().max()
    if not wrong <= 1e-3:
        sys.exit(f"sampling: {kind} keeps a mass that is wrong by {wrong:.2e}; 1e-3 is allowed")


def measure(kind: str, shape: tuple[int, ...], args: Any) -> common.Row:
    inputs = [make_inputs(kind, shape, args.device, seed) for seed in range(4)]
    check(kind, inputs[0])
    temperature, top_k, top_p, _ = KINDS[kind]
    contenders: dict[str, Callable[..., Any]] = {
        "ours": lambda *x: sample_tokens(*x[:-1]),
        "copy": lambda *x: x[-1].clone(),  # between the two, so that neither finds the other's in a cache
        "plain": lambda *x: plain(x[0], temperature, top_k, top_p),
    }
    times = common.in_turns(contenders, inputs, args.repeats)
    return {
        "kind": kind,
        "shape": "x".join(map(str, shape)),
        "ours_ms": times["ours"],
        "plain_ms": times["plain"],
        "copy_ms": times["copy"],
        "share_of_limit": times["copy"] / times["ours"],
        "speedup": times["plain"] / times["ours"],
        "flops_per_byte": FLOPS_A_LOGIT / inputs[0][0].element_size(),
    }


def main() -> None:
    args = common.arguments(__doc__)
    shapes = common.parse_shapes(args.shapes, GPU_SHAPES if args.device == "cuda" else CPU_SHAPES)
    print(f"sample_tokens is served by {implementation(args.device, 'sample_tokens')}")
    common.report("sampling", [measure(kind, shape, args) for shape in shapes for kind in KINDS], args)


if __name__ == "__main__":
    main()
