"""Changes to one shard's index, under the shard's lock.

A holder marks the shard dirty, changes it, and takes the mark back. Whoever finds the mark knows
that the holder died in between and first puts the shard in order from its entries.
Look-ups go on all the time, so every change keeps this order:

publish  fields of the entry -> tag LIVE -> head of the chain: found only when whole
remove   tag FREE with a new generation -> cut from the chain -> slots may be used again: a reader
         that copied from the slots sees another tag

What a batch does to many blocks it does to all of them step by step, by numpy calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from light_mem.index import format as fmt
from light_mem.index.chains import FEW, Chains, next_generations, tags_of
from light_mem.index.file import IndexFile
from light_mem.index.locks import LOCK_TIMEOUT_SECONDS, PathLock, lock_path
from light_mem.index.lookup import Lookup
from light_mem.index.order import EvictionOrder
from light_mem.index.recovery import link_chains, sound_blocks
from light_mem.index.replica import Run, SpaceReplica

# A block in more runs than this costs its reader more than evicting one block further does.
MAX_PIECES = 8

Key = tuple[int, int]  # low, high


class Allocation(NamedTuple):
    """Slots taken for one block: WRITING until published or given back."""

    slot: int
    runs: list[Run]


class ShardIndex:
    """One shard in one process. All methods but `change` need to be inside `with change()`."""

    def __init__(self, file: IndexFile, shard: int, lock: PathLock, lookup: Lookup) -> None:
        self._f = file
        self.shard = shard
        self._lock = lock
        self._lookup = lookup
        self._control = file.control[shard : shard + 1]
        self._entries = file.entries[shard * file.slots : (shard + 1) * file.slots]
        self._heads = file.heads[shard * file.buckets : (shard + 1) * file.buckets]
        self._tags = self._entries["tag"]
        self._chains = Chains(self._heads, self._entries)
        self._order = EvictionOrder(self._tags, self._entries["used"])
        self._space = SpaceReplica(self._control, self._entries)

    @contextmanager
    def change(self, timeout: float = LOCK_TIMEOUT_SECONDS) -> Iterator[bool]:
        """Hold the shard's lock and have its state at hand; raises LockTimeoutError.

        Yields whether the shard had to be put in order: then some slots that are free now may
        still have records. An exception inside leaves the dirty mark: the next holder then puts
        things in order, exactly as after a death.
        """
        with self._lock.hold(timeout):
            self._space.unmarked = []
            recovered = bool(self._control["dirty"][0])
            if recovered:
                self.put_in_order()
            else:
                self._control["dirty"] = fmt.CHANGING
            self._space.begin()
            try:
                yield recovered
            except BaseException:
                self._space.distrust()
                raise
            self._control["dirty"] = 0

    @property
    def entries(self) -> npt.NDArray[np.void]:
        """The shard's entries, ENTRY [slots]: the shared ones, not a copy."""
        return self._entries

    @property
    def control(self) -> npt.NDArray[np.void]:
        """The shard's control page, CONTROL [1]: the shared one, not a copy."""
        return self._control

    def free_slots(self) -> npt.NDArray[np.intp]:
        """Slots at which no block and no run of one starts."""
        return np.flatnonzero((self._tags & np.uint64(fmt.STATE_MASK)) == fmt.FREE)

    def find(self, low: int, high: int) -> int | None:
        """First slot of the stored block of this key, or None."""
        [slot] = self.find_many([(low, high)])
        return None if slot < 0 else slot

    def find_many(self, keys: list[Key]) -> list[int]:
        """First slots of the stored blocks of these keys of this shard, -1: not stored."""
        first = self.shard * self._f.slots
        if len(keys) <= FEW:
            entries = self._lookup.find_each(keys, touch=False)
            return [-1 if entry < 0 else entry - first for entry in entries]
        slots = [-1] * len(keys)
        # Most keys of a write are new, and where blocks are of many pages most chains are empty.
        some = np.flatnonzero(self._chains.begun(np.array(keys, np.uint64))).tolist()
        found = self._lookup.find_each([keys[at] for at in some], touch=False)
        for at, entry in zip(some, found, strict=True):
            slots[at] = -1 if entry < 0 else entry - first
        return slots

    def stamp(self) -> tuple[int, int]:
        """Another one when a block of this shard may have been stored since; asked in a hold."""
        # A holder that died after a block was in its chain, and before it was counted, makes the
        # next one put the shard in order, which counts as cuts of chains.
        return int(self._control["inserts"][0]), int(self._control["unlinks"][0])

    # --- room ------------------------------------------------------------------------------------

    def allocate(self, slots: int, evicted: list[int], evict: bool = True) -> Allocation | None:
        """Take room for one block, evicting the least recently used ones where needed.

        `evict=False`: only free room, in as many pieces as it takes; None when there is too little.

        The first slots of evicted blocks are appended to `evicted`: the caller clears their
        records before anything is copied. None: what is not free is being written, or the block
        is larger than the shard. The room is the caller's only after `mark`.
        """
        if slots > self._f.slots:
            return None
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
            if pieces is not None and len(pieces) > MAX_PIECES and len(evicted) < 2 * MAX_PIECES:
                self._space.put_back(pieces)
                pieces = None
            if pieces is not None:
                runs = pieces
                break
            victim = self._order.oldest()
            if victim is None:
                pieces = space.take_pieces(slots)
                if pieces is None:
                    return None
                runs = pieces
                break
            evicted.append(victim)
            self._control["evictions"] += 1
            left = self._take_out(victim)
            if left == [(victim, slots)]:
                # The usual case of a full store: the free slots stay what they were for everyone.
                self._space.unmarked += left
                return Allocation(victim, left)
            if left is not None:
                self._free_runs(left)
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
            if evict and alike > FEW and space.total < length:
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

    def _evict_alike(self, count: int, length: int) -> list[int]:
        """Evict up to `count` blocks, the oldest ones, as long as each is one run of `length`
        slots; its slots are taken, not free. Empty: the oldest is another kind of block."""
        oldest = self._order.oldest_many(count)
        if not oldest:
            return []
        entries = self._entries[oldest]
        pages = -(-entries["nbytes"].astype(np.int64) // self._f.geometry.page_bytes)
        fits = (entries["run"] == length) & (entries["next_run"] == 0) & (pages == length)
        fits &= np.array(oldest) + length <= self._f.slots
        good = len(oldest) if fits.all() else int(fits.argmin())
        self._order.put_back(oldest[good:])
        victims = oldest[:good]
        if not victims:
            return []
        slots = np.array(victims, np.int64)
        self._control["evictions"] += good
        self._tags[slots] = tags_of(fmt.FREE, 0, next_generations(self._tags[slots]))
        self._chains.cut_out_many(slots)
        self._control["unlinks"] += good
        self._control["blocks"] -= good
        self._space.unmarked += [(slot, length) for slot in victims]
        return victims

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

    # --- writing a block -------------------------------------------------------------------------

    def mark(self, runs: list[Run], owner: int) -> None:
        """Mark allocated slots as being written by `owner`, whose intents already name them."""
        for at, (start, length) in enumerate(runs):
            entry = self._entries[start]
            generation = (int(entry["tag"]) >> fmt.GENERATION_SHIFT) + 1
            entry["run"] = length
            entry["next_run"] = runs[at + 1][0] + 1 if at + 1 < len(runs) else 0
            state = fmt.WRITING if at == 0 else fmt.EXTENT
            entry["tag"] = fmt.make_tag(state, owner, generation)
        self._space.unmarked = [run for run in self._space.unmarked if run not in runs]

    def mark_many(self, allocations: list[Allocation], owner: int) -> None:
        """`mark` for everything that was allocated in this hold."""
        if any(len(where.runs) > 1 for where in allocations) or len(allocations) <= FEW:
            for where in allocations:
                self.mark(where.runs, owner)
            return
        starts = np.array([where.slot for where in allocations], np.int64)
        self._entries["run"][starts] = [where.runs[0][1] for where in allocations]
        self._entries["next_run"][starts] = 0
        self._tags[starts] = tags_of(fmt.WRITING, owner, next_generations(self._tags[starts]))
        self._space.unmarked = []

    def is_marked(self, slot: int, owner: int) -> bool:
        """Whether the block at `slot` is still being written by `owner`."""
        tag = int(self._tags[slot])
        return (
            tag & fmt.STATE_MASK == fmt.WRITING and tag >> fmt.OWNER_SHIFT & fmt.OWNER_MASK == owner
        )

    def publish(self, slot: int, low: int, high: int, checksum: int, nbytes: int, now: int) -> None:
        """Make a block visible. Its bytes and its record are in place."""
        entry = self._entries[slot]
        entry["low"], entry["high"] = low, high
        entry["checksum"], entry["nbytes"], entry["used"] = checksum, nbytes, now
        tag = fmt.make_tag(fmt.LIVE, 0, int(entry["tag"]) >> fmt.GENERATION_SHIFT)
        self._chains.put_in(slot, low, high, tag)
        self._control["blocks"] += 1
        self._control["inserts"] += 1

    def publish_many(
        self,
        firsts: list[int],
        keys: list[Key],
        checksums: list[int],
        nbytes: list[int],
        now: int,
    ) -> None:
        """`publish` for blocks of different keys, none of which is stored; by first slots."""
        if len(firsts) <= FEW:
            for slot, (low, high), checksum, size in zip(
                firsts, keys, checksums, nbytes, strict=True
            ):
                self.publish(slot, low, high, checksum, size, now)
            return
        entries, slots = self._entries, np.array(firsts, np.int64)
        pairs = np.array(keys, np.uint64)
        entries["low"][slots], entries["high"][slots] = pairs[:, 0], pairs[:, 1]
        entries["checksum"][slots] = np.array(checksums, np.uint64)
        entries["nbytes"][slots], entries["used"][slots] = nbytes, now
        generations = self._tags[slots] >> np.uint64(fmt.GENERATION_SHIFT)
        self._chains.put_in_many(slots, pairs, tags_of(fmt.LIVE, 0, generations))
        self._control["blocks"] += len(slots)
        self._control["inserts"] += len(slots)

    # --- taking blocks out -----------------------------------------------------------------------

    def remove(self, slot: int) -> None:
        """Take out the stored block at `slot`; its slots are free."""
        runs = self._take_out(slot)
        if runs is not None:
            self._free_runs(runs)

    def _take_out(self, slot: int) -> list[Run] | None:
        """Make a stored block invisible; returns its runs, which are not among the free ones yet.
        None: its entry was damaged, and the shard has been put in order."""
        runs = self._lookup.runs(self.shard, slot, int(self._entries["nbytes"][slot]))
        self._free_tags([slot] if runs is None else [start for start, _ in runs])
        self._chains.cut_out(slot)
        self._control["unlinks"] += 1
        self._control["blocks"] -= 1
        if runs is None:
            self.put_in_order()  # what it held is what no other block holds
        return runs

    def give_back(self, slot: int) -> None:
        """Free the slots of a block that was being written: it was never visible."""
        runs = self._lookup.runs(self.shard, slot)
        self._free_tags([slot] if runs is None else [start for start, _ in runs])
        if runs is None:
            self.put_in_order()
        else:
            self._free_runs(runs)

    def _free_tags(self, starts: list[int]) -> None:
        for start in starts:
            generation = (int(self._tags[start]) >> fmt.GENERATION_SHIFT) + 1
            self._tags[start] = fmt.make_tag(fmt.FREE, 0, generation)

    def _free_runs(self, runs: list[Run]) -> None:
        if not self._space.free(runs):
            self.put_in_order()  # damaged entries: two blocks in the same slots

    def clear(self) -> list[int]:
        """Take out all stored blocks; returns their first slots. Blocks being written stay so."""
        live = np.flatnonzero((self._tags & np.uint64(fmt.STATE_MASK)) == fmt.LIVE)
        self._control["removals"] += live.size
        starts: list[int] = []
        for slot in live.tolist():
            runs = self._lookup.runs(self.shard, slot, int(self._entries["nbytes"][slot]))
            starts += [slot] if runs is None else [start for start, _ in runs]
        self._free_tags(starts)
        self.put_in_order()
        return [int(slot) for slot in live]

    # --- after a death ---------------------------------------------------------------------------

    def put_in_order(self) -> None:
        """Chains, counts and free space anew from the entries; what makes no sense is freed.

        After a death `change` does it by itself; repairs call it.
        """
        self._control["dirty"] = fmt.RELINKING  # before the first chain is touched
        sound = sound_blocks(self._entries, self._f.geometry.page_bytes)
        wrong = np.setdiff1d(np.flatnonzero(self._tags & np.uint64(fmt.STATE_MASK)), sound)
        self._free_tags(wrong.tolist())
        link_chains(self._entries, self._heads, self._f.buckets)
        states = self._tags & np.uint64(fmt.STATE_MASK)
        self._control["blocks"] = np.count_nonzero(states == fmt.LIVE)
        used = int(self._entries["run"][states != fmt.FREE].sum())
        used += sum(length for _, length in self._space.unmarked)
        self._control["used_slots"] = used
        self._control["unlinks"] += 1
        # Further than the journal reaches: every replica reads the entries.
        self._control["epoch"] += fmt.JOURNAL_LENGTH + 1
        self._space.read()
        self._control["dirty"] = fmt.CHANGING


def open_shard(directory: Path, file: IndexFile, shard: int, lookup: Lookup) -> ShardIndex:
    """One shard of a store, with its lock `shard-NNN.lock`."""
    return ShardIndex(file, shard, PathLock(lock_path(directory, f"shard-{shard:03}")), lookup)
