"""Room for blocks in one shard: free slots, else those of blocks that expired or were used
longest ago.

Used under the shard's lock. What is allocated is the caller's only after it was marked.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from light_mem.index.chains import Chains
from light_mem.index.control import Control
from light_mem.index.leases import ShardLeases
from light_mem.index.order import EvictionOrder
from light_mem.index.replica import SpaceReplica
from light_mem.index.retention import Retention
from light_mem.index.runs import Run
from light_mem.index.taking import Taking

# A block in more runs than this costs its reader more than evicting one block further does.
MAX_PIECES = 8
MOST_EVICTED = 32  # by who must not take long: each takes some 20 us


class Allocation(NamedTuple):
    """Slots taken for one block: WRITING until published or given back."""

    slot: int
    runs: list[Run]


class Allocator:
    """Finds room in one shard, under its lock."""

    def __init__(
        self,
        control: npt.NDArray[np.void],
        entries: npt.NDArray[np.void],
        page_bytes: int,
        chains: Chains,
        space: SpaceReplica,
        order: EvictionOrder,
        taking: Taking,
        retention: Retention,
        leases: ShardLeases,
    ) -> None:
        self._control = Control(control)
        self._entries = entries
        self._nbytes = entries["nbytes"].data
        self._runs, self._next_runs = entries["run"].data, entries["next_run"].data
        self._page_bytes = page_bytes
        self._chains = chains
        self._space = space
        self._order = order
        self._taking = taking
        self._retention = retention
        self._leases = leases
        self._swept = 0  # expired blocks among those that this hold evicted

    def begin(self) -> None:
        """A hold of the lock begins."""
        self._swept = 0

    def most_slots(self) -> int:
        """The most slots that a block can get: all but those of pinned or leased blocks."""
        limit = self._retention.limit
        if self._retention.is_overcounted:  # a damaged page is not to stop all writes
            self._retention.recount()
        kept = self._control.pinned_slots
        for slot in self._leases.slots():
            if self._retention.is_kept_by_lease(slot):
                # A lease on a longer block is refused: a larger number is damage.
                kept += min(self._retention.slots_at(slot), limit)
        return len(self._entries) - kept

    def allocate(self, slots: int, evicted: list[int], evict: bool = True) -> Allocation | None:
        """Take room for one block, evicting where needed: expired blocks, then the least recently
        used ones, never pinned or leased ones.

        `evict=False`: only free room, in as many pieces as it takes; None when there is too little.

        The first slots of evicted blocks are appended to `evicted`: the caller clears their
        records before anything is copied. None: what is not free is being written, or the block
        has more than `most_slots`; then nothing is evicted for it. The room is the caller's only
        after `mark`.
        """
        return self._allocate(slots, evicted, evict, scan=True, most=math.inf)

    def allocate_at_hand(
        self, slots: int, evicted: list[int], evict: bool, scan: bool
    ) -> Allocation | None:
        """`allocate` for who must not take long. None also where more than MOST_EVICTED blocks
        would have to go, or, with `scan=False`, where a walk over all entries might find room.
        Blocks may have been evicted by then, the oldest ones."""
        return self._allocate(slots, evicted, evict, scan, MOST_EVICTED)

    def _allocate(
        self, slots: int, evicted: list[int], evict: bool, scan: bool, most: float
    ) -> Allocation | None:
        if slots > len(self._entries):
            return None
        is_possible = False
        while True:
            space = self._space.runs  # evicting a damaged block reads it anew
            start = space.take(slots)
            if start is not None:
                runs = [(start, slots)]
                break
            pieces = space.take_pieces(slots)
            if not evict:
                if pieces is None:
                    return None
                runs = pieces
                break
            few = len(evicted) - self._swept < 2 * MAX_PIECES
            if pieces is not None and len(pieces) > MAX_PIECES and few:
                self._space.put_back(pieces)
                pieces = None
            if pieces is not None:
                runs = pieces
                break
            if scan:
                if self._sweep(evicted):
                    continue
            elif self._retention.is_due() or self._retention.is_overcounted:
                return None
            if not is_possible and slots > self.most_slots():
                return None
            is_possible = True
            if len(evicted) >= most:
                return None
            victim = self._order.oldest() if scan else self._order.oldest_at_hand()
            if victim is None:
                if not scan:
                    return None
                pieces = space.take_pieces(slots)
                if pieces is None:
                    return None
                runs = pieces
                break
            evicted.append(victim)
            self._control.evictions += 1
            left = self._taking.take_out(victim)
            if left == [(victim, slots)]:
                # The usual case of a full store: the free slots stay what they were for everyone.
                self._space.unmarked += left
                return Allocation(victim, left)
            if left is not None:
                self._taking.free_runs(left)
        self._space.taken(runs)
        return Allocation(runs[0][0], runs)

    def allocate_many(
        self, lengths: list[int], evicted: list[int], evict: bool = True
    ) -> list[Allocation]:
        """`allocate` for blocks of `lengths` slots, in this order, up to the first without room.

        Blocks of one length follow each other on neighbouring slots where there is room, and take
        the slots of evicted blocks of that length as they are.
        """
        given: list[Allocation] = []
        uniform = len(set(lengths)) == 1
        while len(given) < len(lengths):
            length = lengths[len(given)]
            alike = len(lengths) - len(given) if uniform else 1
            space = self._space.runs
            count = min(alike, space.longest // length)
            start = space.take(count * length) if count else None
            if start is not None:
                self._space.taken([(start, count * length)])
                given += [
                    Allocation(at, [(at, length)])
                    for at in range(start, start + count * length, length)
                ]
                continue
            if evict and alike > 1 and space.total < length and not self._sweep(evicted):
                victims = self._evict_alike(alike, length)
                if victims:
                    evicted += victims
                    given += [Allocation(slot, [(slot, length)]) for slot in victims]
                    continue
            where = self.allocate(length, evicted, evict)
            if where is None:
                break
            given.append(where)
        return given

    def _sweep(self, evicted: list[int]) -> int:
        """Take out blocks that have expired; returns how many."""
        slots = self._retention.take_expired()
        for slot in slots:
            self._taking.remove(slot)
        if slots:
            self._retention.expect_next()
        evicted += slots
        self._swept += len(slots)
        self._control.evictions += len(slots)
        return len(slots)

    def _evict_alike(self, count: int, length: int) -> list[int]:
        """Evict up to `count` blocks, the oldest ones, as long as each is one run of `length`
        slots; its slots are taken, not free. Empty: the oldest is another kind of block."""
        oldest = self._order.oldest_many(count)
        most = len(self._entries) - length
        for good, slot in enumerate(oldest):
            pages = -(-self._nbytes[slot] // self._page_bytes)  # a call costs more
            one_run = self._runs[slot] == length and not self._next_runs[slot]
            if not one_run or pages != length or slot > most:
                self._order.put_back(oldest[good:])
                oldest = oldest[:good]
                break
        self._taking.free_tags(oldest)
        for slot in oldest:
            self._chains.cut_out(slot)
        self._control.evictions += len(oldest)
        self._control.unlinks += len(oldest)
        self._control.blocks -= len(oldest)
        self._space.unmarked += [(slot, length) for slot in oldest]
        return oldest

    def take(self, runs: list[Run]) -> Allocation:
        """Take exactly these free slots for one block, as `allocate` would.

        Raises ValueError when they are not free: nothing was taken.
        """
        for at, (start, length) in enumerate(runs):
            if not self._space.runs.remove(start, length):
                self._space.put_back(runs[:at])
                raise ValueError(f"slots {start} to {start + length - 1} are not free")
        self._space.taken(runs)
        return Allocation(runs[0][0], runs)
