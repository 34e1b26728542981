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
from typing import TYPE_CHECKING, NamedTuple

from light_mem.engine.base import BlockIO, Outcome, Report, Stop
from light_mem.engine.copy import Copier, Stopped, new_checksum
from light_mem.errors import LockTimeoutError, StoreFormatError
from light_mem.index import keys as keymath
from light_mem.index.format import MAX_INTENTS
from light_mem.index.owners import Owner

if TYPE_CHECKING:
    from light_mem.engine.local import LocalStorageEngine
    from light_mem.engine.shard_file import ShardFile
    from light_mem.index.shard import Allocation, ShardIndex

# How long a write waits for slots that others are filling. A shard whose every slot is being
# written is a store far too small for its workers.
ROOM_SECONDS = 2.0
MAX_BATCH = MAX_INTENTS // 2  # of one shard at a time; the other half is for what failed
_ROOM_PAUSE = 0.002


class _Written(NamedTuple):
    at: int  # position in the batch
    where: Allocation
    checksum: int


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
        # Slots that are ours, WRITING: of the batch in hand, and of batches that failed.
        self._orphans: dict[int, list[int]] = {}

    def write(self, batch: Sequence[BlockIO], report: Report, stop: Stop) -> None:
        """`StorageEngine.write`."""
        by_shard: dict[int, list[int]] = defaultdict(list)
        for at, block in enumerate(batch):
            mixed = keymath.mix_one(block.low, block.high)
            by_shard[keymath.shard_of(mixed, self._geometry.shards)].append(at)
        open_blocks = set(range(len(batch)))

        def settle(at: int, outcome: Outcome) -> None:
            if outcome is not Outcome.COPIED:
                open_blocks.discard(at)
            report(at, outcome)

        for shard, positions in by_shard.items():
            for first in range(0, len(positions), MAX_BATCH):
                part = positions[first : first + MAX_BATCH]
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
                self._publish(shard, taken, written, batch, report)
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
        taken: list[tuple[int, Allocation]] = []
        waiting: list[int] = []
        evicted: list[int] = []
        outcomes: list[tuple[int, Outcome]] = []
        with self._engine.change(shard) as (index, file):
            self._give_back_orphans(shard, index, file)
            for at in positions:
                block = batch[at]
                slots = -(-block.nbytes // self._geometry.page_bytes)
                if slots > self._geometry.slots:
                    outcomes.append((at, Outcome.NO_ROOM))
                    continue
                if waiting:  # first come, first served
                    waiting.append(at)
                    continue
                if index.find(block.low, block.high, block.nbytes) is not None:
                    outcomes.append((at, Outcome.PRESENT))
                    continue
                where = index.allocate(slots, evicted, self._engine.evicts)
                if where is None:
                    waiting.append(at)
                else:
                    taken.append((at, where))
            # The order binds: intents name the slots before the slots are marked. The records of
            # evicted blocks go before their slots are marked too: a holder that dies in between
            # leaves either FREE slots, whose records the next holder clears, or cleared records.
            self._intend(shard, [where.slot for _, where in taken])
            if evicted:
                file.clear_records(evicted)
            for _, where in taken:
                index.mark(where.runs, self._owner.number)
        for at, outcome in outcomes:
            report(at, outcome)
        return taken, waiting

    def _copy_in(
        self,
        shard: int,
        taken: list[tuple[int, Allocation]],
        batch: Sequence[BlockIO],
        report: Report,
        stop: Stop,
    ) -> list[_Written]:
        file = self._engine.file(shard)
        written: list[_Written] = []
        for at, where in taken:
            block = batch[at]
            checksum = new_checksum(block.low, block.high)
            row = 0
            try:
                for start, length in where.runs:
                    file.gather(
                        self._copier,
                        (start, length),
                        block.memory,
                        block.rows[row : row + length],
                        checksum,
                        lambda at=at: stop(at),  # type: ignore[misc]
                    )
                    row += length
            except Stopped:
                continue
            report(at, Outcome.COPIED)
            digest = checksum.intdigest()
            now = time.time_ns()
            file.write_records(where.runs, block.low, block.high, digest, block.nbytes, now)
            written.append(_Written(at, where, digest))
        if written and self._flush:
            file.sync()
        return written

    def _publish(
        self,
        shard: int,
        taken: list[tuple[int, Allocation]],
        written: list[_Written],
        batch: Sequence[BlockIO],
        report: Report,
    ) -> None:
        whole = {w.at: w for w in written}
        outcomes: list[tuple[int, Outcome]] = []
        with self._engine.change(shard) as (index, file):
            now = time.time_ns()
            for at, where in taken:
                block = batch[at]
                if not index.is_marked(where.slot, self._owner.number):
                    outcomes.append((at, Outcome.FAILED))  # cleared or put in order meanwhile
                elif at not in whole:
                    index.give_back(where.slot)
                    outcomes.append((at, Outcome.STOPPED))
                else:
                    stored = index.find(block.low, block.high)
                    if stored is not None and index.entries["nbytes"][stored] == block.nbytes:
                        file.clear_records([where.slot])
                        index.give_back(where.slot)
                        outcomes.append((at, Outcome.PRESENT))
                        continue
                    if stored is not None:  # of another length: with other settings, by another
                        index.remove(stored)
                        file.clear_records([stored])
                    digest = whole[at].checksum
                    index.publish(where.slot, block.low, block.high, digest, block.nbytes, now)
                    outcomes.append((at, Outcome.STORED))
        self._intend(shard, [])
        for at, outcome in outcomes:
            report(at, outcome)

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
