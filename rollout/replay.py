"""Decoding steps in fixed buffers on the device, which CUDA graphs replay: one graph a size of the batch.

A step of a small batch is bound by its launches; a graph makes them one. The host writes what a step needs into the
buffers from pinned memory and waits for nothing.

Legend: N sequences, B rows of the buffers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..kernels.decode import DecodePlan
from ..kernels.exact_attention import ExactDecode
from .draw import Draws

MIN_BLOCKS = 64

Plan = DecodePlan | ExactDecode
Compute = Callable[[Tensor, Tensor, Tensor, Plan, tuple[Tensor, ...]], tuple[Tensor, ...]]
"""Ids, positions and slots [B], attention, the arguments of ``sample_tokens`` behind the logits -> tensors of B."""


class Inputs(NamedTuple):
    """What the host knows of a decoding step of N rows."""

    tables: NDArray[np.int32]  # [N, blocks]
    lengths: NDArray[np.int64]  # [N] tokens of each row, the one that is computed included
    slots: NDArray[np.int64]  # [N] where that one is stored
    draws: Draws  # of the tokens behind them
    same_rows: bool  # the step before was of the same rows in the same order, one token shorter


class Replay:
    """The steps of one cache with one set of weights: neither may move.

    Args:
        compute: what a step does on the device.
        make_plan: attention for up to so many rows of so many blocks.
    """

    def __init__(self, compute: Compute, make_plan: Callable[[int, int], Plan]) -> None:
        self._compute, self._make_plan = compute, make_plan
        self._steps: dict[tuple[int, int], _FixedStep] = {}
        self._last: tuple[int, int] | None = None  # of the steps, the one that was run
        self._pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None

    def __call__(self, ids: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
        """What is computed of the tokens ``ids`` [N] int64, which lie on the device: tensors of N rows."""
        size = _rounded(len(ids)), max(MIN_BLOCKS, 1 << (inputs.tables.shape[1] - 1).bit_length())
        if size not in self._steps:
            self._steps[size] = _FixedStep(self._compute, self._make_plan(*size), self._pool)
        if self._last != size:
            inputs = inputs._replace(same_rows=False)
        self._last = size
        return self._steps[size](ids, inputs)


class _FixedStep:
    """Buffers for up to B rows, and the graph that computes with them."""

    def __init__(self, compute: Compute, plan: Plan, pool: Any) -> None:
        self._compute, self._plan, self._pool = compute, plan, pool
        rows, device = len(plan.block_tables), plan.block_tables.device
        self._ids = torch.zeros(rows, dtype=torch.int64, device=device)
        # Positions, slots, keys, places, top_k; a row that is not used is stored nowhere.
        self._integers = torch.zeros(5, rows, dtype=torch.int64, device=device)
        self._numbers = torch.ones(3, rows, device=device)  # temperature, top_p, min_p
        self._graph: torch.cuda.CUDAGraph | None = None
        self._results: tuple[Tensor, ...] = ()

    def __call__(self, ids: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
        tables, lengths, slots, draws, same_rows = inputs
        count = len(ids)
        (self._plan.update if same_rows else self._plan.set)(tables, lengths)
        self._ids[:count].copy_(ids)
        integers = np.zeros(self._integers.shape, np.int64)
        integers[1] = -1
        integers[:, :count] = lengths - 1, slots, draws.keys, draws.positions, draws.top_k
        numbers = np.ones(self._numbers.shape, np.float32)
        numbers[:, :count] = draws.temperature, draws.top_p, draws.min_p
        for buffer, array in ((self._integers, integers), (self._numbers, numbers)):
            host = torch.from_numpy(array)
            buffer.copy_(host.pin_memory() if buffer.is_cuda else host, non_blocking=True)
        return tuple(x[:count].clone() for x in self._run())

    def _run(self) -> tuple[Tensor, ...]:
        if not self._ids.is_cuda:
            return self._on_device()
        if self._graph is None:
            self._on_device()  # compiles kernels, which cannot be captured
            self._graph = torch.cuda.CUDAGraph()
            # Other threads may copy meanwhile: those that save checkpoints.
            with torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode="thread_local"):
                self._results = self._on_device()
        self._graph.replay()
        return self._results

    def _on_device(self) -> tuple[Tensor, ...]:
        positions, slots, keys, places, top_k = self._integers
        temperature, top_p, min_p = self._numbers
        draws = (keys, places, temperature, top_k.int(), top_p, min_p)
        return self._compute(self._ids, positions, slots, self._plan, draws)


def _rounded(count: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24, ...: two sizes to each doubling."""
    size = 1 << (count - 1).bit_length()
    return size * 3 // 4 if size >= 4 and count <= size * 3 // 4 else size
