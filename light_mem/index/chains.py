"""The chains of one shard: a head a bucket, and each entry's link to the next.

Changed under the shard's lock while look-ups walk them without one, so every change is a single
store that leaves a chain which exists: entry -> tag -> head to put in, one link to cut out.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from light_mem.index import keys as keymath


class Chains:
    """Heads uint32 [buckets] (slot + 1, 0: empty) and links of one shard's entries."""

    def __init__(self, heads: npt.NDArray[np.uint32], entries: npt.NDArray[np.void]) -> None:
        self._heads = heads.data
        self._next, self._tags = entries["next"].data, entries["tag"].data
        self._low, self._high = entries["low"].data, entries["high"].data
        self._mask = len(heads) - 1

    def is_begun(self, mixed: int) -> bool:
        """Whether the chain of a mixed key holds any entry at all."""
        return self._heads[mixed & self._mask] != 0

    def put_in(self, slot: int, mixed: int, tag: int) -> None:
        """Make the block of an entry, whose other fields are in place, visible."""
        bucket = mixed & self._mask
        self._next[slot] = self._heads[bucket]
        self._tags[slot] = tag
        self._heads[bucket] = slot + 1

    def cut_out(self, slot: int) -> None:
        """Take the entry of a slot out of its chain; its tag says already that it is free."""
        bucket = keymath.mix_one(self._low[slot], self._high[slot]) & self._mask
        link, following = slot + 1, self._next[slot]
        at = self._heads[bucket]
        if at == link:
            self._heads[bucket] = following
            return
        slots = len(self._next)
        for _ in range(slots):  # a damaged chain may be a ring
            if not 0 < at <= slots:
                return
            after = self._next[at - 1]
            if after == link:
                self._next[at - 1] = following
                return
            at = after
