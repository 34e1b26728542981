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
_STATE = np.uint64(STATE_MASK)

Slots = npt.NDArray[np.int64]
Times = npt.NDArray[np.uint64]


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
        # The sorted part, oldest first, from `_next` on; and (time of use, slot) of those that were
        # used meanwhile.
        self._times = np.empty(0, np.uint64)
        self._slots = np.empty(0, np.int64)
        self._next = 0
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

    @property
    def _left(self) -> int:
        """How many of the sorted part have not been taken."""
        return len(self._slots) - self._next

    def _pop_many(self, count: int) -> list[int]:
        leased = self._leased()
        if count == 1 and not self._again:
            return self._pop_one(leased)
        found: list[int] = []
        while len(found) < count and (self._left or self._again):
            slots, times = self._take(count - len(found))
            now = self._used[slots]
            gone = (self._tags[slots] & _STATE) != LIVE
            gone |= self._keeps[slots] >= KEEP_PINNED
            same = now == times
            if leased or (~(gone | same) & (now <= self._horizon)).any():
                self._look_at_each(slots, now, same, gone, leased, found)
            else:
                found += slots[same & ~gone].tolist()
        return found

    def _pop_one(self, leased: Set[int]) -> list[int]:
        """`_pop_many` of one, in fewer steps."""
        while self._next < len(self._slots):
            slot, then = int(self._slots[self._next]), int(self._times[self._next])
            self._next += 1
            state, now = int(self._tags[slot]) & STATE_MASK, int(self._used[slot])
            if state != LIVE or slot in leased or int(self._keeps[slot]) >= KEEP_PINNED:
                continue
            if now == then:
                return [slot]
            if now <= self._horizon:
                self._again.add((now, slot))
                return self._pop_many(1)
        return []

    def _look_at_each(
        self,
        slots: Slots,
        now: Times,
        same: npt.NDArray[np.bool_],
        gone: npt.NDArray[np.bool_],
        leased: Set[int],
        found: list[int],
    ) -> None:
        taken = zip(slots.tolist(), now.tolist(), same.tolist(), gone.tolist(), strict=True)
        for at, (slot, used, is_same, is_gone) in enumerate(taken):
            if is_gone or slot in leased:
                continue
            if is_same:
                found.append(slot)
            elif used <= self._horizon:
                self._again.add((used, slot))
                # It may be older than the rest of what was taken, all of the sorted part.
                self._next -= len(slots) - at - 1
                break

    def _take(self, count: int) -> tuple[Slots, Times]:
        """Up to `count` candidates, the oldest first, with the times they had."""
        if self._again:
            time, slot = self._again[0]
            first = self._next
            if not self._left or (time, slot) < (int(self._times[first]), int(self._slots[first])):
                del self._again[0]
                return np.array([slot], np.int64), np.array([time], np.uint64)
            count = 1
        taken = slice(self._next, self._next + count)
        slots, times = self._slots[taken], self._times[taken]
        self._next += len(slots)
        return slots, times

    def put_back(self, slots: list[int]) -> None:
        """Blocks that were found oldest stay after all."""
        for slot in slots:
            used = int(self._used[slot])
            if used <= self._horizon:  # used a moment ago, it comes back with the next ones sorted
                self._again.add((used, slot))

    def _refill(self) -> bool:
        live = np.flatnonzero(((self._tags & _STATE) == LIVE) & (self._keeps < KEEP_PINNED))
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
        order = np.lexsort((live, used))
        self._times, self._slots, self._next = used[order], live[order], 0
        self._horizon = int(used.max())
        return True
