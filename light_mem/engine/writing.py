"""Writing batches of blocks: find room, copy, publish. A part of LocalStorageEngine.

Two holds of the shard's lock a batch, none during the copies:

allocate  room for all, evicting where needed; intents, then the records of evicted blocks go, then
          marks
copy      pages to slots with the checksum; then the slot records; with `flush`, a sync
publish   all become visible, or give their slots back
"""

from __future__ import annotations

import time
import weakref
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from light_mem.engine.base import WRITE_BATCH, BlockIO, Outcome, Report, Stop
from light_mem.engine.copy import Copier, Stopped
from light_mem.engine.shard_file import Written
from light_mem.errors import LockTimeoutError, StoreFormatError
from light_mem.index import keys as keymath
from light_mem.index.format import MAX_INTENTS
from light_mem.index.owners import Owner

if TYPE_CHECKING:
    from light_mem.engine.local import LocalStorageEngine
    from light_mem.engine.shard_file import ShardFile
    from light_mem.index.allocation import Allocation
    from light_mem.index.shard import ShardIndex

# How long a write waits for slots that others are filling. A shard whose every slot is being
# written is a store far too small for its workers.
ROOM_SECONDS = 2.0
_ROOM_PAUSE = 0.002


class Writer:
    """Writes batches for one engine. Not thread-safe."""

    def __init__(
        self, engine: LocalStorageEngine, owner: Owner, copier: Copier, *, flush: bool
    ) -> None:
        # Weak: in a cycle, the maps of a closed store would stay until the next collection.
        self._engine: LocalStorageEngine = weakref.proxy(engine)
        self._owner = owner
        self._flush = flush
        self._copier = copier
        self._geometry = engine.geometry
        # The stamp of the shard in hand when none of its keys was stored.
        self._all_new: tuple[int, int] | None = None
        # Slots that are ours, WRITING: of the batch in hand, and of batches that failed.
        self._orphans: dict[int, list[int]] = {}

    def write(self, batch: Sequence[BlockIO], report: Report, stop: Stop) -> None:
        """`StorageEngine.write`."""
        by_shard: dict[int, list[int]] = defaultdict(list)
        for at, (low, high, _) in enumerate(batch):
            by_shard[keymath.shard_of(keymath.mix_one(low, high), self._geometry.shards)].append(at)
        open_blocks = set(range(len(batch)))

        def settle(at: int, outcome: Outcome) -> None:
            if outcome is not Outcome.COPIED:
                open_blocks.discard(at)
            report(at, outcome)

        for shard, positions in by_shard.items():
            for first in range(0, len(positions), WRITE_BATCH):
                part = positions[first : first + WRITE_BATCH]
                try:
                    self._write_shard(shard, part, batch, settle, stop)
                except (LockTimeoutError, OSError, StoreFormatError) as error:
                    engine = self._engine
                    engine.limited.warning(
                        "write to shard %d of %s failed: %s", shard, engine.directory, str(error)
                    )
                    for at in open_blocks.intersection(part):
                        settle(at, Outcome.FAILED)

    def close(self) -> None:
        """Give back the slots of failed batches; raises LockTimeoutError, OSError."""
        for shard in [shard for shard, slots in self._orphans.items() if slots]:
            with self._engine.change(shard, timeout=1) as (index, file):
                self._give_back_orphans(shard, index, file)

    def _write_shard(
        self, shard: int, positions: list[int], batch: Sequence[BlockIO], report: Report, stop: Stop
    ) -> None:
        """Allocate all, copy all, publish all: two holds of the lock, more for want of room."""
        waiting = positions
        deadline = time.monotonic() + ROOM_SECONDS
        while waiting:
            taken, waiting = self._allocate(shard, waiting, batch, report)
            written = self._copy_in(shard, taken, batch, report, stop)
            if taken:
                self._publish(shard, taken, written, report)
                deadline = time.monotonic() + ROOM_SECONDS
            elif waiting:
                waiting = self._wait_for_room(waiting, deadline, report, stop)

    def _wait_for_room(
        self, waiting: list[int], deadline: float, report: Report, stop: Stop
    ) -> list[int]:
        """Wait a moment; returns the blocks that shall go on waiting."""
        late = time.monotonic() > deadline
        left: list[int] = []
        for at in waiting:
            if stop(at):
                report(at, Outcome.STOPPED)
            elif late:
                report(at, Outcome.NO_ROOM)
            else:
                left.append(at)
        if left:
            self._engine.reclaim()
            time.sleep(_ROOM_PAUSE)
        return left

    def _allocate(
        self, shard: int, positions: list[int], batch: Sequence[BlockIO], report: Report
    ) -> tuple[list[tuple[int, Allocation]], list[int]]:
        evicted: list[int] = []
        outcomes: list[tuple[int, Outcome]] = []
        wanted: list[tuple[int, int]] = []  # position, slots
        with self._engine.change(shard) as (index, file):
            self._give_back_orphans(shard, index, file)
            found = index.find_many([batch[at][:2] for at in positions])
            for at, stored in zip(positions, found, strict=True):
                nbytes = batch[at].nbytes
                slots = self._geometry.slots_of(nbytes)
                if self._is_present(index, stored, nbytes):
                    outcomes.append((at, Outcome.PRESENT))
                elif slots > self._geometry.slots:
                    outcomes.append((at, Outcome.NO_ROOM))
                else:
                    wanted.append((at, slots))
            # First come, first served: what finds no room waits, and so does what follows.
            given = index.allocate_many([n for _, n in wanted], evicted, self._engine.evicts)
            # The order binds: intents name the slots before the slots are marked. The records of
            # evicted blocks go before their slots are marked too: a holder that dies in between
            # leaves either FREE slots, whose records the next holder clears, or cleared records.
            self._intend(shard, [where.slot for where in given])
            if evicted:
                file.clear_records(evicted)
            index.mark_many(given, self._owner.number)
            self._all_new = index.stamp() if max(found) < 0 else None
        for at, outcome in outcomes:
            report(at, outcome)
        taken = [(at, where) for (at, _), where in zip(wanted, given, strict=False)]
        return taken, [at for at, _ in wanted[len(given) :]]

    def _copy_in(
        self,
        shard: int,
        taken: list[tuple[int, Allocation]],
        batch: Sequence[BlockIO],
        report: Report,
        stop: Stop,
    ) -> dict[int, Written]:
        """Copy into the slots; what was written, by position in the batch."""
        file = self._engine.file(shard)
        written: dict[int, Written] = {}
        for _, where in taken:
            file.expect(where.runs)
        keep = self._engine.keep_for
        for at, where in taken:
            block = batch[at]
            try:
                digest = file.gather(self._copier, where.runs, block, partial(stop, at))
            except Stopped:
                continue
            report(at, Outcome.COPIED)
            low, high, place = block
            written[at] = Written(
                low, high, digest, place.nbytes, where.runs, time.time_ns(), keep((low, high))
            )
        if written:
            file.write_records(list(written.values()))
            if self._flush:
                file.sync()
        return written

    def _publish(
        self,
        shard: int,
        taken: list[tuple[int, Allocation]],
        written: dict[int, Written],
        report: Report,
    ) -> None:
        outcomes: list[tuple[int, Outcome]] = []
        fresh: dict[tuple[int, int], tuple[int, Written]] = {}
        with self._engine.change(shard) as (index, file):
            for at, where in taken:
                block = written.get(at)
                if not index.is_marked(where.slot, self._owner.number):
                    outcomes.append((at, Outcome.FAILED))  # cleared or put in order meanwhile
                elif block is None:
                    index.give_back(where.slot)
                    outcomes.append((at, Outcome.STOPPED))
                elif (block.low, block.high) in fresh:  # twice in one batch
                    self._withdraw(index, file, where.slot)
                    outcomes.append((at, Outcome.PRESENT))
                else:
                    fresh[block.low, block.high] = at, block
            if fresh:
                outcomes += self._publish_fresh(index, file, list(fresh.values()))
        self._intend(shard, [])
        for at, outcome in outcomes:
            report(at, outcome)

    def _publish_fresh(
        self, index: ShardIndex, file: ShardFile, blocks: list[tuple[int, Written]]
    ) -> list[tuple[int, Outcome]]:
        """Publish blocks of different keys, unless another process was faster."""
        keys = [block[:2] for _, block in blocks]
        outcomes = [(at, Outcome.STORED) for at, _ in blocks]
        still_new = index.stamp() == self._all_new
        stored = [] if still_new else index.find_many(keys)
        if stored and max(stored) >= 0:
            left = []
            for n, slot in enumerate(stored):
                at, block = blocks[n]
                if self._is_present(index, slot, block.nbytes):
                    self._withdraw(index, file, block.runs[0][0])
                    outcomes[n] = at, Outcome.PRESENT
                    continue
                if slot >= 0:  # expired, or of another length: with other settings, by another
                    index.remove(slot)
                    file.clear_records([slot])
                left.append(n)
            blocks, keys = [blocks[n] for n in left], [keys[n] for n in left]
        written = [block for _, block in blocks]
        index.publish_many(
            [block.runs[0][0] for block in written],
            keys,
            [block.checksum for block in written],
            [block.nbytes for block in written],
            time.time_ns(),
            [block.keep for block in written],
        )
        return outcomes

    @staticmethod
    def _is_present(index: ShardIndex, slot: int, nbytes: int) -> bool:
        """Whether a block of this length is stored at `slot` (-1: no) and has not expired."""
        return (
            slot >= 0
            and int(index.entries["nbytes"][slot]) == nbytes
            and not index.retention.has_expired(slot)
        )

    @staticmethod
    def _withdraw(index: ShardIndex, file: ShardFile, slot: int) -> None:
        """Give back the slots of a block that is stored already."""
        file.clear_records([slot])
        index.give_back(slot)

    def _intend(self, shard: int, slots: list[int]) -> None:
        """Announce the slots of one shard that are being filled, and keep announcing those that a
        failed lock left behind in others: they go back when their shard is written to again, when
        we leave, or at our death."""
        self._orphans.pop(shard, None)
        self._orphans[shard] = slots  # last, and so never among those that do not fit
        intents = [(s, slot) for s, left in self._orphans.items() for slot in left]
        self._owner.intend(intents[-MAX_INTENTS:])

    def _give_back_orphans(self, shard: int, index: ShardIndex, file: ShardFile) -> None:
        for slot in self._orphans.get(shard, []):
            if index.is_marked(slot, self._owner.number):
                file.clear_records([slot])
                index.give_back(slot)
