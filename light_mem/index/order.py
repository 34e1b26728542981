"""Order of use of one shard's blocks: exact least-recently-used, without a shared list.

Every look-up stores the time of the use: one plain store, no lock. Who must evict
sorts out the oldest blocks once and then takes them one after the other, looking again at each:
one that was used meanwhile goes back to where it belongs. A block outside the sorted part is
never older than the sorted part's youngest, because times only grow.

Pinned and leased blocks are passed over where they are met and are not sorted out at all, so many
of them cost an eviction nothing. They come back by being used: unpinning and the end of a lease
store the time, as a look-up does.

A replica in one process, used under the shard's lock. Who must not scan takes candidates that
another thread has sorted out without the lock (`sort_out`). However old they are, the order stays
exact: nothing else was used before the youngest of them, since that is older than the scan.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Set
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from sortedcontainers import SortedList

from light_mem.index.format import KEEP_PINNED, LIVE, STATE_MASK, states_of
from light_mem.index.runs import pieces

MIN_BATCH = 1024  # blocks sorted out at a time at least
MAX_BATCH = 16384  # sorting more would hold the lock for longer than the scan itself
BATCH_PART = 8  # ... and an eighth of all, so that the scan costs little a block
# Sorted out by another thread, they need not last as long.
MAX_AHEAD = 4096
# Candidates that may be looked at for one block by who must not take long: some 80 us. Most were
# used or evicted by others since they were sorted out if none of these can go.
MAX_LOOKS = 256
LOW_PART = 4  # the last quarter of the sorted part: time to sort out the next
# A use up to this far in the future is a race with our clock reading, not a clock that was set
# ahead.
_AHEAD_NS = 10**9


class Candidates(NamedTuple):
    """Blocks sorted out, the oldest first."""

    times: memoryview  # of last use, uint64; not lists, which would take five times the memory
    slots: memoryview  # int64


_NONE = Candidates(memoryview(b""), memoryview(b""))
_ALL = 1 << 62


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
        self._times, self._slots = _NONE
        self._next = 0
        self._again: SortedList = SortedList()
        self._horizon = 0  # no block outside the candidates was used before this time
        self._ahead: Candidates | None = None  # sorted out ahead; stored by another thread

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

    def oldest_at_hand(self) -> int | None:
        """`oldest` of what is sorted out by now, here or by `sort_out`, without a long search;
        None: the scan of the next call of either may find one."""
        if self._ahead is not None:
            # At once: later, those that come first there would have been evicted. What is left of
            # the others is among the new ones, or younger.
            self._begin_with(self._ahead)
            self._ahead = None
            self._again.clear()
        found = self._pop_many(1, MAX_LOOKS)
        return found[0] if found else None

    @property
    def is_running_low(self) -> bool:
        """Whether `oldest_at_hand` will want another `sort_out` soon."""
        left = len(self._slots) - self._next
        return self._ahead is None and left * LOW_PART <= len(self._slots)

    def _pop_many(self, count: int, looks: int = _ALL) -> list[int]:
        leased, tags, keeps, uses = self._leased(), self._tags, self._keeps, self._uses
        slots, again = self._slots, self._again
        found: list[int] = []
        for _ in range(looks):
            if len(found) == count or not (self._next < len(slots) or again):
                break
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

    def _put_right(self, live: npt.NDArray[np.int64], used: npt.NDArray[np.uint64]) -> None:
        """Times in the future (a clock once set ahead) are moved to now, keeping
        their order; otherwise every new block would look older and be evicted first."""
        now = time.time_ns()
        if int(used.max()) - now > _AHEAD_NS:
            late = np.flatnonzero(used > now)
            late = late[np.argsort(used[late], kind="stable")]
            used[late] = np.arange(now - late.size + 1, now + 1, dtype=np.uint64)
            np.asarray(self._uses)[live[late]] = used[late]

    def _refill(self) -> bool:
        live, used = self._evictable(self._leased())
        if not live.size:
            return False
        self._put_right(live, used)
        self._begin_with(_oldest_of(live, used, live.size, MAX_BATCH))
        return True

    def _begin_with(self, sorted_out: Candidates) -> None:
        self._times, self._slots = sorted_out
        self._next = 0
        self._horizon = self._times[-1]

    def sort_out(self, leased: Set[int], before: int) -> bool:
        """Have candidates at hand for `oldest_at_hand`; returns whether there are any. One thread,
        and not under the shard's lock: what happens meanwhile to a candidate is seen when it is
        taken.

        `leased`, and `before`, ns since 1970: of a moment at which the lock was held, before this
        call. A block published, unpinned or no longer leased since then has a later time, so only
        blocks used before are candidates.
        """
        live, used = self._evictable(leased)
        if not live.size or int(used.max()) - time.time_ns() > _AHEAD_NS:
            return False  # times in the future are put right under the lock
        past = used < before
        if not past.any():
            return False
        self._ahead = _oldest_of(live[past], used[past], live.size, MAX_AHEAD)
        return True

    def _evictable(self, leased: Set[int]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint64]]:
        """First slots of the blocks that may go, and when they were used; shapes [n]."""
        tags, keeps, uses = (np.asarray(each) for each in (self._tags, self._keeps, self._uses))
        slots: list[npt.NDArray[np.int64]] = []
        used: list[npt.NDArray[np.uint64]] = []
        for piece in pieces(len(tags)):
            part = np.flatnonzero((states_of(tags[piece]) == LIVE) & (keeps[piece] < KEEP_PINNED))
            slots.append(part + piece.start)
            used.append(uses[piece][part])
        live, times = np.concatenate(slots), np.concatenate(used)
        if leased and live.size:
            free = ~np.isin(live, list(leased))
            live, times = live[free], times[free]
        return live, times


def _oldest_of(
    live: npt.NDArray[np.int64], used: npt.NDArray[np.uint64], evictable: int, most: int
) -> Candidates:
    """The oldest part of some blocks, at least one, of a shard in which so many may go."""
    count = min(live.size, most, max(MIN_BATCH, evictable // BATCH_PART))
    if count < live.size:
        part = np.argpartition(used, count - 1)[:count]
        # With those that were used at the same moment, as a batch is: among them the slot
        # decides, and not what the partition happens to do.
        ties = np.flatnonzero(used <= used[part].max())
        if ties.size < 2 * count:
            part = ties
        live, used = live[part], used[part]
    order = np.lexsort((live, used))
    return Candidates(used[order].data, live[order].data)
