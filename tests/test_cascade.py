"""Decode attention on a CPU against plain attention over the cache: shared prefixes, ragged groups, padded blocks."""

import numpy as np
import pytest
import torch

from groupwise.kernels.cascade import CascadeDecode
from groupwise.kernels.eager import paged_attention


@pytest.mark.parametrize(("groups", "members", "blocks"), [(1, 1, 0), (6, 1, 0), (4, 4, 3), (3, 5, 1), (20, 3, 6)])
def test_cascade_equals_paged_attention(groups, members, blocks):
    rng = np.random.default_rng(groups)
    count, width, size = groups * members, blocks + 30, 4
    count -= members // 2  # the last group is smaller
    free = iter(rng.permutation(count * width + groups * blocks).tolist())
    tables = np.zeros((count, width), np.int32)
    prefixes = [[next(free) for _ in range(blocks)] for _ in range(groups)]
    lengths = rng.integers(blocks * size + 1, width * size, count)
    for row in range(count):
        own = -(-int(lengths[row]) // size) - blocks
        tables[row, : blocks + own] = prefixes[row // members] + [next(free) for _ in range(own)]
    generator = torch.Generator().manual_seed(0)
    decode = CascadeDecode(size, (6, 2), 8, torch.device("cpu"))
    decode.set(tables, lengths)
    for _ in range(2):  # layers: nothing of the first may stay
        pool = [torch.randn(count * width + groups * blocks, size, 2, 8, generator=generator) for _ in range(2)]
        q = torch.randn(count, 6, 8, generator=generator)
        expected = paged_attention(
            q.double(), pool[0].double(), pool[1].double(), torch.from_numpy(tables),
            torch.from_numpy(lengths).int(), torch.arange(count + 1).int(), 1,
        )  # fmt: skip
        torch.testing.assert_close(decode(q, *pool).double(), expected, atol=2e-6, rtol=0)


def test_cascade_of_rows_that_share_every_block():
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(9, 4, 2, 8, generator=generator) for _ in range(2))
    q = torch.randn(3, 4, 8, generator=generator)
    tables, lengths = np.array([[5, 2, 7, 1]] * 3, np.int32), np.array([7, 12, 16])
    expected = paged_attention(
        q, k, v, torch.from_numpy(tables), torch.from_numpy(lengths).int(), torch.arange(4).int(), 1
    )
    plans = [CascadeDecode(4, (4, 2), 8, torch.device("cpu")) for _ in range(2)]
    for plan in plans:
        plan.set(tables, lengths)
    torch.testing.assert_close(plans[0](q, k, v), expected, atol=2e-6, rtol=0)
    half = plans[1](*(x.bfloat16() for x in (q, k, v)))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, atol=0.03, rtol=0)
