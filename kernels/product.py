"""Tiles of x @ weight.T in Triton, and the linear map of the exact mode that is made of them.

Shapes: T rows, K inputs, N outputs.

A program sums along the whole of K, DEPTH inputs after DEPTH inputs in one accumulator of float32: K is never split,
and every tile multiplies by instructions that sum equally many inputs. So what a row gives depends on it and on the
weight alone: not on how many rows there are, on its place among them, or on what they hold.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dispatch import TensorDescriptor, architecture_of, jit, tl, triton
from .tiles import tiles

# Bytes of rows that programs side by side share: half of the 50 MB of an H200's second-level cache. All slices of the
# weight pass one such group of rows, then the next. At T 8,192, K 3,584 and N 152,064 three groups read the weight
# (1.09 GB) three times: 0.8 ms of memory traffic beside 11.3 ms of arithmetic. Without groups 132 programs would hold
# 2 slices and all rows (58.7 MB, more than the cache keeps) and read them again in each of 297 steps: 17 GB, 4 ms.
CACHED_ROW_BYTES = 24 << 20
# Up to so many rows, as in decoding, tiles are small: reading the weight is what takes time, so many programs must.
FEW_ROWS = 256


@jit
def place(num_row_tiles, num_columns, num_group_tiles):  # type: ignore[no-untyped-def]
    """This program's row tile and its slice (or tile) of the columns; see CACHED_ROW_BYTES for their order."""
    program = tl.program_id(0)
    num_group_programs = num_group_tiles * num_columns
    first = program // num_group_programs * num_group_tiles
    size = tl.minimum(num_row_tiles - first, num_group_tiles)
    inside = program % num_group_programs
    return first + inside % size, inside // size


@jit
def product_tile(  # type: ignore[no-untyped-def]
    x, weight, first_row, first_column, num_rows, column_end, num_inputs,
    DESCRIPTORS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Products [ROWS, COLUMNS] in float32; rows and columns outside read as zero vectors."""
    acc = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    if DESCRIPTORS:
        for start in range(0, num_inputs, DEPTH):
            a = x.load([first_row, start])
            b = weight.load([first_column, start])
            acc = tl.dot(a, b.T, acc, input_precision="ieee")
    else:
        rows = first_row + tl.arange(0, ROWS)
        columns = first_column + tl.arange(0, COLUMNS)
        depth = tl.arange(0, DEPTH)
        x_at = x + rows.to(tl.int64)[:, None] * num_inputs + depth[None, :]
        weight_at = weight + columns.to(tl.int64)[None, :] * num_inputs + depth[:, None]
        row_in = (rows < num_rows)[:, None]
        column_in = (columns < column_end)[None, :]
        for start in range(0, num_inputs, DEPTH):
            inside = depth < num_inputs - start
            a = tl.load(x_at + start, mask=row_in & inside[None, :], other=0.0)
            b = tl.load(weight_at + start, mask=column_in & inside[:, None], other=0.0)
            acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


# One binary for any number of rows: not one for 1 and others for multiples of 16.
@partial(jit, unspecialised=("num_rows", "num_row_tiles", "num_column_tiles", "num_group_tiles"))
def product_kernel(  # type: ignore[no-untyped-def]
    x, weight, bias, out, num_rows, num_columns, num_inputs, num_row_tiles, num_column_tiles, num_group_tiles,
    HAS_BIAS: tl.constexpr, DESCRIPTORS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of the rows by one of the columns."""
    row_tile, column_tile = place(num_row_tiles, num_column_tiles, num_group_tiles)
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    acc = product_tile(
        x, weight, row_tile * ROWS, column_tile * COLUMNS, num_rows, num_columns, num_inputs,
        DESCRIPTORS, ROWS, COLUMNS, DEPTH,
    )  # fmt: skip
    if HAS_BIAS:
        acc += tl.load(bias + columns, mask=columns < num_columns, other=0.0).to(tl.float32)[None, :]
    at = out + rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=inside)


class Plan(NamedTuple):
    """How a kernel reads rows and weight, and in what order its programs run."""

    x: Any  # the tensor, or its descriptor
    weight: Any
    num_row_tiles: int
    num_group_tiles: int
    num_columns: int  # of a tile
    options: dict[str, int]


def make_plan(kernel: str, x: Tensor, weight: Tensor) -> Plan:
    """For a kernel of ``tiles.TILES``, x [T,K] and weight [N,K]."""
    architecture = architecture_of(x.device)
    descriptors = by_descriptors(x, weight, architecture)
    tile = tiles(kernel, x.dtype, "sm_80" if architecture == "sm_90" and not descriptors else architecture)
    options = dict(zip(("ROWS", "COLUMNS", "DEPTH", "num_warps", "num_stages"), tile, strict=True))
    a: Any = TensorDescriptor.from_tensor(x, [tile.rows, tile.depth]) if descriptors else x
    b: Any = TensorDescriptor.from_tensor(weight, [tile.columns, tile.depth]) if descriptors else weight
    num_row_tiles = triton.cdiv(len(x), tile.rows)
    num_groups = triton.cdiv(x.numel() * x.element_size(), CACHED_ROW_BYTES)
    num_group_tiles = triton.cdiv(num_row_tiles, num_groups)
    return Plan(a, b, num_row_tiles, num_group_tiles, tile.columns, options | {"DESCRIPTORS": descriptors})


def by_descriptors(x: Tensor, weight: Tensor, architecture: str) -> bool:
    """Whether descriptors bring tiles whole (Hopper's tensor memory accelerator), or pointers piece by piece.

    Descriptors need addresses and rows at multiples of 16 bytes. The interpreter knows both ways.
    """
    aligned = all(t.data_ptr() % 16 == 0 and t.shape[1] * t.element_size() % 16 == 0 for t in (x, weight))
    return aligned and (architecture == "cpu" or (architecture == "sm_90" and x.dtype != torch.float32))


def exact_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias, [T,K], [N,K] and [N] -> [T,N]; a row is the same to the bit in any company. No gradient."""
    x, weight = x.contiguous(), weight.contiguous()
    num_rows, num_columns = len(x), len(weight)
    out = x.new_empty(num_rows, num_columns)
    if out.numel():
        plan = make_plan("few rows" if num_rows <= FEW_ROWS else "many rows", x, weight)
        num_column_tiles = triton.cdiv(num_columns, plan.num_columns)
        product_kernel[(plan.num_row_tiles * num_column_tiles,)](
            plan.x, plan.weight, weight if bias is None else bias.contiguous(), out,
            num_rows, num_columns, x.shape[1], plan.num_row_tiles, num_column_tiles, plan.num_group_tiles,
            HAS_BIAS=bias is not None, **plan.options,
        )  # fmt: skip
    return out
