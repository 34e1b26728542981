"""Moves a shard's blocks to its front, before the shard is made shorter.

The most recently used block behind the new end moves first, before it the pinned ones: into free
slots in front, else into those of blocks there that were used longer ago. A block is listed at its
new place before it leaves the old one, its bytes and record before it is listed; so at every moment
it is stored at least once, and whoever is killed leaves at most the same block twice. One that the
device does not give any more is dropped as damaged.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.removing import take_out
from light_mem.engine.shard_file import ShardFile
from light_mem.engine.slot_calls import problem_of
from light_mem.errors import StoreBusyError
from light_mem.index import format as fmt
from light_mem.index import retention
from light_mem.index.keys import key_text, mix_one
from light_mem.index.owners import Owner, Owners
from light_mem.index.replica import free_runs
from light_mem.index.runs import Run
from light_mem.index.shard import ShardIndex
from light_mem.index.written import Written
from light_mem.maintenance.owners import Ownership, opened_meanwhile
from light_mem.maintenance.store import blocks_in, runs_of

BATCH_BYTES = 256 << 20  # moved in one hold of the shard's lock
BATCH_BLOCKS = 1024

log = logging.getLogger("light_mem")


class _Block(NamedTuple):
    worth: int  # 0: expired, 1, 2: pinned
    used: int
    slot: int
    runs: list[Run]

    @property
    def pages(self) -> int:
        return sum(length for _, length in self.runs)


def compact(engine: LocalStorageEngine, shard: int, slots: int) -> int:
    """Move blocks of a shard into its first `slots` slots; returns how many were moved.

    Blocks that stay behind are older than all in front, or found no room. Works under the shard's
    lock, in batches. Raises LockTimeoutError, and StoreBusyError when somebody else opens the
    store: what was moved until then has been.
    """
    owners = Owners(engine.directory)
    try:
        owner = owners.join("tool")  # its intents name the slots that are being filled
        moved = 0
        while True:
            _require_alone(engine, owner)
            with engine.change(shard) as (index, file):
                count, more = _Compaction(engine, index, file, owner, slots).run()
            moved += count
            if not more:
                break
        owner.leave()
        return moved
    except StoreBusyError:
        owner.leave()  # between two batches: nothing is being filled
        raise
    finally:
        owners.close()


def _require_alone(engine: LocalStorageEngine, owner: Owner) -> None:
    others = {other.owner for other in engine.owners()} - {owner.number}
    if others:
        living = Ownership(engine.directory).living
        reports = [report for number, report in living.items() if number in others]
        if reports:  # else they have left again
            raise opened_meanwhile(engine.directory, reports)


class _Compaction:
    """One batch, within a change of the shard."""

    def __init__(
        self,
        engine: LocalStorageEngine,
        index: ShardIndex,
        file: ShardFile,
        owner: Owner,
        slots: int,
    ) -> None:
        self._index = index
        self._file = file
        self._owner = owner
        heads, several = blocks_in(index.entries, engine.geometry.page_bytes)
        used = index.uses[heads].tolist()
        run = index.entries["run"][heads].tolist()
        worth = worth_of(index.entries["keep"][heads]).tolist()
        blocks = [
            _Block(much, when, slot, runs_of(several, slot, length))
            for much, when, slot, length in zip(worth, used, heads.tolist(), run, strict=True)
        ]
        behind = {b.slot for b in blocks if any(a + n > slots for a, n in b.runs)}
        self._behind = sorted((b for b in blocks if b.slot in behind), reverse=True)
        # Victims, the oldest first: also those that reach over the new end, for what is in front.
        self._front = sorted(b for b in blocks if _before(b.runs, slots))
        self._used = [b[:2] for b in self._front]
        sizes = (sum(n for _, n in _before(b.runs, slots)) for b in self._front)
        self._pages = [0, *accumulate(sizes)]  # of those before each
        self._evicted: set[int] = set()
        self._slots = slots
        self._gone = 0  # how many of them have been evicted
        self._leased = index.leases.slots()
        self._free = free_runs(index.entries[:slots])
        self._page_bytes = engine.geometry.page_bytes

    def run(self) -> tuple[int, bool]:
        """Move a batch; returns how many, and whether there may be more."""
        moved = nbytes = 0
        for block in self._behind:
            if moved >= BATCH_BLOCKS or nbytes >= BATCH_BYTES:
                return moved, True
            runs = None if block.slot in self._evicted else self._room(block)
            if runs is not None:
                if not self._move(block, runs):
                    continue
                if block.slot not in self._leased:  # else they are HELD, for who looks at them
                    for start, length in _before(block.runs, self._slots):
                        self._free.add(start, length)
                moved += 1
                nbytes += block.pages * self._page_bytes
        return moved, False

    def _room(self, block: _Block) -> list[Run] | None:
        """Free slots in front for a block; for want of them, those of blocks used before it."""
        older = bisect_left(self._used, block[:2])
        evictable = self._pages[max(older, self._gone)] - self._pages[self._gone]
        if self._free.total + evictable < block.pages:
            return None
        while self._free.total < block.pages:
            if self._gone == len(self._front):
                return None  # what was counted on is leased
            victim = self._front[self._gone]
            self._gone += 1
            if victim.slot in self._leased:  # its slots would stay taken
                continue
            take_out(self._index, self._file, victim.slot)
            self._index.control["evictions"] += 1
            self._evicted.add(victim.slot)
            for start, length in _before(victim.runs, self._slots):
                self._free.add(start, length)
        place = self._free.take(block.pages)
        return self._free.take_pieces(block.pages) if place is None else [(place, block.pages)]

    def _move(self, block: _Block, runs: list[Run]) -> bool:
        """Move a block; False: it was lost, and is dropped. Raises OSError."""
        index, file = self._index, self._file
        moved = Written.of(index.entries[block.slot], runs)
        moved = moved._replace(used=int(file.records["used"][block.slot]))
        index.take(runs)
        self._owner.announce(0, (index.shard, runs[0][0]))
        index.mark(runs, self._owner.number)
        source = np.concatenate([np.arange(a, a + n) for a, n in block.runs])
        target = np.concatenate([np.arange(a, a + n) for a, n in runs])
        try:
            pages = [file.page(slot) for slot in source.tolist()]  # 64 MiB at most
        except OSError as error:
            problem = problem_of(error)
            if problem is None:
                raise
            self._drop(block, moved, problem)
            return False
        # Outside: slots that cannot be written are no damage of the block, which stays.
        for slot, page in zip(target.tolist(), pages, strict=True):
            file.put_page(slot, page)
        file.write_records([moved])
        index.publish([moved], [mix_one(moved.low, moved.high)], block.used)
        take_out(index, file, block.slot)
        self._owner.withdraw(0)
        index.control["inserts"] -= 1  # it was stored before
        return True

    def _drop(self, block: _Block, moved: Written, problem: str) -> None:
        """Drop a damaged block, and give back the slots that it was to be moved to."""
        index = self._index
        key = key_text(moved.low, moved.high)
        log.warning("block %s is damaged: %s; it is dropped", key, problem)
        index.give_back(moved.slot)
        for start, length in moved.runs:
            self._free.add(start, length)
        take_out(index, self._file, block.slot)
        self._owner.withdraw(0)
        index.control["removals"] += 1
        index.control["damaged"] += 1


def _before(runs: list[Run], end: int) -> list[Run]:
    """The parts of runs that lie before slot `end`."""
    return [(start, min(length, end - start)) for start, length in runs if start < end]


def worth_of(keeps: retention.Keeps) -> npt.NDArray[np.int64]:
    """What counts before the last use: 0 expired, 2 pinned, else 1; shape [n]."""
    pinned = keeps >= fmt.KEEP_PINNED
    return np.asarray(1 + pinned.astype(np.int64) - retention.expired(keeps))
