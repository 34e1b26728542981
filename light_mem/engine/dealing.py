"""Which worker had better write which blocks, and their order in the queue: it keeps workers out
of each other's way.

A batch of one shard takes two holds of that shard's lock, whatever its length, and one file is
written by one process at a time (the kernel holds the file's lock during a `pwrite`). So what a
worker claims at a time should be of one shard, and what two workers claim in turn of two. And a
worker should write the same shard again and again: pages it wrote and the kernel has not yet
flushed can be stored to without a page fault (`dirty_pages`). So each shard has a *home*, a worker;
others write to it only when they have nothing else to do.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from light_mem.engine.claiming import BATCH_BLOCKS, BATCH_BYTES
from light_mem.engine.table_layout import WRITE

Positions = npt.NDArray[np.int64]


def deal(
    shards: Positions, nbytes: Positions, num_shards: int, workers: int
) -> tuple[Positions, Positions]:
    """How to queue blocks by their `shards` and lengths in bytes, [n] each.

    Returns positions in the order to queue them, [n], and the home of each block there, [n]:
    workers count from 1. Batches of the workers come in turn, so that each finds its own near the
    head of the queue.
    """
    count = len(shards)
    order = np.argsort(shards, kind="stable")
    if num_shards < workers:  # a shard has several workers: even parts
        homes = np.arange(count) * workers // count
    else:
        homes = shards[order] * workers // num_shards
    mean = max(1, int(nbytes.sum()) // count)
    batch = min(BATCH_BLOCKS, -(-count // workers), -(-BATCH_BYTES[WRITE] // mean))
    within = np.arange(count) - np.searchsorted(homes, homes)
    in_turn = np.lexsort((homes, within // batch))  # stable: by shard within a batch
    return order[in_turn], homes[in_turn] + 1


def deal_few(
    shards: Sequence[int], nbytes: Sequence[int], num_shards: int, workers: int
) -> tuple[list[int], list[int]]:
    """`deal` for a few blocks, at least one, as Python ints: less than its calls take."""
    count = len(shards)
    order = sorted(range(count), key=shards.__getitem__)
    if num_shards < workers:
        homes = [n * workers // count for n in range(count)]
    else:
        homes = [shards[at] * workers // num_shards for at in order]
    mean = max(1, sum(nbytes) // count)
    batch = min(BATCH_BLOCKS, -(-count // workers), -(-BATCH_BYTES[WRITE] // mean))
    begins: dict[int, int] = {}
    turns = [((n - begins.setdefault(home, n)) // batch, home) for n, home in enumerate(homes)]
    in_turn = sorted(range(count), key=turns.__getitem__)
    return [order[n] for n in in_turn], [homes[n] + 1 for n in in_turn]
