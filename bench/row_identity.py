"""Whether a row's log-probability is the same to the bit in every company: the base of an exact mode.

    python -m groupwise.bench.row_identity [--shapes 1536x151936] [--out FILE]

A shape is hidden x vocabulary. The same rows are computed among different numbers of others, at different places and,
in Triton, by tiles of other sizes; ``differ`` counts rows that are not the same to the bit, ``largest`` is the largest
difference. It tells and judges nothing: a difference is an answer too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from groupwise.bench import common
from groupwise.kernels import grouped_logprob, implementation, tiles
from groupwise.kernels.dispatch import architecture_of

GPU_SHAPES = [(1536, 151936), (3584, 152064)]
CPU_SHAPES = [(64, 512), (64, 20000)]
ROWS = 8192
COUNTS = (1, 4, 64, 127, 1000)
TILE_SIZES = [(rows, columns, depth) for rows in (64, 128) for columns in (16, 64, 128, 256) for depth in (64, 128)]


def compare(what: str, got: Tensor, expected: Tensor) -> common.Row:
    different = got != expected
    return {
        "rows": what,
        "compared": got.numel(),
        "differ": int(different.sum()),
        "largest": (got - expected).abs().max().item(),
    }


def measure(shape: tuple[int, ...], args: Any) -> list[common.Row]:
    hidden_size, vocab = shape
    generator = torch.Generator(args.device).manual_seed(0)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    hidden = torch.randn(ROWS, hidden_size, generator=generator, device=args.device).to(dtype)
    weight = (torch.randn(vocab, hidden_size, generator=generator, device=args.device) * hidden_size**-0.5).to(dtype)
    targets = torch.randint(vocab, (ROWS,), generator=generator, device=args.device)

    def logprob(rows: Any) -> Tensor:
        return grouped_logprob(hidden[rows], weight, targets[rows])[0]

    with torch.no_grad():
        whole = logprob(slice(None))
        rows = [compare(f"first {count} alone", logprob(slice(count)), whole[:count]) for count in COUNTS]
        rows += [
            compare(f"{count} from row 5 on", logprob(slice(5, 5 + count)), whole[5 : 5 + count]) for count in COUNTS
        ]
        order = torch.randperm(ROWS, generator=generator, device=args.device)
        rows.append(compare("all in another order", logprob(order), whole[order]))
        if implementation(args.device, "grouped_logprob") == "triton":
            rows += by_tiles(lambda: logprob(slice(1024)), whole[:1024], hidden.device)
    return [{"H x V": "x".join(map(str, shape)), **row} for row in rows]


def by_tiles(run: Any, expected: Tensor, device: torch.device) -> list[common.Row]:
    """The forward kernel with other tiles; those that do not fit the device are left out."""
    key = ("forward", architecture_of(device))
    usual, rows = tiles.TILES[key], []
    for row, column, depth in TILE_SIZES:
        name = f"tiles {row}x{column}x{depth}"
        tiles.TILES[key] = usual._replace(rows=row, columns=column, depth=depth, num_warps=4, num_stages=2)
        if common.able({name: run}, ()):
            rows.append(compare(name, run(), expected))
    tiles.TILES[key] = usual
    return rows


def main() -> None:
    args = common.arguments(__doc__)
    shapes = common.parse_shapes(args.shapes, GPU_SHAPES if args.device == "cuda" else CPU_SHAPES)
    print(f"grouped_logprob is served by {implementation(args.device, 'grouped_logprob')}")
    common.report("row_identity", [row for shape in shapes for row in measure(shape, args)], args)


if __name__ == "__main__":
    main()
