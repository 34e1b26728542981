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
