"""Attention to a paged cache by every implementation that the machine has: decoding, and prefill behind a prefix.

    python -m groupwise.bench.paged_attention [--shapes 12x2x128] [--out FILE]

A shape is query heads x key heads x head size: those of Qwen2.5-1.5B, 7B and 14B on a GPU, bf16; small float32 ones on
a CPU. Rows decode ``alone``, or as the samples of some prompts whose blocks they share (``shared``) or have each to
themselves (``copied``); in ``prefill`` a chunk of new tokens stands behind what is cached. ``plan`` is what the sampler
decodes with; ``sdpa`` is PyTorch's attention over the same keys, laid out flat and padded before the clock starts. The
libraries take blocks of 256 tokens, all others of 16.

``share_of_limit`` of a decoding step is the time of one copy that moves as many bytes as it has keys and values to
read, a shared one once, over its own; of a prefill, its operations over those of a square matrix product in its time.
``speedup`` is the time of the fastest of the others over this one's. ``saving`` is the share of the bytes that sharing
drops, and ``saved`` that of the time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from groupwise.bench import common
from groupwise.kernels import dispatch, eager, paged_attention
from groupwise.kernels.cascade import CascadeDecode
from groupwise.kernels.decode import DecodePlan

GPU_SHAPES = [(12, 2, 128), (28, 4, 128), (40, 8, 128)]
CPU_SHAPES = [(4, 2, 32), (12, 2, 64)]
PRODUCT = 8192  # rows and columns of the matrices
OP = "paged_attention"
Run = Callable[[], Tensor]


class Stream(NamedTuple):
    """Rows by the prompts that they share: tokens of each prompt, and behind it of each of its rows.

    ``new`` of each row's last tokens are queries.
    """

    prompts: list[tuple[int, list[int]]]
    new: int = 1

    @property
    def lengths(self) -> list[int]:
        return [prompt + own for prompt, rows in self.prompts for own in rows]

    def num_keys(self, shared: bool) -> int:
        """Keys that must be read; those of a prompt once if it is shared."""
        return sum(prompt * (1 if shared else len(rows)) + sum(rows) for prompt, rows in self.prompts)

    @property
    def num_pairs(self) -> int:
        """Pairs of a query and a key that it sees."""
        return sum(self.new * (n - self.new) + self.new * (self.new + 1) // 2 for n in self.lengths)

    def shrunk(self) -> Stream:
        """An eighth of each, for the check."""
        prompts = [(prompt // 8, [own // 8 + 1 for own in rows]) for prompt, rows in self.prompts[:4]]
        return Stream(prompts, self.new // 8 + 1 if self.new > 1 else 1)


def spread(least: int, most: int, count: int) -> list[int]:
    return np.linspace(least, most, count).astype(int).tolist()


GPU_STREAMS = {
    "alone": Stream([(0, [n]) for n in spread(256, 4096, 64)]),
    "group": Stream([(1024, spread(64 + i, 1024, 16)) for i in range(8)]),
    "prefill": Stream([(0, [n]) for n in spread(512, 4096, 16)], 512),
}
CPU_STREAMS = {
    "alone": Stream([(0, [n]) for n in spread(16, 256, 32)]),
    "group": Stream([(128, spread(8 + i, 96, 8)) for i in range(4)]),
    "prefill": Stream([(0, [n]) for n in spread(64, 256, 8)], 64),
}


class Step(NamedTuple):
    """What an implementation is given."""

    q: Tensor
    caches: tuple[Tensor, Tensor]
    tables: NDArray[np.int32]
    lengths: NDArray[np.int64]
    new: int

    def arguments(self) -> tuple[Any, ...]:
        """Of paged_attention, behind the caches."""
        device = self.q.device
        bounds = torch.arange(len(self.lengths) + 1, dtype=torch.int32, device=device) * self.new
        tables, lengths = (torch.from_numpy(x).int().to(device) for x in (self.tables, self.lengths))
        return tables, lengths, bounds, self.new


def make_step(shape: tuple[int, ...], stream: Stream, shared: bool, block_size: int, device: str, seed: int) -> Step:
    """Shuffled blocks; queries, keys and values are the same numbers for every block size and sharing."""
    query_heads, key_heads, size = shape
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(seed)
    lengths = np.array(stream.lengths)
    count, width = len(lengths), int(-(-lengths.max() // block_size))
    q = torch.randn(count * stream.new, query_heads, size, generator=generator, device=device).to(dtype)
    blocks = np.random.default_rng(seed).permutation(count * width).astype(np.int32)
    tables = blocks.reshape(count, width)
    row = 0
    for prompt, rows in stream.prompts:
        if shared:
            tables[row : row + len(rows), : prompt // block_size] = tables[row, : prompt // block_size]
        row += len(rows)
    caches = []
    for _ in range(2):
        source = torch.randn(count * width * block_size, key_heads, size, generator=generator, device=device)
        caches.append(source.to(dtype).view(-1, block_size, key_heads, size))
    return Step(q, (caches[0], caches[1]), tables, lengths, stream.new)


def by_plan(step: Step) -> Run:
    _, block_size, key_heads, size = step.caches[0].shape
    device, (count, width), heads = step.q.device, step.tables.shape, step.q.shape[1]
    plan: DecodePlan | CascadeDecode
    if dispatch.paged_attention_by(device.type, step.q.dtype, size, block_size) == "triton":
        plan = DecodePlan(count, width, block_size, (heads, key_heads), size, step.q.dtype, device)
    else:
        plan = CascadeDecode(block_size, (heads, key_heads), size, device)
    plan.set(step.tables, step.lengths)
    return lambda: plan(step.q, *step.caches)


def by_name(name: str, step: Step) -> Run:
    arguments = step.arguments()

    def run() -> Tensor:
        dispatch.force(OP, name, step.q.device.type)
        return paged_attention(step.q, *step.caches, *arguments)

    return run


def by_sdpa(step: Step) -> Run:
    count, (key_heads, size) = len(step.lengths), step.caches[0].shape[2:]
    tables, lengths, *_ = step.arguments()
    keys, values = (x[tables.long()].view(count, -1, key_heads, size).transpose(1, 2).contiguous() for x in step.caches)
    query = step.q.view(count, step.new, -1, size).transpose(1, 2)
    last = (lengths.long() - step.new)[:, None] + torch.arange(step.new, device=step.q.device)
    mask = (torch.arange(keys.shape[2], device=step.q.device) <= last[:, :, None])[:, None]

    def run() -> Tensor:
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)
        return out.transpose(1, 2).reshape(step.q.shape)

    return run


def forms(stream: Stream, device: str) -> dict[str, tuple[Callable[[Step], Run], int]]:
    """What runs here, each with the block size that it is given."""
    names = dispatch.available(device, OP)
    found: dict[str, tuple[Callable[[Step], Run], int]] = {} if stream.new > 1 else {"plan": (by_plan, 16)}
    found |= {name: (partial(by_name, name), 256 if name in dispatch.LIBRARIES else 16) for name in names}
    return found | {"sdpa": (by_sdpa, 16)}


def check(name: str, form: Callable[[Step], Run], step: Step) -> None:
    """Stop unless the error against float64 is at most 1.5 times that of the eager form in the same precision."""
    keys, values = step.caches
    exact, naive = (
        eager.paged_attention(step.q.to(dtype), keys.to(dtype), values.to(dtype), *step.arguments()).double()
        for dtype in (torch.float64, step.q.dtype)
    )
    error, bound = (float((x.double() - exact).norm() / exact.norm()) for x in (form(step)(), naive))
    if not error <= 1.5 * bound + 2e-6:
        sys.exit(f"paged_attention: {name} is wrong by {error:.2e}; {1.5 * bound + 2e-6:.2e} is allowed")


def measure(title: str, stream: Stream, shape: tuple[int, ...], args: Any) -> list[common.Row]:
    """Rows of every form, in turns; a group's with its prompt shared and copied."""
    device, decoding = args.device, stream.new == 1
    ways = {"shared": True, "copied": False} if title == "group" else {title: False}
    contenders = {
        (way, name): (form, block_size, shared)
        for way, shared in ways.items()
        for name, (form, block_size) in forms(stream, device).items()
        if shared or way != "shared"
    }
    for (way, name), (form, block_size, shared) in contenders.items():
        check(f"{name} ({way})", form, make_step(shape, stream.shrunk(), shared, block_size, device, 0))
    dtype_bytes = 2 if device == "cuda" else 4
    moved = {way: 2 * stream.num_keys(shared) * shape[1] * shape[2] * dtype_bytes for way, shared in ways.items()}
    limits: dict[Any, Callable[..., Any]] = {
        (way, "limit"): lambda spare, *_, way=way: spare[: moved[way] // 2].clone() for way in ways
    }
    on_gpu = device == "cuda"
    square = torch.randn((PRODUCT if on_gpu else 1024,) * 2, device=device)
    square = square.to(torch.bfloat16) if on_gpu else square
    if not decoding:
        limits = {(title, "limit"): lambda spare, square, _: square @ square}
    inputs = [
        (
            torch.empty(max(moved.values()) // 2, dtype=torch.uint8, device=device),
            square,
            {
                label: form(make_step(shape, stream, shared, block_size, device, seed))
                for label, (form, block_size, shared) in contenders.items()
            },
        )
        for seed in range(2)
    ]
    runs: dict[Any, Callable[..., Any]] = {label: lambda _, __, own, label=label: own[label]() for label in contenders}
    times: dict[Any, float] = common.in_turns(runs | limits, inputs, args.repeats)
    rows = []
    flops = 4 * stream.num_pairs * shape[0] * shape[2]
    for way, name in contenders:
        spent, limit = times[way, name], times[way, "limit"]
        if not decoding:
            limit *= flops / (2 * len(square) ** 3)
        copied = moved.get("copied")
        rows.append(
            {
                "heads": "x".join(map(str, shape)),
                "stream": way,
                "rows": len(stream.lengths),
                "name": name,
                "ours_ms": spent,
                "share_of_limit": limit / spent,
                "speedup": min(times[way, other] for w, other in contenders if w == way and other != name) / spent,
                "saving": 1 - moved[way] / copied if way == "shared" and copied else None,
                "saved": 1 - spent / times["copied", name] if way == "shared" else None,
                "flops_per_byte": flops / moved[way],
            }
        )
    return rows


def main() -> None:
    args = common.arguments(__doc__)
    on_gpu = args.device == "cuda"
    shapes = common.parse_shapes(args.shapes, GPU_SHAPES if on_gpu else CPU_SHAPES)
    print(f"paged_attention on {args.device}: {', '.join(dispatch.available(args.device, OP))}")
    streams = GPU_STREAMS if on_gpu else CPU_STREAMS
    try:
        rows = [row for shape in shapes for title, each in streams.items() for row in measure(title, each, shape, args)]
    finally:
        dispatch.force(OP, "auto", args.device)
    common.report("paged_attention", rows, args)


if __name__ == "__main__":
    main()
