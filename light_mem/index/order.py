"""Order of use of one shard's blocks: exact least-recently-used, without a shared list.

Every look-up stores the time in the block's entry: one plain store, no lock. Who must evict
sorts out the oldest blocks once and then takes them one after the other, looking again at each:
one that was used meanwhile goes back to where it belongs. A block outside the sorted part is
never older than the sorted part's youngest, because times only grow.

A replica in one process, used under the shard's lock.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from sortedcontainers import SortedList

from light_mem.index.format import LIVE, STATE_MASK

MIN_BATCH = 1024  # blocks sorted out at a time at least
MAX_BATCH = 16384  # sorting more would hold the lock for longer than the scan itself
BATCH_PART = 8  # ... and an eighth of all, so that the scan costs little a block


class EvictionOrder:
    """Candidates for eviction of one shard; `tags` and `used` are views of its entries."""

    def __init__(self, tags: npt.NDArray[np.uint64], used: npt.NDArray[np.uint64]) -> None:
        self._tags = tags
        self._used = used
        # (time of use, slot): the oldest ones, youngest first; and those that were used meanwhile.
        self._oldest: list[tuple[int, int]] = []
        self._again: SortedList = SortedList()
        self._horizon = 0  # no block outside the candidates was used before this time

    def oldest(self) -> int | None:
        """First slot of the least recently used stored block; None: no block is stored."""
        found = self.oldest_many(1)
        return found[0] if found else None

    def oldest_many(self, count: int) -> list[int]:
        """Up to `count` of the least recently used blocks, the oldest first; empty only when none
        is stored. Take these out, or put them back, before asking again."""
        for _ in range(3):  # every candidate may have been used meanwhile
            # Not beyond the sorted part: sorting anew would find those that were just found.
            found = self._pop_many(count)
            if found or not self._refill():
                return found
        return []

    def _pop_many(self, count: int) -> list[int]:
        found: list[int] = []
        while len(found) < count and (self._oldest or self._again):
            if self._again:
                taken = [self._pop_one()]
            else:
                taken = self._oldest[: -1 - (count - len(found)) : -1]
                del self._oldest[-len(taken) :]
            slots = [slot for _, slot in taken]
            states = (self._tags[slots] & np.uint64(STATE_MASK)).tolist()
            for at, (state, now) in enumerate(zip(states, self._used[slots].tolist(), strict=True)):
                if state != LIVE:
                    continue
                if now == taken[at][0]:
                    found.append(slots[at])
                elif now <= self._horizon:
                    self._again.add((now, slots[at]))
                    # It may be older than the rest of what was taken.
                    self._oldest += reversed(taken[at + 1 :])
                    break
        return found

    def _pop_one(self) -> tuple[int, int]:
        if self._oldest and self._oldest[-1] < self._again[0]:
            return self._oldest.pop()
        first: tuple[int, int] = self._again.pop(0)
        return first

    def put_back(self, slots: list[int]) -> None:
        """Blocks that were found oldest stay after all."""
        self._again.update((int(self._used[slot]), slot) for slot in slots)

    def _refill(self) -> bool:
        live = np.flatnonzero((self._tags & np.uint64(STATE_MASK)) == LIVE)
        if not live.size:
            return False
        used = self._used[live]
        count = min(live.size, MAX_BATCH, max(MIN_BATCH, live.size // BATCH_PART))
        if count < live.size:
            part = np.argpartition(used, count - 1)[:count]
            live, used = live[part], used[part]
        self._oldest = sorted(zip(used.tolist(), live.tolist(), strict=True), reverse=True)
        self._horizon = int(used.max())
        return True
