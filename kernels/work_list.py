"""How a decoding step is cut into pieces of work, on the host: a prefix that several rows share is met once.

The rows' keys are cut at fixed positions, whatever else is in the batch; a run of neighbouring rows whose tables begin
with the same blocks (the samples of one prompt) goes through those together.

Shapes: N rows, B blocks of a table.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]
# Tokens of a split at the beginning of a context. With 64 rows that is enough programs for any GPU, and what a split
# leaves for the join, G vectors in float32 written and read, is G/128 of the keys and values in bf16 that it reads.
SPLIT_TOKENS = 256
FIELDS = 5  # of an item: its first row, rows, first position, position behind its last, and its piece of each row


class WorkList(NamedTuple):
    """Items that together meet every key of every row once.

    Attributes:
        items: [I, FIELDS] int32, those with the most keys first. Piece p of a row is the p-th stretch of its keys.
        pieces: [N] int32, the pieces of each row.
        least: [N] tokens that each row must have at least: one more than it shares.
        limits: [N] tokens up to which a row may grow: the end of the split behind that of its newest token.
    """

    items: NDArray[np.int32]
    pieces: NDArray[np.int32]
    least: Numbers
    limits: Numbers


def split_edges(max_tokens: int) -> Numbers:
    """Positions at which every context of up to ``max_tokens`` is cut, the first 0, the last ``max_tokens``.

    Up to 4,096 they stand SPLIT_TOKENS apart, then eight to each doubling, so that long contexts have few.
    """
    edges = [0]
    while edges[-1] < max_tokens:
        edges.append(min(max_tokens, edges[-1] + max(SPLIT_TOKENS, 1 << max(0, edges[-1].bit_length() - 4))))
    return np.array(edges)


def work_list(
    tables: NDArray[np.int32], lengths: Numbers, block_size: int, edges: Numbers, rows_together: int
) -> WorkList:
    """Cut a decoding step.

    Args:
        tables: [N,B], N at least 1; rows that share a prefix should be neighbours.
        lengths: [N] tokens of each row, at least 1, its newest among them.
        block_size: tokens in a block.
        edges: of :func:`split_edges`; the last is at least the longest row.
        rows_together: most rows of one item.
    """
    groups, shared = shared_blocks(tables, (lengths - 1) // block_size)
    shared_tokens = shared * block_size
    shared_pieces = np.searchsorted(edges, shared_tokens)
    # What a row has to itself goes on to the end of the split behind its newest token's: it may grow into that.
    first_split = np.searchsorted(edges, shared_tokens, side="right") - 1
    last_split = np.minimum(np.searchsorted(edges, lengths) + 1, len(edges) - 1)
    row, number = _counted(last_split - first_split)
    split = first_split[row] + number
    begin = np.maximum(edges[split], shared_tokens[row])
    own = (row, np.ones_like(row), begin, edges[split + 1], shared_pieces[row] + number)
    own_keys = np.minimum(edges[split + 1], lengths[row]) - begin

    first, members = np.unique(groups, return_index=True, return_counts=True)[1:]
    group, number = _counted(-(-members // rows_together) * (shared[first] > 0))
    start = first[group] + number * rows_together
    together = np.minimum(rows_together, first[group] + members[group] - start)
    part, split = _counted(shared_pieces[start])
    start, together = start[part], together[part]
    end = np.minimum(edges[split + 1], shared_tokens[start])
    common = (start, together, edges[split], end, split)
    # Those that many rows meet take the longest.
    keys = np.concatenate((end - edges[split] + edges[-1], own_keys))
    items = np.concatenate([np.stack(part, 1) for part in (common, own)])[np.argsort(-keys, kind="stable")]
    pieces = shared_pieces + last_split - first_split
    return WorkList(items.astype(np.int32), pieces.astype(np.int32), shared_tokens + 1, edges[last_split])


def shared_blocks(tables: NDArray[np.integer], full: Numbers) -> tuple[Numbers, Numbers]:
    """Groups of neighbouring rows that begin with the same block, and how many full blocks all of a group share.

    ``full`` [N] counts the blocks of each row that its newest token is not in: so each row keeps that one behind.
    """
    new = np.ones(len(tables), bool)
    new[1:] = tables[1:, 0] != tables[:-1, 0]
    groups = np.cumsum(new) - 1
    first = np.flatnonzero(new)
    leader = tables[first][groups]
    equal = np.logical_and.accumulate(tables == leader, 1).sum(1)
    shared = np.minimum.reduceat(np.minimum(equal, full), first)
    alone = np.diff(np.append(first, len(tables))) == 1
    shared[alone] = 0
    return groups, shared[groups]


def _counted(counts: Numbers) -> tuple[Numbers, Numbers]:
    """Each index as often as it counts, and which time it is: [2, 0, 1] -> [0, 0, 2], [0, 1, 0]."""
    index = np.repeat(np.arange(len(counts)), counts)
    return index, np.arange(len(index)) - (np.cumsum(counts) - counts)[index]
