"""The order in which the blocks of a write are queued: it keeps workers out of each other's way.

A batch of one shard takes two holds of that shard's lock, whatever its length, and one file is
written by one process at a time (the kernel holds the file's lock during a `pwrite`). So what a
worker claims at a time should be of one shard, and what two workers claim in turn of two.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from light_mem.engine.queue import BATCH_BLOCKS, BATCH_BYTES
from light_mem.engine.table_layout import WRITE

Positions = npt.NDArray[np.int64]


def deal(shards: Positions, nbytes: Positions, workers: int) -> Positions:
    """Order of blocks by their `shards` and lengths in bytes, [n] each: positions, [n].

    The blocks, sorted by shard, are cut into a part a worker; batches are dealt from the parts in
    turn.
    """
    count = len(shards)
    by_shard = np.argsort(shards, kind="stable")
    part = -(-count // workers)
    mean = max(1, int(nbytes.sum()) // count)
    batch = min(BATCH_BLOCKS, part, -(-BATCH_BYTES[WRITE] // mean))
    at = np.arange(count)
    whose, within = np.divmod(at, part)
    turn, place = np.divmod(within, batch)
    return by_shard[np.argsort((turn * workers + whose) * batch + place, kind="stable")]
