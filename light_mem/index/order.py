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

MIN_BATCH = 1024  # blocks sorted out at a time at least
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
        # (time of use, slot): the oldest ones, youngest first; and those that were used meanwhile.
        self._oldest: list[tuple[int, int]] = []
        self._again: SortedList = SortedList()
        self._horizon = 0  # no block outside the candidates was used before this time

    def oldest(self) -> int | None:
        """First slot of the least recently used stored block that is neither pinned nor leased;
        None: there is no such block."""
        found = self.oldest_many(1)
        return found[0] if found else None

    def oldest_many(self, count: int) -> list[int]:
        """Up to `count` of the least recently used blocks, the oldest first; empty only when none
        may go. Take these out, or put them back, before asking again."""
        for _ in range(3):  # every candidate may have been used meanwhile
            # Not beyond the sorted part: sorting anew would find those that were just found.
            found = self._pop_many(count)
            if found or not self._refill():
                return found
        return []

    def _pop_many(self, count: int) -> list[int]:
        leased = self._leased()
        found: list[int] = []
        while len(found) < count and (self._oldest or self._again):
            if self._again:
                taken = [self._pop_one()]
            else:
                taken = self._oldest[: -1 - (count - len(found)) : -1]
                del self._oldest[-len(taken) :]
            slots = [slot for _, slot in taken]
            stays = (self._tags[slots] & np.uint64(STATE_MASK)) != LIVE
            stays |= self._keeps[slots] >= KEEP_PINNED
            times = self._used[slots].tolist()
            for at, (passed, now) in enumerate(zip(stays.tolist(), times, strict=True)):
                if passed or slots[at] in leased:
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
            # With those that were used at the same moment, as a batch is: among them the slot
            # decides, and not what the partition happens to do.
            ties = np.flatnonzero(used <= used[part].max())
            if ties.size < 2 * count:
                part = ties
            live, used = live[part], used[part]
        self._oldest = sorted(zip(used.tolist(), live.tolist(), strict=True), reverse=True)
        self._horizon = int(used.max())
        return True
