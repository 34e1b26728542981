"""Order of use of one shard's blocks: exact least-recently-used, without a shared list.

Every look-up stores the time of the use: one plain store, no lock. Who must evict
sorts out the oldest blocks once and then takes them one after the other, looking again at each:
one that was used meanwhile goes back to where it belongs. A block outside the sorted part is
never older than the sorted part's youngest, because times only grow.

Pinned and leased blocks are passed over where they are met and are not sorted out at all, so many
of them cost an eviction nothing. They come back by being used: unpinning and the end of a lease
store the time, as a look-up does.

A replica in one process, used under the shard's lock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Set

import numpy as np
import numpy.typing as npt
from sortedcontainers import SortedList

from light_mem.index.format import KEEP_PINNED, LIVE, STATE_MASK, states_of

MIN_BATCH = 1024  # blocks sorted out at a time at least
MAX_BATCH = 16384  # sorting more would hold the lock for longer than the scan itself
BATCH_PART = 8  # ... and an eighth of all, so that the scan costs little a block
# A use up to this far in the future is a race with our clock reading, not a clock that was set
# ahead.
_AHEAD_NS = 10**9


class EvictionOrder:
    """Candidates for eviction of one shard; `tags`, `keeps` and `uses` are those of its slots,
    `leased` says which first slots are leased at the moment."""

    def __init__(
        self,
        tags: npt.NDArray[np.uint64],
        uses: npt.NDArray[np.uint64],
        keeps: npt.NDArray[np.uint32],
        leased: Callable[[], Set[int]] = frozenset,
    ) -> None:
        self._tags, self._uses, self._keeps = tags.data, uses.data, keeps.data
        self._leased = leased
        # The sorted part, oldest first, from `_next` on; and (time of use, slot) of those that were
        # used meanwhile.
        self._times: list[int] = []
        self._slots: list[int] = []
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

    def _pop_many(self, count: int) -> list[int]:
        leased, tags, keeps, uses = self._leased(), self._tags, self._keeps, self._uses
        slots, again = self._slots, self._again
        found: list[int] = []
        while len(found) < count and (self._next < len(slots) or again):
            if not again or (
                self._next < len(slots) and (self._times[self._next], slots[self._next]) < again[0]
            ):
                then, slot = self._times[self._next], slots[self._next]
                self._next += 1
            else:
                then, slot = again.pop(0)
            gone = tags[slot] & STATE_MASK != LIVE
            if gone or keeps[slot] >= KEEP_PINNED or slot in leased:
                continue
            now = uses[slot]
            if now == then:
                found.append(slot)
            elif now <= self._horizon:
                again.add((now, slot))
        return found

    def put_back(self, slots: list[int]) -> None:
        """Take back blocks that `oldest_many` gave and that are not evicted after all."""
        for slot in slots:
            used = self._uses[slot]
            if used <= self._horizon:  # used a moment ago, it comes back with the next ones sorted
                self._again.add((used, slot))

    def _not_ahead(self, live: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
        """Times of last use. Times in the future (a clock once set ahead) are moved to now, keeping
        their order; otherwise every new block would look older and be evicted first."""
        uses = np.asarray(self._uses)
        used: npt.NDArray[np.uint64] = uses[live]
        now = time.time_ns()
        if int(used.max()) - now > _AHEAD_NS:
            late = np.flatnonzero(used > now)
            late = late[np.argsort(used[late], kind="stable")]
            used[late] = np.arange(now - late.size + 1, now + 1, dtype=np.uint64)
            uses[live[late]] = used[late]
        return used

    def _refill(self) -> bool:
        states = states_of(np.asarray(self._tags))
        live = np.flatnonzero((states == LIVE) & (np.asarray(self._keeps) < KEEP_PINNED))
        leased = self._leased()
        if leased:
            live = live[~np.isin(live, list(leased))]
        if not live.size:
            return False
        used = self._not_ahead(live)
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
        self._times, self._slots, self._next = used[order].tolist(), live[order].tolist(), 0
        self._horizon = int(used.max())
        return True
