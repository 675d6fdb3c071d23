"""Sizes of the tiles of products, by kernel, architecture and dtype.

The log-probability's never go by the number of rows. The exact linear map's do, and so "few rows" and "many rows" have
one depth, and on each architecture instructions that sum as many inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tiles(NamedTuple):
    """Sizes of one program's tile and how it is run."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


# bf16 and float16, by kernel and architecture, never by T. Chosen as the largest that spill no register with any
# Triton from 3.6 to 3.9; not yet measured on a GPU.
TILES = {
    ("forward", "sm_90"): Tiles(128, 256, 64, 8, 3),
    ("gradient", "sm_90"): Tiles(128, 256, 64, 8, 3),
    ("entropy gradient", "sm_90"): Tiles(128, 128, 64, 8, 3),
    ("forward", "sm_80"): Tiles(128, 128, 32, 8, 4),
    ("gradient", "sm_80"): Tiles(128, 128, 64, 8, 3),
    ("entropy gradient", "sm_80"): Tiles(128, 128, 64, 8, 3),
    ("forward", "gfx942"): Tiles(128, 128, 64, 8, 2),
    ("gradient", "gfx942"): Tiles(128, 128, 64, 8, 2),
    ("entropy gradient", "gfx942"): Tiles(128, 128, 64, 8, 2),
    ("few rows", "sm_90"): Tiles(64, 32, 64, 4, 6),
    ("many rows", "sm_90"): Tiles(128, 256, 64, 8, 3),
    ("few rows", "sm_80"): Tiles(64, 32, 64, 4, 4),
    ("many rows", "sm_80"): Tiles(128, 128, 64, 8, 3),
    ("few rows", "gfx942"): Tiles(64, 32, 64, 4, 2),
    ("many rows", "gfx942"): Tiles(128, 128, 64, 8, 2),
}
# Multiplied without tensor cores.
FLOAT32_TILES = Tiles(64, 64, 16, 8, 2)
# The interpreter's time goes by operations, not by elements; the exact linear map has more than one tile in its tests.
INTERPRETER_TILES = {
    **dict.fromkeys(("forward", "gradient", "entropy gradient"), Tiles(32, 512, 64, 4, 1)),
    "few rows": Tiles(64, 128, 64, 4, 1),
    "many rows": Tiles(128, 256, 64, 4, 1),
}


def tiles(kernel: str, dtype: torch.dtype, architecture: str) -> Tiles:
    """Settings of a kernel on "sm_90", "sm_80", "gfx942" (any ROCm device) or "cpu" (the interpreter).

    Those of "sm_90" load by descriptors; "sm_80" is also what lies between, and what a later device cannot load so.
    """
    if architecture == "cpu":
        return INTERPRETER_TILES[kernel]
    return FLOAT32_TILES if dtype == torch.float32 else TILES[kernel, architecture]
