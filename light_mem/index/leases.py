"""Leases: blocks that a process looks at in place, and whose slots nobody gets meanwhile.

A lease is a number in its holder's record in the `owners` file, so it ends with the process, by
whatever it dies: a record whose byte is not locked is that of a dead process, and its leases do
not count. Leases are taken and given back under the lock of the block's shard.

    evictor      passes leased blocks over
    taking out   (delete, clear, replacement, damage) unlists a leased block at once; its slots stay
                 HELD until the last lease of a living process has ended
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Set

import numpy as np
import numpy.typing as npt

from light_mem.index.control import Control
from light_mem.index.format import ShardSlot, named_slot, slot_word
from light_mem.index.owners import Owners

_NONE: frozenset[int] = frozenset()


class Leases:
    """The leases of one process, and who else has some. Any thread."""

    def __init__(self, owners: Owners, number: int) -> None:
        """`number` is the process's own among the owners."""
        self._owners = owners
        self.number = number
        self._words = owners.records["leases"][number]
        self._held: Counter[ShardSlot] = (
            Counter()
        )  # several on one block are one word in the record
        self._guard = threading.RLock()  # a finalizer may close an engine while this thread has it
        # Leases of views that were dropped without `close`: finalizers may not take locks.
        self.dropped: deque[ShardSlot] = deque()
        self.ending = threading.Lock()  # only tried: of the thread that ends these, once closed
        self.closed = False

    @property
    def open(self) -> int:
        """How many leases this process holds."""
        with self._guard:
            return sum(self._held.values())

    def count(self, shard: int, slot: int) -> int:
        """How many of them are on one block; only a holder of the shard's lock changes that."""
        return self._held.get((shard, slot), 0)

    def close(self) -> bool:
        """Take no more leases, unless views are still open. True to one caller only, who must then
        leave the store.

        Leases of dropped views that could not be ended do not count as open: they end with the
        membership.
        """
        with self._guard:  # as `take` does: else one would come between the look and the mark
            if self.closed or self.open > len(self.dropped):
                return False
            self.closed = True
            return True

    def of_shard(self, shard: int, but: int = 0) -> set[int]:
        """First slots that living processes, this one too, have leased; under the shard's lock.
        `but`: an owner whose leases do not count."""
        records = self._owners.records
        numbers = np.flatnonzero(records["pid"].copy())
        numbers = numbers[numbers != but]
        words = records["leases"][numbers]
        mine = (words - np.uint64(1)) >> np.uint64(32) == shard  # an empty word is of no shard
        found: set[int] = set()
        for at in np.flatnonzero(mine.any(axis=1)).tolist():
            if self._owners.is_alive(int(numbers[at])):
                found.update(((words[at][mine[at]] - np.uint64(1)) & np.uint64(2**32 - 1)).tolist())
        return found

    def take(self, shard: int, slot: int) -> bool:
        """Note a lease, under the shard's lock; False: this process has MAX_LEASES already, or is
        leaving (`closed`), and then its record may be another's soon."""
        with self._guard:
            if self.closed:
                return False
            if not self._held[shard, slot]:
                free = np.flatnonzero(self._words == 0)
                if not free.size:
                    del self._held[shard, slot]
                    return False
                self._words[free[0]] = slot_word(shard, slot)
            self._held[shard, slot] += 1
        return True

    def ends(self, shard: int, slot: int) -> bool:
        """End one of this process's leases on a block. Returns whether it was the last one; then
        `forget_own` must follow in this hold of the shard's lock."""
        with self._guard:
            self._held[shard, slot] -= 1
            last = self._held[shard, slot] <= 0
            if last:
                del self._held[shard, slot]
        return last

    def forget_own(self, shard: int, slot: int) -> None:
        """Remove the lease from this process's record. Call it after its slots, if HELD, were given
        back: a kill in between then leaves an extra lease rather than slots lost for good."""
        with self._guard:
            self.forget(self.number, shard, slot)

    def of_owner(self, number: int) -> list[ShardSlot]:
        """The leases of an owner, dead or alive."""
        return [
            named_slot(word) for word in self._owners.records["leases"][number].tolist() if word
        ]

    def forget(self, number: int, shard: int, slot: int) -> None:
        """Remove a lease of a dead owner, whose byte the caller has locked. Under the shard's lock:
        while that byte is locked others take the owner for alive, and its lease too."""
        words = self._owners.records["leases"][number]
        words[words == slot_word(shard, slot)] = 0


class ShardLeases:
    """Which blocks of one shard are leased, as evictions and removals see it during one hold.

    If the shard's control page says that none can be, the records are not read.
    """

    def __init__(
        self, control: npt.NDArray[np.void], read: Callable[[], set[int]] | None, slots: int
    ) -> None:
        """`slots`: of the shard. What leases name beyond them is damage, and of no block."""
        self._control = Control(control)
        self._read = read
        self._slots = slots
        self._known: Set[int] | None = None

    def forget(self) -> None:
        """A hold of the lock begins, or leases have changed in this one."""
        self._known = None

    def announce(self) -> None:
        """A lease is about to be taken."""
        self._control.leased = 1
        self._known = None

    def slots(self) -> Set[int]:
        """First slots of leased blocks."""
        if self._known is None:
            self._known = _NONE
            if self._read is not None and self._control.leased:
                self._known = {slot for slot in self._read() if slot < self._slots}
                if not self._known:
                    self._control.leased = 0
        return self._known
