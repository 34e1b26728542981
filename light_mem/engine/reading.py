"""Reading batches of blocks: find, copy, look again. A part of LocalStorageEngine.

A batch for which a device must be waited is read when the next one has been begun, so that the
device is not idle between them.

No lock is held, so a block may go while it is copied; the tag and the checksum, asked for after the
copy, tell. Only a block found damaged is taken out under the lock. Blocks are copied, looked at
again and told of some at a time (`groups.py`).
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from light_mem.engine.base import BlockIO, Outcome, Report, Stop
from light_mem.engine.copy import ROUND_BYTES, Stopped, new_checksum
from light_mem.engine.device_reads import DeviceReads
from light_mem.engine.first_touch import FirstTouch
from light_mem.engine.groups import GROUP_BYTES, groups, stop_of
from light_mem.engine.places import Place
from light_mem.engine.read_job import Copied, ReadJob
from light_mem.engine.removing import WRONG_SUM
from light_mem.engine.scatter import Scatter, Scatterer
from light_mem.engine.slot_calls import problem_of
from light_mem.errors import StoreFormatError
from light_mem.index import keys as keymath
from light_mem.index.locks import LOCK_TIMEOUT_SECONDS, SHORT_SECONDS
from light_mem.index.lookup import Location
from light_mem.index.runs import Run, cut_at_runs

if TYPE_CHECKING:
    from light_mem.engine.local import LocalStorageEngine
    from light_mem.engine.shard_file import ShardFile

log = logging.getLogger("light_mem")


class Reader:
    """Reads batches for one engine. Not thread-safe."""

    def __init__(
        self,
        engine: LocalStorageEngine,
        files: Mapping[int, ShardFile],
        scatterer: Scatterer,
        verify: bool,
        device: DeviceReads,
        touch: FirstTouch,
    ) -> None:
        """`files`: those that the engine has open by now."""
        # Weak: in a cycle, the maps of a closed store would stay until the next collection.
        self._engine: LocalStorageEngine = weakref.proxy(engine)
        self._lookup = engine.lookup
        self._scatterer = scatterer
        self._verify = verify
        self._files = files
        self._touch = touch
        self._device = device
        self._last: ReadJob | None = None  # whose bytes are on their way

    @property
    def has_begun(self) -> bool:
        """Whether there is something for `finish`."""
        return self._last is not None

    def begin(
        self,
        batch: Sequence[BlockIO],
        report: Report,
        stop: Stop,
        entries: list[int] | None = None,
        by_calls: bool = False,
    ) -> None:
        """`StorageEngine.read`, but if any block waits for a device, the outcomes of the batch may
        be told only by the next call, or by `finish`. `entries`, `by_calls`: see
        `LocalStorageEngine.begin_read`."""
        job = ReadJob(batch, self._lookup, report, stop, entries)
        job.by_calls = by_calls and self._device.can_read
        if job.by_calls:
            self.go_by_calls()
        job.ahead = self._wanted(job)
        job.ways = self._device.begin(job.ahead, stop, more=self.has_begun)
        self.finish()
        self._last = job
        if not job.ways:
            self.finish()

    def go_by_calls(self) -> None:
        """What was begun is read by calls: it comes right before, or in the middle of, blocks over
        which a worker has died, and another death would count against them."""
        if self._last is not None and self._device.can_read:
            self._last.by_calls = True

    def finish(self) -> bool:
        """Read the batch that was begun last; whether there was one."""
        job, self._last = self._last, None
        if job is None:
            return False
        self._touch.before_copies([job.batch[at].place for at, _ in job.ahead])
        to_open = {where.shard for _, where in job.ahead}.difference(self._files)
        # In each group the blocks that need no device come first, and the device reads ahead
        # meanwhile. Not for long: groups are small if any of the batch needs the device.
        least = ROUND_BYTES if job.ways else GROUP_BYTES
        for group in groups([at for at, _ in job.ahead], job.nbytes, least):
            waiting = [at for at in group if at in job.ways] if job.ways else []
            here = [at for at in group if at not in job.ways] if waiting else group
            if job.by_calls:
                waiting, here = list(group), []
            late = [at for at in here if job.where(at).shard in to_open] if to_open else []
            if late:
                here = [at for at in here if at not in late]
            self._judge(job, self._load_mapped(job, here))
            for shard in to_open:  # each may be waited for
                part = [at for at in late if job.where(at).shard == shard]
                self._judge(job, self._load_mapped(job, part))
            for at in waiting:
                self._judge(job, self._load_waiting(job, at))
        if None in job.located:
            self._settle_absent(job)
        return True

    def _wanted(self, job: ReadJob) -> list[tuple[int, Location]]:
        """The blocks to read, in this order. Tells at once of stored blocks of another length,
        which are misses: no device is waited for on their account."""
        wanted: list[tuple[int, Location]] = []
        for at, where in job.there():
            if where.nbytes == job.nbytes[at]:
                wanted.append((at, where))
            else:
                self._settle_other_length(job, at, where)
        return wanted

    def _judge(self, job: ReadJob, copied: list[Copied]) -> None:
        """Look again at what was copied, and tell: before anything that may wait for a device or a
        lock."""
        loaded: list[int] = []
        lost: list[int] = []
        damaged: list[int] = []
        unchanged = self._lookup.are_unchanged([where for _, where, _ in copied])
        for (at, where, checksum), is_same in zip(copied, unchanged, strict=True):
            # First the tag, then the sum: after an eviction the sum says nothing about damage.
            if not is_same:
                lost.append(at)
            elif checksum is not None and checksum.intdigest() != where.checksum:
                damaged.append(at)
            else:
                loaded.append(at)
        job.settle(loaded, Outcome.LOADED)
        job.settle(lost, Outcome.LOST)
        for at in damaged:
            self._settle_damaged(job, at, WRONG_SUM)

    @staticmethod
    def _settle_other_length(job: ReadJob, at: int, where: Location) -> None:
        low, high, _ = job.batch[at]
        log.info(
            "block %s is stored with %d bytes, not %d: a miss",
            keymath.key_text(low, high),
            where.nbytes,
            job.nbytes[at],
        )
        job.report((at,), Outcome.MISSING)

    def _settle_damaged(self, job: ReadJob, at: int, problem: str) -> None:
        """Drop a block whose bytes are not what was written, unless it is gone, and tell."""
        where, (low, high, _) = job.where(at), job.batch[at]
        outcome = Outcome.DAMAGED
        # In the middle of writes, not for the stopped holder of the lock.
        timeout = SHORT_SECONDS if self._engine.has_slots_in_hand else LOCK_TIMEOUT_SECONDS
        try:
            self._engine.drop_damaged(
                where.shard, where.slot, where.tag, low, high, problem, timeout
            )
        except (OSError, StoreFormatError) as error:
            outcome = self._failed(error)
        job.report((at,), outcome)

    def _settle_unreadable(self, job: ReadJob, at: int, where: Location, problem: str) -> None:
        """Drop a block whose bytes the device or the file has lost. If it stayed, it would be
        found, never read, and never written again."""
        if self._lookup.is_unchanged(where):
            self._settle_damaged(job, at, problem)
        else:
            job.report((at,), Outcome.LOST)

    def _settle_absent(self, job: ReadJob) -> None:
        """Tell of the blocks that are not there, or that cannot be."""
        job.settle([at for at, entry in enumerate(job.entries) if entry < 0], Outcome.MISSING)
        for at, entry in enumerate(job.entries):
            if entry < 0 or job.located[at] is not None:
                continue
            try:
                outcome = self._drop_senseless(entry, job.batch[at])
            except (OSError, StoreFormatError) as error:
                outcome = self._failed(error)
            job.report((at,), outcome)

    def _failed(self, error: Exception) -> Outcome:
        engine = self._engine
        engine.limited.warning("read from %s failed: %s", engine.directory, str(error))
        return Outcome.FAILED

    def _load_mapped(self, job: ReadJob, group: Sequence[int]) -> list[Copied]:
        """Copy blocks that lie in the page cache; what it cannot copy it tells at once."""
        while True:
            moves, begun = self._plan(job, group)
            group = [at for at, _, _ in begun]
            try:
                self._scatterer.scatter(moves, stop_of(group, job.stop))
            except Stopped:
                continue  # without those that were aborted
            return begun

    def _plan(self, job: ReadJob, group: Sequence[int]) -> tuple[list[Scatter], list[Copied]]:
        """What is to be copied for blocks that lie in the page cache, and what they are then; tells
        of the others."""
        files, located, verify = self._files, job.located, self._verify
        moves: list[Scatter] = []
        begun: list[Copied] = []
        for at in group:
            if job.stop(at):
                job.report((at,), Outcome.STOPPED)
                continue
            (low, high, place), where = job.batch[at], located[at]
            assert where is not None
            try:
                file = files.get(where.shard) or self._engine.file(where.shard)
            except (OSError, StoreFormatError) as error:  # LockTimeoutError is an OSError
                job.report((at,), self._failed(error))
                continue
            checksum = new_checksum(low, high) if verify else None
            if len(where.runs) == 1:
                moves.append((place, file.first_bytes(where.slot, where.nbytes), checksum))
            else:
                for run, nbytes, part in self._parts(where, place):
                    moves.append((part, file.first_bytes(run[0], nbytes), checksum))
            begun.append((at, where, checksum))
        return moves, begun

    def _load_waiting(self, job: ReadJob, at: int) -> list[Copied]:
        """The same of a block that is read by calls, as all are for which a device is waited."""
        (low, high, place), where = job.batch[at], job.where(at)
        checksum = new_checksum(low, high) if self._verify else None
        parts = self._parts(where, place)
        stopped = partial(job.stop, at)
        try:
            ways = job.ways.get(at) or self._device.through_cache(where)
            for way, (_, _, part) in zip(ways, parts, strict=True):
                self._device.read(way, self._scatterer, part, checksum, stopped)
        except Stopped:
            job.report((at,), Outcome.STOPPED)
        except (OSError, StoreFormatError) as error:
            problem = problem_of(error)
            if problem is None:
                job.report((at,), self._failed(error))
            else:
                self._settle_unreadable(job, at, where, problem)
        else:
            return [(at, where, checksum)]
        return []

    def _parts(self, where: Location, place: Place) -> list[tuple[Run, int, Place]]:
        """The runs of a block, how many bytes of it lie in each, and where they go."""
        if len(where.runs) == 1:
            return [(where.runs[0], where.nbytes, place)]
        parts = cut_at_runs(where.runs, where.nbytes, self._engine.geometry.page_bytes)
        return [(run, end - start, place.part(start, end)) for run, start, end in parts]

    def _drop_senseless(self, entry: int, block: BlockIO) -> Outcome:
        """Drop a block that is listed with runs that make no sense; it would be found forever and
        never be read. Usually it was just taken out meanwhile, and nothing is dropped."""
        if self._lookup.find_one(block.low, block.high, touch=False) != entry:
            return Outcome.LOST  # gone since it was looked up
        tag = self._lookup.tag(entry)
        shard, slot = divmod(entry, self._engine.geometry.slots)
        with self._engine.change(shard) as (index, _):
            listed = index.find(block.low, block.high) == slot and self._lookup.tag(entry) == tag
            if not listed or self._lookup.locate(entry, block.low, block.high) is not None:
                return Outcome.MISSING
        problem = "its runs of slots make no sense"
        self._engine.drop_damaged(shard, slot, tag, block.low, block.high, problem)
        return Outcome.DAMAGED
