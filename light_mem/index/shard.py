"""Changes to one shard's index, under the shard's lock.

A holder marks the shard dirty, changes it, and takes the mark back. Whoever finds the mark knows
that the holder died in between and first puts the shard in order from its entries.
Look-ups go on all the time, so every change keeps this order:

publish  fields of the entry -> tag LIVE -> head of the chain: found only when whole
remove   tag FREE with a new generation -> cut from the chain -> slots may be used again: a reader
         that copied from the slots sees another tag

Free slots are replicated in each process (`FreeRuns`); the last changes are in the shard's
journal, so that a holder catches up with what others did by replaying a few records. After
longer absence, or after a death, it reads the entries instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from light_mem.index import format as fmt
from light_mem.index import keys as keymath
from light_mem.index.file import IndexFile
from light_mem.index.locks import LOCK_TIMEOUT_SECONDS, PathLock, lock_path
from light_mem.index.lookup import Lookup
from light_mem.index.order import EvictionOrder
from light_mem.index.recovery import link_chains, occupied_runs, sound_blocks
from light_mem.index.space import FreeRuns

# A block in more runs than this costs its reader more than evicting one block further does.
MAX_PIECES = 8

Run = tuple[int, int]  # first slot, slots


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
        self._order = EvictionOrder(self._tags, self._entries["used"])
        self._space: FreeRuns | None = None
        self._epoch = -1
        self._held_from = -1  # the epoch at which this hold began
        self._unmarked: list[Run] = []  # allocated in this hold; the entries do not show it yet

    @contextmanager
    def change(self, timeout: float = LOCK_TIMEOUT_SECONDS) -> Iterator[bool]:
        """Hold the shard's lock and have its state at hand; raises LockTimeoutError.

        Yields whether the shard had to be put in order: then some slots that are free now may
        still have records. An exception inside leaves the dirty mark: the next holder then puts
        things in order, exactly as after a death.
        """
        with self._lock.hold(timeout):
            self._unmarked = []
            recovered = bool(self._control["dirty"][0])
            if recovered:
                self.put_in_order()
            else:
                self._control["dirty"] = fmt.CHANGING
            self._catch_up()
            self._held_from = self._epoch
            try:
                yield recovered
            except BaseException:
                self._space = None  # it may know of changes that nobody else does
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

    # --- free space ------------------------------------------------------------------------------

    def _catch_up(self) -> None:
        epoch = int(self._control["epoch"][0])
        missed = epoch - self._epoch
        space = self._space
        if space is None or not 0 <= missed <= fmt.JOURNAL_LENGTH:
            self._read_space(epoch)
            return
        journal = self._control["journal"][0]
        for at in range(self._epoch, epoch):
            record = int(journal[at % fmt.JOURNAL_LENGTH])
            start, length = record >> 32, record & fmt.JOURNAL_LENGTH_MASK
            replay = space.add if record & fmt.JOURNAL_FREED else space.remove
            sound = 0 < length <= self._f.slots - start
            if not sound or not replay(start, length):
                self._read_space(epoch)
                return
        self._epoch = epoch

    def _read_space(self, epoch: int) -> None:
        starts, lengths = occupied_runs(self._entries)
        # Gaps between the furthest end so far and the next start: runs of a damaged index overlap.
        ends = np.maximum.accumulate(np.concatenate(([0], starts + lengths)))
        gaps = np.concatenate((starts, [self._f.slots])) - ends
        free = np.flatnonzero(gaps > 0)
        space = FreeRuns.of_gaps(ends[free].tolist(), gaps[free].tolist())
        for start, length in self._unmarked:
            space.remove(start, length)
        self._space = space
        self._epoch = epoch

    def _journal(self, runs: Iterable[Run], freed: bool) -> None:
        mark = fmt.JOURNAL_FREED if freed else 0
        journal = self._control["journal"][0]
        for start, length in runs:
            if self._epoch > self._held_from:
                # The last record of this hold, which nobody has seen, may just grow: a batch that
                # fills neighbouring slots is one record, and others need not read the entries.
                last = int(journal[(self._epoch - 1) % fmt.JOURNAL_LENGTH])
                first, count = last >> 32, last & fmt.JOURNAL_LENGTH_MASK
                if last & fmt.JOURNAL_FREED == mark and first + count == start:
                    journal[(self._epoch - 1) % fmt.JOURNAL_LENGTH] = (
                        first << 32 | mark | count + length
                    )
                    continue
            journal[self._epoch % fmt.JOURNAL_LENGTH] = start << 32 | mark | length
            self._epoch += 1
        self._control["epoch"] = self._epoch

    # --- writing a block -------------------------------------------------------------------------

    def find(self, low: int, high: int, nbytes: int | None = None) -> int | None:
        """First slot of the stored block of this key (and length, where one is given), or None."""
        entry = self._lookup.find_one(low, high, touch=False)
        if entry < 0:
            return None
        slot = entry - self.shard * self._f.slots
        if nbytes is not None and int(self._entries["nbytes"][slot]) != nbytes:
            return None
        return slot

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
            space = self._space  # evicting a damaged block reads it anew
            assert space is not None
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
                self._put_back(pieces)
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
                self._unmarked += left
                return Allocation(victim, left)
            if left is not None:
                self._free_runs(left)
        self._journal(runs, freed=False)
        self._control["used_slots"] += slots
        self._unmarked += runs
        return Allocation(runs[0][0], runs)

    def take(self, runs: list[Run]) -> Allocation:
        """Take exactly these free slots for one block, as `allocate` would.

        Raises ValueError when they are not free: nothing was taken.
        """
        space = self._space
        assert space is not None
        for at, (start, length) in enumerate(runs):
            if not space.remove(start, length):
                self._put_back(runs[:at])
                raise ValueError(f"slots {start} to {start + length - 1} are not free")
        self._journal(runs, freed=False)
        self._control["used_slots"] += sum(length for _, length in runs)
        self._unmarked += runs
        return Allocation(runs[0][0], runs)

    def _put_back(self, runs: Iterable[Run]) -> bool:
        space = self._space
        assert space is not None
        return all(space.add(start, length) for start, length in runs)

    def mark(self, runs: list[Run], owner: int) -> None:
        """Mark allocated slots as being written by `owner`, whose intents already name them."""
        for at, (start, length) in enumerate(runs):
            entry = self._entries[start]
            generation = (int(entry["tag"]) >> fmt.GENERATION_SHIFT) + 1
            entry["run"] = length
            entry["next_run"] = runs[at + 1][0] + 1 if at + 1 < len(runs) else 0
            state = fmt.WRITING if at == 0 else fmt.EXTENT
            entry["tag"] = fmt.make_tag(state, owner, generation)
        self._unmarked = [run for run in self._unmarked if run not in runs]

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
        bucket = keymath.mix_one(low, high) & (self._f.buckets - 1)
        entry["next"] = self._heads[bucket]
        entry["tag"] = fmt.make_tag(fmt.LIVE, 0, int(entry["tag"]) >> fmt.GENERATION_SHIFT)
        self._heads[bucket] = slot + 1
        self._control["blocks"] += 1
        self._control["inserts"] += 1

    # --- taking blocks out -----------------------------------------------------------------------

    def remove(self, slot: int) -> None:
        """Take out the stored block at `slot`; its slots are free."""
        runs = self._take_out(slot)
        if runs is not None:
            self._free_runs(runs)

    def _take_out(self, slot: int) -> list[Run] | None:
        """Make a stored block invisible; returns its runs, which are not among the free ones yet.
        None: its entry was damaged, and the shard has been put in order."""
        entry = self._entries[slot]
        runs = self._lookup.runs(self.shard, slot, int(entry["nbytes"]))
        self._free_tags([slot] if runs is None else [start for start, _ in runs])
        bucket = keymath.mix_one(int(entry["low"]), int(entry["high"])) & (self._f.buckets - 1)
        self._unlink(bucket, slot)
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
        if not self._put_back(runs):
            self.put_in_order()  # damaged entries: two blocks in the same slots
            return
        self._journal(runs, freed=True)
        self._control["used_slots"] -= sum(length for _, length in runs)

    def _unlink(self, bucket: int, slot: int) -> None:
        link, following = slot + 1, int(self._entries[slot]["next"])
        if int(self._heads[bucket]) == link:
            self._heads[bucket] = following
        else:
            at = int(self._heads[bucket])
            for _ in range(self._f.slots):
                if not 0 < at <= self._f.slots:
                    break
                after = int(self._entries["next"][at - 1])
                if after == link:
                    self._entries["next"][at - 1] = following
                    break
                at = after
        self._control["unlinks"] += 1

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
        self._control["used_slots"] = used + sum(length for _, length in self._unmarked)
        self._control["unlinks"] += 1
        # Further than the journal reaches: every replica reads the entries.
        self._control["epoch"] += fmt.JOURNAL_LENGTH + 1
        self._read_space(int(self._control["epoch"][0]))
        self._control["dirty"] = fmt.CHANGING


def open_shard(directory: Path, file: IndexFile, shard: int, lookup: Lookup) -> ShardIndex:
    """One shard of a store, with its lock `shard-NNN.lock`."""
    return ShardIndex(file, shard, PathLock(lock_path(directory, f"shard-{shard:03}")), lookup)
