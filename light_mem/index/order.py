"""Order of use of one shard's blocks: exact least-recently-used, without a shared list.

Every look-up stores the time in the block's entry: one plain store, no lock. Who must evict
sorts out the oldest blocks once and then takes them one after the other, looking again at each:
one that was used meanwhile goes back to where it belongs. A block outside the sorted part is
never older than the sorted part's youngest, because times only grow.

Pinned and leased blocks are passed over where they are met and are not sorted out at all, so many
of them cost an eviction nothing. They come back by being used: unpinning and the end of a lease
store the time, as a look-up does.

A replica in one process, used under the shard's lock.
"""

from __future__ import annotations

from collections.abc import Callable, Set

import numpy as np
import numpy.typing as npt
from sortedcontainers import SortedList

from light_mem.index.format import KEEP_PINNED, LIVE, STATE_MASK

MIN_BATCH = 64  # blocks sorted out at a time at least
MAX_BATCH = 16384  # sorting more would hold the lock for longer than the scan itself
BATCH_PART = 8  # ... and an eighth of all, so that the scan costs little a block


class EvictionOrder:
    """Candidates for eviction of one shard; `tags`, `used` and `keeps` are views of its entries,
    `leased` says which first slots are leased at the moment."""

    def __init__(
        self,
        tags: npt.NDArray[np.uint64],
        used: npt.NDArray[np.uint64],
        keeps: npt.NDArray[np.uint32],
        leased: Callable[[], Set[int]] = frozenset,
    ) -> None:
        self._tags = tags
        self._used = used
        self._keeps = keeps
        self._leased = leased
        self._candidates: SortedList = SortedList()
        self._horizon = 0  # no block outside the candidates was used before this time

    def oldest(self) -> int | None:
        """First slot of the least recently used stored block that is neither pinned nor leased;
        None: there is no such block."""
        for _ in range(3):  # every candidate may have been used meanwhile
            slot = self._next_candidate()
            if slot is not None:
                return slot
            if not self._refill():
                return None
        return None

    def oldest_many(self, count: int) -> list[int]:
        """Up to `count` of the least recently used blocks, the oldest first; empty only when none
        may go. Take these out, or put them back, before asking again."""
        slot = self.oldest()
        found: list[int] = []
        # Not beyond the sorted part: sorting anew would find those that were just found.
        while slot is not None:
            found.append(slot)
            slot = self._next_candidate() if len(found) < count else None
        return found

    def _next_candidate(self) -> int | None:
        leased = self._leased()
        while self._candidates:
            used, slot = self._candidates.pop(0)
            if int(self._tags[slot]) & STATE_MASK != LIVE or slot in leased:
                continue
            if int(self._keeps[slot]) >= KEEP_PINNED:
                continue
            now = int(self._used[slot])
            if now == used:
                return int(slot)
            if now <= self._horizon:
                self._candidates.add((now, slot))
        return None

    def put_back(self, slots: list[int]) -> None:
        """Blocks that were found oldest stay after all."""
        for slot in slots:
            self._candidates.add((int(self._used[slot]), slot))

    def _refill(self) -> bool:
        live = np.flatnonzero(
            ((self._tags & np.uint64(STATE_MASK)) == LIVE) & (self._keeps < KEEP_PINNED)
        )
        leased = self._leased()
        if leased:
            live = live[~np.isin(live, list(leased))]
        if not live.size:
            return False
        used = self._used[live]
        count = min(live.size, MAX_BATCH, max(MIN_BATCH, live.size // BATCH_PART))
        if count < live.size:
            part = np.argpartition(used, count - 1)[:count]
            live, used = live[part], used[part]
        self._candidates = SortedList(zip(used.tolist(), live.tolist(), strict=True))
        self._horizon = int(used.max())
        return True
