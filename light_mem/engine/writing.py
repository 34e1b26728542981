"""Writing batches of blocks: find room, copy, publish. A part of LocalStorageEngine.

Two holds of the shard's lock a batch, none during the copies:

allocate  room for all, evicting where needed; intents, then the records of evicted blocks go, then
          marks
copy      pages to slots with the checksum
publish   records, and all become visible (`publishing.py`)

What goes past the page cache is on its way for some milliseconds after the copy. So `begin` may
return without having published its last blocks; they follow when the next ones have been copied.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

from light_mem.engine.base import BlockIO, Outcome, Report, Stop
from light_mem.engine.copy import Stopped
from light_mem.engine.first_touch import FirstTouch
from light_mem.engine.gather import Gatherer
from light_mem.engine.groups import GROUP_BYTES, groups, stop_of
from light_mem.engine.intents import PART_BLOCKS, Intents
from light_mem.engine.pieces import is_put_straight
from light_mem.engine.publishing import Publisher, is_present
from light_mem.engine.write_job import Copied, Part, Taken, WriteJob
from light_mem.errors import LightMemError, LockTimeoutError, StoreFormatError
from light_mem.index.format import MAX_INTENTS
from light_mem.index.locks import LOCK_TIMEOUT_SECONDS
from light_mem.index.owners import Owner

if TYPE_CHECKING:
    from light_mem.engine.direct_writes import Cut
    from light_mem.engine.local import LocalStorageEngine
    from light_mem.index.shard import ShardIndex

# How long a write waits for slots that others are filling. A shard whose every slot is being
# written is a store far too small for its workers.
ROOM_SECONDS = 2.0
_ROOM_PAUSE = 0.002
_SHORT_SECONDS = 0.1  # longer than a living holder needs

log = logging.getLogger("light_mem")


class Writer:
    """Writes batches for one engine. Not thread-safe."""

    def __init__(
        self,
        engine: LocalStorageEngine,
        owner: Owner,
        intents: Intents,
        gatherer: Gatherer,
        publisher: Publisher,
        touch: FirstTouch,
    ) -> None:
        # Weak: in a cycle, the maps of a closed store would stay until the next collection.
        self._engine: LocalStorageEngine = weakref.proxy(engine)
        self._owner = owner
        self._intents = intents
        self._gatherer = gatherer
        self._geometry = engine.geometry
        self._publisher = publisher
        self._touch = touch
        # Past the page cache a copy may wait for the device: there each block is a group, so that
        # an abort is seen before the next one.
        self._group_bytes = 1 if engine.drops else GROUP_BYTES
        self._last: Part | None = None  # to be published

    @property
    def has_begun(self) -> bool:
        """Whether there is something for `finish`."""
        return self._last is not None

    def begin(
        self,
        batch: Sequence[BlockIO],
        report: Report,
        stop: Stop,
        mixed: Sequence[int] | None = None,
    ) -> None:
        """`StorageEngine.write`, but of some of the blocks the outcome may be told by the next
        call, or by `finish`. `mixed`: see `LocalStorageEngine.begin_write`."""
        job = WriteJob(batch, self._geometry, report, stop, mixed)
        before = self._last
        for shard, positions in job.by_shard.items():
            while positions:
                self._give_back_failed()
                most = self._most_at_a_time()
                if not most:
                    error = _no_intents(self._engine, self._intents.shards)
                    self._fail(shard, positions, job, error)
                    break
                part, positions = positions[:most], positions[most:]
                try:
                    self._write_shard(shard, part, job)
                except (LockTimeoutError, OSError, StoreFormatError) as error:
                    # First what was copied, some of it perhaps of this very part: a block is told
                    # once, for the cell of a task that is ready may be another's. Nor would there
                    # be room for the intents of more than what failed and one part.
                    self._finish()
                    self._fail(shard, part, job, error)
        if self._last is before:  # nothing was copied that it could have waited for
            self._finish()

    def _most_at_a_time(self) -> int:
        """How many blocks are written by two holds of the lock. They can be announced beside what
        failed, and so can as many more, which are copied while these are on their way to the device
        or when these have failed as well. 0: nothing can be announced any more."""
        failed = self._failed
        if failed or self._engine.drops:
            # The last one goes alone: whatever failed, no part is on its way beside another.
            return (MAX_INTENTS - failed + 1) // 2
        return PART_BLOCKS

    @property
    def _failed(self) -> int:
        """How many announced slots are of parts that failed."""
        return self._intents.count - (0 if self._last is None else len(self._last.taken))

    def _give_back_failed(self) -> None:
        """Free what parts that failed were to fill, as far as that needs no waiting: while it is
        announced there is room for fewer. Not while a part is being copied."""
        if not self._failed:
            return
        last = self._last
        for shard in self._intents.shards:
            in_hand = last.slots if last is not None and last.shard == shard else []
            try:
                with self._engine.change(shard, timeout=0) as (index, file):
                    self._intents.give_back(shard, index, file, in_hand)
                    self._intents.announce(shard, in_hand)
            except (LockTimeoutError, OSError, StoreFormatError) as error:
                log.debug("shard %d keeps slots of failed writes: %s", shard, str(error))

    def finish(self) -> bool:
        """Publish what was copied and is not published yet; whether there was any."""
        there_was = self._finish()
        self._give_back_failed()
        return there_was

    def _finish(self) -> bool:
        """`finish`, also while another part is being copied."""
        part, self._last = self._last, None
        if part is None:
            return False
        try:
            self._publisher.publish(part)
        except (LockTimeoutError, OSError, StoreFormatError) as error:
            self._fail(part.shard, [at for at, _ in part.taken], part.job, error)
        return True

    def _fail(
        self, shard: int, positions: list[int], job: WriteJob, error: LightMemError | OSError
    ) -> None:
        engine = self._engine
        engine.limited.warning(
            "write to shard %d of %s failed: %s", shard, engine.directory, str(error)
        )
        job.settle(sorted(job.open.intersection(positions)), Outcome.FAILED)

    def close(self) -> None:
        """Give back the slots of failed batches; raises LockTimeoutError, OSError."""
        self.finish()
        for shard in self._intents.shards:
            with self._engine.change(shard, timeout=1) as (index, file):
                self._intents.give_back(shard, index, file)

    def _write_shard(self, shard: int, positions: list[int], job: WriteJob) -> None:
        """Allocate all, copy all, publish all: two holds of the lock, more for want of room."""
        waiting = positions
        deadline = time.monotonic() + ROOM_SECONDS
        while waiting:
            try:
                taken, waiting, all_new = self._allocate(shard, waiting, job)
            except LockTimeoutError:
                if not self._finish():
                    raise
                continue
            if taken:
                copied, under_way = self._copy_in(shard, taken, job)
                self._finish()  # the part before: it has landed meanwhile
                self._last = Part(shard, job, taken, copied, under_way, all_new)
                if under_way is None or self._intents.count > len(taken):
                    self._finish()
                deadline = time.monotonic() + ROOM_SECONDS
            elif waiting and not self._finish():  # its blocks may be evicted, once they are stored
                waiting = self._wait_for_room(waiting, deadline, job)

    def _wait_for_room(self, waiting: list[int], deadline: float, job: WriteJob) -> list[int]:
        """Wait a moment; returns the blocks that shall go on waiting."""
        late = time.monotonic() > deadline
        left: list[int] = []
        for at in waiting:
            if job.stop(at):
                job.settle([at], Outcome.STOPPED)
            elif late:
                job.settle([at], Outcome.NO_ROOM)
            else:
                left.append(at)
        if left:
            self._engine.reclaim()
            time.sleep(_ROOM_PAUSE)
        return left

    def _allocate(
        self, shard: int, positions: list[int], job: WriteJob
    ) -> tuple[list[Taken], list[int], tuple[int, int] | None]:
        """Take room; returns what was given, by position in the batch, who waits for more, and, if
        none of the keys was stored, the shard's stamp."""
        evicted: list[int] = []
        last = self._last
        in_hand = last.slots if last is not None and last.shard == shard else []
        # What was copied is not to wait for a stopped holder of another shard's lock.
        timeout = LOCK_TIMEOUT_SECONDS if last is None else _SHORT_SECONDS
        with self._engine.change(shard, timeout) as (index, file):
            self._intents.give_back(shard, index, file, in_hand)
            found = index.find_mixed(job.keys.at(positions))
            wanted, outcomes = self._wanted(index, positions, found, job)
            # First come, first served: what finds no room waits, and so does what follows.
            given = index.allocate_many(
                [job.slots[at] for at in wanted], evicted, self._engine.evicts
            )
            # The order binds: intents name the slots before the slots are marked. The records of
            # evicted blocks go before their slots are marked too: a holder that dies in between
            # leaves either FREE slots, whose records the next holder clears, or cleared records.
            self._intents.announce(shard, in_hand + [where.slot for where in given])
            if evicted:
                file.clear_records(evicted)
            index.mark_many(given, self._owner.number)
            all_new = index.stamp() if max(found) < 0 else None
        job.settle_each(outcomes)
        return list(zip(wanted, given, strict=False)), wanted[len(given) :], all_new

    def _wanted(
        self, index: ShardIndex, positions: list[int], found: list[int], job: WriteJob
    ) -> tuple[list[int], list[tuple[int, Outcome]]]:
        """Which blocks want room, and what became of the others; `found`: where they are stored."""
        wanted: list[int] = []
        outcomes: list[tuple[int, Outcome]] = []
        for at, stored in zip(positions, found, strict=True):
            if stored >= 0 and is_present(index, stored, job.nbytes[at]):
                outcomes.append((at, Outcome.PRESENT))
            elif job.slots[at] > self._geometry.slots:
                outcomes.append((at, Outcome.NO_ROOM))
            else:
                wanted.append(at)
        return wanted, outcomes

    def _copy_in(
        self, shard: int, taken: list[Taken], job: WriteJob
    ) -> tuple[list[Copied], Cut | None]:
        """Copy into the slots; which blocks were, and what of them is under way."""
        file = self._engine.file(shard)
        batch, stop, report = job.batch, job.stop, job.report
        room = {at: runs for at, (_, runs) in taken}
        copied: list[Copied] = []
        file.expect(run for _, (_, runs) in taken for run in runs)
        self._touch.before_copies([batch[at].place for at, _ in taken], is_put_straight)
        try:
            for group in groups([at for at, _ in taken], job.nbytes, self._group_bytes):
                while wanted := [at for at in group if not stop(at)]:
                    blocks = [(room[at], batch[at]) for at in wanted]
                    try:
                        sums = file.gather(self._gatherer, blocks, stop_of(wanted, stop))
                    except Stopped:
                        continue
                    report(wanted, Outcome.COPIED)
                    copied += zip(wanted, (runs for runs, _ in blocks), sums, strict=True)
                    break
        except BaseException:
            file.land(file.cut())  # before the slots are given back
            raise
        return copied, file.cut()


def _no_intents(engine: LocalStorageEngine, shards: list[int]) -> LockTimeoutError:
    return LockTimeoutError(
        f"{MAX_INTENTS} slots of failed writes wait for the locks of shards {shards}",
        path=str(engine.directory),
        timeout=0,
    )
