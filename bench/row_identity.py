"""Whether a row is the same to the bit in every company, of each operation that sums: the base of the exact mode.

    python -m groupwise.bench.row_identity [--shapes 1536x151936x12x2] [--out FILE]

A shape is hidden x vocabulary x query heads x key heads, heads of 64 on a CPU and of 128 on a GPU. Log-probabilities,
and the linear map and the attention of the exact mode, are computed of the same rows among different numbers of others,
at different places and, in Triton, by tiles of other sizes. ``differ`` counts numbers that are not the same to the bit,
``largest`` is the largest difference. It tells and judges nothing: a difference is an answer too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from groupwise.bench import common
from groupwise.kernels import dispatch, exact_attention, grouped_logprob, linear, tiles
from groupwise.kernels.exact_attention import exact_packed_attention, exact_paged_attention
from groupwise.kernels.product import FEW_ROWS

GPU_SHAPES = [(1536, 151936, 12, 2), (3584, 152064, 28, 4)]
CPU_SHAPES = [(64, 512, 6, 2), (64, 20000, 4, 4)]
ROWS = 8192
COUNTS = (1, 4, 64, 127, 1000)
TILE_SIZES = [(rows, columns, depth) for rows in (64, 128) for columns in (16, 64, 128, 256) for depth in (64, 128)]
ATTENTION_ROWS = (64, 128)
PROMPT, BLOCK = 300, 16  # tokens
Run = Callable[[Any], Tensor]  # of chosen rows


def compare(what: str, got: Tensor, expected: Tensor) -> common.Row:
    different = got != expected
    return {
        "rows": what,
        "compared": got.numel(),
        "differ": int(different.sum()),
        "largest": (got - expected).abs().max().item(),
    }


def measure(shape: tuple[int, ...], args: Any) -> list[common.Row]:
    hidden_size, vocab, heads, key_heads = shape
    generator = torch.Generator(args.device).manual_seed(0)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=args.device).to(dtype)

    hidden, head, weight = normal(ROWS, hidden_size), normal(vocab, hidden_size), normal(hidden_size, hidden_size)
    head *= hidden_size**-0.5
    targets = torch.randint(vocab, (ROWS,), generator=generator, device=args.device)
    order = torch.randperm(ROWS, generator=generator, device=args.device)
    tokens, size = (4096, 128) if args.device == "cuda" else (1024, 64)
    tensors = [normal(tokens, count, size) for count in (heads, key_heads, key_heads)]
    with torch.no_grad(), dispatch.exact_forms(args.device):
        found = {
            "log-probability": by_company(lambda rows: grouped_logprob(hidden[rows], head, targets[rows])[0], order),
            "linear map": by_company(lambda rows: linear(hidden[rows], weight), order),
            "attention": by_step(*tensors),
        }
        if args.device == "cuda":
            few, some = slice(FEW_ROWS), slice(4 * FEW_ROWS)
            score = lambda: grouped_logprob(hidden[some], head, targets[some])[0]  # noqa: E731
            found["log-probability"] += by_tiles("forward", score, score(), hidden.device)
            found["linear map"] += by_tiles(
                "few rows", lambda: linear(hidden[few], weight), linear(hidden, weight)[few], hidden.device
            )
    return [
        {"H x V x Hq x Hkv": "x".join(map(str, shape)), "of": what, **row}
        for what, rows in found.items()
        for row in rows
    ]


def by_company(run: Run, order: Tensor) -> list[common.Row]:
    whole = run(slice(None))
    rows = [compare(f"first {count} alone", run(slice(count)), whole[:count]) for count in COUNTS]
    rows += [compare(f"{count} from row 5 on", run(slice(5, 5 + count)), whole[5 : 5 + count]) for count in COUNTS]
    return [*rows, compare("all in another order", run(order), whole[order])]


def by_tiles(kernel: str, run: Callable[[], Tensor], expected: Tensor, device: torch.device) -> list[common.Row]:
    """The kernel with other tiles; those that do not fit the device are left out."""
    key = (kernel, dispatch.architecture_of(device))
    usual, rows = tiles.TILES[key], []
    for row, column, depth in TILE_SIZES:
        name = f"tiles {row}x{column}x{depth}"
        tiles.TILES[key] = usual._replace(rows=row, columns=column, depth=depth, num_warps=4, num_stages=2)
        if common.able({name: run}, ()):
            rows.append(compare(name, run(), expected))
    tiles.TILES[key] = usual
    return rows


def by_step(q: Tensor, k: Tensor, v: Tensor) -> list[common.Row]:
    """One sequence of the trainer beside its tokens in a paged cache, in steps of every kind."""
    count = len(q)

    def index(*numbers: int) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=q.device)

    def packed(prefix: Tensor | None, *bounds: int) -> Tensor:
        return exact_packed_attention(q, k, v, index(*bounds), count, prefix)

    def cached(chunks: list[range]) -> Tensor:
        """Chunks of the sequence, each by a row of its own that shares the blocks."""
        keys, values = (x.view(-1, BLOCK, *x.shape[1:]) for x in (k, v))
        tables = torch.arange(count // BLOCK, dtype=torch.int32, device=q.device).expand(len(chunks), -1)
        lengths = [len(chunk) for chunk in chunks]
        bounds = torch.tensor([0, *lengths], device=q.device).cumsum(0).int()
        rows = torch.tensor([row for chunk in chunks for row in chunk], device=q.device)
        contexts = index(*(chunk.stop for chunk in chunks))
        return exact_paged_attention(q[rows], keys, values, tables, contexts, bounds, max(lengths))

    whole = packed(None, 0, count)
    alone = range(0, count, 61)
    found = [
        compare("tokens alone", torch.cat([cached([range(i, i + 1)]) for i in alone]), whole[:: alone.step]),
        compare("tokens in one step", cached([range(i, i + 1) for i in alone]), whole[:: alone.step]),
        compare("in chunks of 100", cached([range(i, min(i + 100, count)) for i in range(0, count, 100)]), whole),
        compare(f"behind a prompt of {PROMPT}", packed(index(-1, 0), 0, PROMPT, count), whole),
    ]
    if q.is_cuda:
        for rows in ATTENTION_ROWS:
            with attention_rows(rows, q):
                found.append(compare(f"tiles of {rows} rows", packed(None, 0, count), whole))
    return found


@contextmanager
def attention_rows(rows: int, q: Tensor) -> Iterator[None]:
    """Tiles of so many rows; their chunks of keys stay, for other chunks are another order."""
    architecture = dispatch.architecture_of(q.device)
    usual = exact_attention.TILES[architecture]
    small, middle, large = (each._replace(rows=rows, num_warps=rows // 16, num_stages=2) for each in usual)
    exact_attention.TILES[architecture] = small, middle, large
    try:
        yield
    finally:
        exact_attention.TILES[architecture] = usual


def main() -> None:
    args = common.arguments(__doc__)
    shapes = common.parse_shapes(args.shapes, GPU_SHAPES if args.device == "cuda" else CPU_SHAPES)
    with dispatch.exact_forms(args.device):
        print(dispatch.describe(args.device))
    common.report("row_identity", [row for shape in shapes for row in measure(shape, args)], args)


if __name__ == "__main__":
    main()
