"""Writing batches of blocks: find room, copy, publish. A part of LocalStorageEngine.

The blocks of one shard are a *part* of the batch, and take two holds of that shard's lock, none
during the copies:

allocate  room for all, evicting where needed; intents, then the records of evicted blocks go, then
          marks
copy      pages to slots with the checksum (`filling.py`)
publish   records, and all become visible (`publishing.py`)

Each step is made for all parts before the next one, for copies push the interpreter out of the
processor's caches. Nobody is waited for with slots in hand that others may want: what finds no
room, or a lock taken, comes once more when what was given room is published.

What goes past the page cache is on its way for some milliseconds after the copy. So `begin` may
return without having published its last blocks; they follow when the next ones have been copied.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

from light_mem.engine import no_room
from light_mem.engine.base import Outcome
from light_mem.engine.filling import Filler
from light_mem.engine.intents import MOST_BLOCKS, Intents
from light_mem.engine.publishing import Publisher, is_present
from light_mem.engine.write_job import Part, WriteJob
from light_mem.errors import LightMemError, LockTimeoutError, StoreFormatError
from light_mem.index.format import MAX_INTENTS
from light_mem.index.locks import LOCK_TIMEOUT_SECONDS, SHORT_SECONDS
from light_mem.index.owners import Owner

if TYPE_CHECKING:
    from light_mem.engine.local import LocalStorageEngine
    from light_mem.index.shard import ShardIndex

# How long a write waits for slots that others are filling. A shard whose every slot is being
# written is a store far too small for its workers.
ROOM_SECONDS = 2.0
_ROOM_PAUSE = 0.002

log = logging.getLogger("light_mem")

ByShard = dict[int, list[int]]  # positions in a batch


class Writer:
    """Writes batches for one engine. Not thread-safe."""

    def __init__(
        self,
        engine: LocalStorageEngine,
        owner: Owner,
        intents: Intents,
        filler: Filler,
        publisher: Publisher,
    ) -> None:
        # Weak: in a cycle, the maps of a closed store would stay until the next collection.
        self._engine: LocalStorageEngine = weakref.proxy(engine)
        self._owner = owner
        self._intents = intents
        self._geometry = engine.geometry
        self._filler = filler
        self._publisher = publisher
        self._last: list[Part] = []  # to be published

    @property
    def has_begun(self) -> bool:
        """Whether there is something for `finish`."""
        return bool(self._last)

    @property
    def has_slots_in_hand(self) -> bool:
        """Whether slots are announced: to be copied to, copied, or of parts that failed."""
        return bool(self._intents.shards)

    def begin(self, job: WriteJob) -> None:
        """`StorageEngine.write`, but of some of the blocks the outcome may be told by the next
        call, or by `finish`."""
        wanted = job.by_shard
        deadline: float | None = None  # of those that wait for room, with nothing of ours in hand
        while wanted:
            # Reads that began between the copies: do not leave them to wait while we wait for a
            # lock or room.
            self._engine.finish_reads()
            self._give_back_failed()
            now, later = _first(wanted, self._most_at_a_time())
            if not now:
                error = no_room.no_intents(self._engine, self._intents.shards)
                for shard, positions in later.items():
                    self._fail(shard, positions, job, error)
                break
            parts, waiting, busy = self._give_room(now, job)
            if parts:
                self._write(parts, job)
                deadline = None
            elif not self._finish() and waiting:  # now nothing of ours is in their way
                deadline = deadline or time.monotonic() + ROOM_SECONDS
                waiting = self._wait_for_room(waiting, deadline, job)
            wanted = _joined(waiting, later, busy)

    def _most_at_a_time(self) -> int:
        """How many blocks may be written at a time: so few that as many again can be announced
        beside them and beside what failed. Those are copied while these are on their way to the
        device, or when these have failed as well. 0: nothing can be announced any more."""
        failed = self._failed
        if failed or self._engine.drops:
            # The last one goes alone: whatever failed, nothing is on its way beside it.
            return (MAX_INTENTS - failed + 1) // 2
        return MOST_BLOCKS

    @property
    def _failed(self) -> int:
        """How many announced slots are of parts that failed."""
        return self._intents.count - sum(len(part.taken) for part in self._last)

    def _give_back_failed(self) -> None:
        """Free what parts that failed were to fill, as far as that needs no waiting: while it is
        announced there is room for fewer. Not while anything is being copied."""
        if not self._failed:
            return
        for shard in self._intents.shards:
            in_hand = self._in_hand(shard)
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
        """`finish`, also while other parts are being copied."""
        there_was = self.has_begun
        for part, error in self._publisher.publish(self._last):
            self._fail(part.shard, part.positions, part.job, error)
        return there_was

    def _fail(
        self, shard: int, positions: Sequence[int], job: WriteJob, error: LightMemError | OSError
    ) -> None:
        engine = self._engine
        engine.limited.warning(
            "write to shard %d of %s failed: %s", shard, engine.directory, str(error)
        )
        job.settle(positions, Outcome.FAILED)

    def close(self) -> None:
        """Give back the slots of failed batches; raises LockTimeoutError, OSError."""
        self.finish()
        for shard in self._intents.shards:
            with self._engine.change(shard, timeout=1) as (index, file):
                self._intents.give_back(shard, index, file)

    def _give_room(self, wanted: ByShard, job: WriteJob) -> tuple[list[Part], ByShard, ByShard]:
        """Take room in each shard; returns what was given any, and the blocks that wait for more,
        or for a lock that somebody has."""
        parts: list[Part] = []
        waiting: ByShard = {}
        busy: ByShard = {}
        for shard, positions in wanted.items():
            # Blocks that were copied or given room, or that may find room soon, must not wait here
            # for the stopped holder of a lock.
            brief = bool(parts or waiting) or self.has_begun
            timeout = LOCK_TIMEOUT_SECONDS
            if brief:
                timeout = 0 if busy else SHORT_SECONDS
            try:
                part, left = self._allocate(shard, positions, job, timeout)
            except (LockTimeoutError, OSError, StoreFormatError) as error:
                if brief and isinstance(error, LockTimeoutError):
                    busy[shard] = positions
                else:
                    self._fail(shard, positions, job, error)
                continue
            if part.taken:
                parts.append(part)
            if left:
                waiting[shard] = left
        return parts, waiting, busy

    def _write(self, parts: list[Part], job: WriteJob) -> None:
        """Copy what was given room, and publish it unless it is on its way."""
        filled, failures = self._filler.fill(job, parts)
        self._finish()  # the parts before: they have landed meanwhile
        self._last = filled
        if self._failed or all(part.under_way is None for part in filled):
            self._finish()
        for part, error in failures:
            self._fail(part.shard, part.positions, job, error)

    def _wait_for_room(self, waiting: ByShard, deadline: float, job: WriteJob) -> ByShard:
        """Wait a moment; returns the blocks that shall go on waiting."""
        late = time.monotonic() > deadline
        left: ByShard = {}
        refused: dict[int, int] = {}  # slots of a block, by shard
        for shard, positions in waiting.items():
            for at in positions:
                if job.stop(at):
                    job.settle([at], Outcome.STOPPED)
                elif late:
                    job.settle([at], Outcome.NO_ROOM)
                    refused[shard] = job.slots[at]
                else:
                    left.setdefault(shard, []).append(at)
        for shard, slots in refused.items():
            no_room.late(self._engine, shard, slots)
        if left:
            self._engine.reclaim(timeout=0, only=left)
            time.sleep(_ROOM_PAUSE)
        return left

    def _in_hand(self, shard: int) -> list[int]:
        """First slots in a shard that are filled, and not published yet."""
        return [slot for part in self._last if part.shard == shard for slot in part.slots]

    def _allocate(
        self, shard: int, positions: list[int], job: WriteJob, timeout: float
    ) -> tuple[Part, list[int]]:
        """Take room; returns what was given, and who waits for more."""
        evicted: list[int] = []
        in_hand = self._in_hand(shard)
        with self._engine.change(shard, timeout) as (index, file):
            self._intents.give_back(shard, index, file, in_hand)
            found = index.find_mixed(job.keys.at(positions))
            wanted, outcomes, refused = self._wanted(index, positions, found, job)
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
        if refused is not None:
            no_room.warn(self._engine, shard, refused)
        taken = list(zip(wanted, given, strict=False))
        return Part(shard, job, taken, all_new), wanted[len(given) :]

    def _wanted(
        self, index: ShardIndex, positions: list[int], found: list[int], job: WriteJob
    ) -> tuple[list[int], list[tuple[int, Outcome]], no_room.Refused | None]:
        """Which blocks want room, what became of the others, and one that is too long; `found`:
        where they are stored."""
        wanted: list[int] = []
        outcomes: list[tuple[int, Outcome]] = []
        refused = None
        most = index.most_slots()
        for at, stored in zip(positions, found, strict=True):
            if stored >= 0 and is_present(index, stored, job.nbytes[at]):
                outcomes.append((at, Outcome.PRESENT))
            elif job.slots[at] > most:  # nor ever, while what is pinned or viewed stays so
                outcomes.append((at, Outcome.NO_ROOM))
                refused = no_room.Refused(job.slots[at], most, index.retention.pinned_slots)
            else:
                wanted.append(at)
        return wanted, outcomes, refused


def _first(wanted: ByShard, most: int) -> tuple[ByShard, ByShard]:
    """Split into what may be written now (at most `most`) and the rest."""
    now: ByShard = {}
    later: ByShard = {}
    for shard, positions in wanted.items():
        if most:
            now[shard] = positions[:most]
        if len(positions) > most:
            later[shard] = positions[most:]
        most -= min(most, len(positions))
    return now, later


def _joined(*parts: ByShard) -> ByShard:
    """All of these blocks, in this order."""
    joined: ByShard = {}
    for part in parts:
        for shard, positions in part.items():
            joined[shard] = joined.get(shard, []) + positions
    return joined
