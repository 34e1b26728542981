"""Changes to one shard's index, under the shard's lock.

A holder marks the shard dirty, changes it, and takes the mark back. Whoever finds the mark knows
that the holder died in between and first puts the shard in order from its entries.
Look-ups go on all the time, so every change keeps this order:

publish  see `putting.py`
remove   see `taking.py`; who is removed for want of room, `allocation.py`
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence, Set
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from light_mem.index import format as fmt
from light_mem.index.allocation import Allocation, Allocator
from light_mem.index.chains import Chains
from light_mem.index.change import ShardChange, Within
from light_mem.index.control import Control
from light_mem.index.file import IndexFile
from light_mem.index.keys import Key, MixedKeys
from light_mem.index.leases import ShardLeases
from light_mem.index.locks import LOCK_TIMEOUT_SECONDS, PathLock, lock_path
from light_mem.index.lookup import Lookup
from light_mem.index.order import EvictionOrder
from light_mem.index.putting import Putting
from light_mem.index.replica import ScanNeeded, SpaceReplica
from light_mem.index.retention import Retention
from light_mem.index.runs import Run
from light_mem.index.taking import Taking
from light_mem.index.written import Written


class ShardIndex:
    """One shard in one process. All methods but `change` and `prepare` need to be inside
    `with change()`.

    entries   ENTRY [slots]
    uses      uint64 [slots]: when the block at each slot was last used, ns since 1970
    control   CONTROL [1]: the shard's control page; like the others the shared one, not a copy
    """

    def __init__(
        self,
        file: IndexFile,
        shard: int,
        lock: PathLock,
        lookup: Lookup,
        leased: Callable[[], set[int]] | None = None,
    ) -> None:
        """`leased` tells the first slots that living processes have leased; None: none are."""
        self._f = file
        self.shard = shard
        self._lock = lock
        self._lookup = lookup
        self.control, heads, self.entries, self.uses = file.of_shard(shard)
        self._control = Control(self.control)
        self._tags = self.entries["tag"]
        self._chains = Chains(heads, self.entries)
        self._space = SpaceReplica(self.control, self.entries)
        self.leases = ShardLeases(self.control, leased, file.slots)
        page_bytes = file.geometry.page_bytes
        self.retention = Retention(self.control, self.entries, self.uses, page_bytes)
        self._putting = Putting(file, shard, self._chains, self._control, self.retention)
        self._taking = Taking(
            file, shard, lookup, self._chains, self._space, self.retention, self.leases
        )
        self._order = EvictionOrder(self._tags, self.uses, self.entries["keep"], self.leases.slots)
        self._allocator = Allocator(
            self.control,
            self.entries,
            page_bytes,
            self._chains,
            self._space,
            self._order,
            self._taking,
            self.retention,
            self.leases,
        )

    def prepare(self) -> None:
        """Do what need not wait for the first `change`; not inside one."""
        self._lock.prepare()

    def change(
        self,
        timeout: float = LOCK_TIMEOUT_SECONDS,
        within: Within | None = None,
        most_runs: float = math.inf,
    ) -> ShardChange:
        """Hold the shard's lock and have its state at hand; raises LockTimeoutError.

        `within` is entered with the lock in hand and before anything is changed, and left after
        the last change; what it raises passes through, and the shard is as it was.
        Yields whether the shard had to be put in order: then some slots that are free now may
        still have records. An exception inside leaves the dirty mark: the next holder then puts
        things in order, exactly as after a death.

        `most_runs=0`: nothing in this hold goes over all entries of the shard, which takes
        milliseconds. Where the shard must be put in order, or this process knows too little of its
        free space, it raises ScanNeeded, and the shard is as it was; also inside, where damage is
        met, and then the next holder puts it in order. Another number: entries may be gone over,
        but where more free runs are found it raises the same; to note them takes longer.
        """
        begin = self._begin if most_runs == math.inf else partial(self._begin_within, most_runs)
        return ShardChange(self._lock, begin, self._end, timeout, within)

    def _begin_within(self, most_runs: float) -> bool:
        if self._control.dirty or not (most_runs or self._space.is_near):
            raise ScanNeeded
        return self._begin(most_runs)

    def _begin(self, most_runs: float = math.inf) -> bool:
        self._space.most_runs = most_runs
        self._space.unmarked = []
        self.leases.forget()
        self._allocator.begin()
        recovered = bool(self._control.dirty)
        if recovered:
            self.put_in_order()
        self._space.begin()  # it may refuse: then the shard is as it was
        self._control.dirty = fmt.CHANGING
        return recovered

    def _end(self, is_whole: bool) -> None:
        if is_whole:
            self._control.dirty = 0
        else:
            self._space.distrust()

    def unlisted_slots(self) -> npt.NDArray[np.intp]:
        """Slots whose records must not describe a block: no block starts there, or it was taken
        out while it was leased."""
        states = fmt.states_of(self._tags)
        return np.flatnonzero((states == fmt.FREE) | (states == fmt.HELD))

    def find(self, low: int, high: int) -> int | None:
        """First slot of the listed block of this key, or None; see `find_many`."""
        entry = self._lookup.find_one(low, high, touch=False, expired=True)
        return None if entry < 0 else entry - self.shard * self._f.slots

    def find_many(self, keys: list[Key]) -> list[int]:
        """First slots of the listed blocks of these keys of this shard, -1: not listed. A block
        that has expired is listed until it is taken out, and counts as absent."""
        pairs = np.array(keys, np.uint64).reshape(-1, 2)
        return self._slots_of(self._lookup.find(pairs, touch=False, expired=True).tolist())

    def find_mixed(self, keys: MixedKeys) -> list[int]:
        """`find_many`, for the batch of a writer, whose keys are new as a rule."""
        chains, find = self._chains, self._lookup.find_one
        # Where blocks are of many pages most chains are empty.
        return self._slots_of(
            [
                find(low, high, touch=False, expired=True, mixed=mixed)
                if chains.is_begun(mixed)
                else -1
                for (low, high), mixed in zip(keys.pairs, keys.mixed, strict=True)
            ]
        )

    def _slots_of(self, entries: list[int]) -> list[int]:
        first = self.shard * self._f.slots
        return [-1 if entry < 0 else entry - first for entry in entries]

    def stamp(self) -> tuple[int, int]:
        """A value that differs if a block of this shard may have been stored in between. Within
        `change`."""
        # If a holder dies after a block entered its chain but before it was counted, the next one
        # puts the shard in order, and that counts as cutting chains.
        return self._control.inserts, self._control.unlinks

    # --- room ------------------------------------------------------------------------------------

    def allocate(self, slots: int, evicted: list[int], evict: bool = True) -> Allocation | None:
        """Room for one block; see `Allocator.allocate`."""
        return self._allocator.allocate(slots, evicted, evict)

    def allocate_at_hand(
        self, slots: int, evicted: list[int], evict: bool, scan: bool
    ) -> Allocation | None:
        """Room for one block without taking long; see `Allocator.allocate_at_hand`."""
        return self._allocator.allocate_at_hand(slots, evicted, evict, scan)

    def allocate_many(
        self, lengths: list[int], evicted: list[int], evict: bool = True
    ) -> list[Allocation]:
        """Room for several blocks; see `Allocator.allocate_many`."""
        return self._allocator.allocate_many(lengths, evicted, evict)

    def most_slots(self) -> int:
        """Slots that a block of this shard has at most; see `Allocator.most_slots`."""
        return self._allocator.most_slots()

    def has_room(self, slots: int) -> bool:
        """Whether so many slots are free, one after the other."""
        return self._space.runs.longest >= slots

    def take(self, runs: list[Run]) -> Allocation:
        """Exactly these free slots; see `Allocator.take`."""
        return self._allocator.take(runs)

    # --- preparing what must not scan ------------------------------------------------------------

    @property
    def is_near(self) -> bool:
        """Whether `change(most_runs=0)` would not refuse for want of knowledge of the free space.
        Any thread, without the lock: a hint."""
        return self._space.is_near

    @property
    def is_running_low(self) -> bool:
        """Whether few blocks are left that a hold which must not scan can evict."""
        return self._order.is_running_low

    def sorting(self) -> Callable[[], bool]:
        """What sorts out the blocks to be evicted by holds that must not scan; to be called when
        this hold has ended, in any thread, one at a time. It returns whether there are any."""
        # Both as of this hold: nobody is in the middle of publishing a block with an earlier time.
        return partial(self._order.sort_out, frozenset(self.leases.slots()), time.time_ns())

    # --- writing a block -------------------------------------------------------------------------

    def mark(self, runs: list[Run], owner: int) -> None:
        """Mark allocated slots as being written by `owner`, whose intents already name them."""
        self._putting.mark(runs, owner)
        self._space.unmarked = [run for run in self._space.unmarked if run not in runs]

    def mark_many(self, allocations: list[Allocation], owner: int) -> None:
        """`mark` for everything that was allocated in this hold."""
        for where in allocations:
            self._putting.mark(where.runs, owner)
        self._space.unmarked = []

    def is_marked(self, slot: int, owner: int) -> bool:
        """Whether the block at `slot` is still being written by `owner`."""
        return self.are_marked([slot], owner)[0]

    def are_marked(self, slots: list[int], owner: int) -> list[bool]:
        """`is_marked` for several."""
        return self._putting.are_marked(slots, owner)

    def publish(self, blocks: Sequence[Written], mixed: Sequence[int], now: int) -> None:
        """Make blocks visible; see `Putting.publish`."""
        self._putting.publish(blocks, mixed, now)

    # --- taking blocks out -----------------------------------------------------------------------

    def remove(self, slot: int) -> None:
        """Take out the stored block at `slot`; its slots are free, or HELD while it is leased."""
        self._taking.remove(slot)

    def give_back(self, slot: int) -> None:
        """Free the slots of a block that was being written: it was never visible."""
        self._taking.give_back(slot)

    def release(self, slot: int, leased: Set[int]) -> None:
        """A lease on the block at `slot` ends; see `Taking.release`."""
        self._taking.release(slot, leased)

    def clear(self) -> list[int]:
        """Take out all stored blocks; returns their first slots. Blocks being written stay so."""
        return self._taking.clear()

    def put_in_order(self) -> None:
        """Chains, counts and free space anew from the entries; what makes no sense is freed.

        After a death `change` does it by itself; repairs call it.
        """
        self._taking.put_in_order()


def open_shard(
    directory: Path, file: IndexFile, shard: int, lookup: Lookup, leased: Callable[[], set[int]]
) -> ShardIndex:
    """One shard of a store, with its lock `shard-NNN.lock`."""
    lock = PathLock(lock_path(directory, f"shard-{shard:03}"))
    return ShardIndex(file, shard, lock, lookup, leased)
