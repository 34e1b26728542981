"""Reading batches of blocks: find, copy, look again. A part of LocalStorageEngine.

No lock is held, so a block may go while it is copied; the tag and the checksum, asked for after the
copy, tell. Only a block found damaged is taken out under the lock. Blocks are looked at again some
at a time: between two copies each step more is slow, for a copy pushes the interpreter out of the
caches.
"""

from __future__ import annotations

import errno
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from light_mem.engine.base import BlockIO, Outcome, Report, Stop
from light_mem.engine.cold_reads import ColdReads
from light_mem.engine.copy import Copier, Stopped, is_one_piece, new_checksum
from light_mem.engine.dropping import Dropper
from light_mem.engine.first_touch import FirstTouch
from light_mem.engine.read_job import ReadJob
from light_mem.engine.removing import WRONG_SUM
from light_mem.errors import StoreFormatError
from light_mem.index import keys as keymath
from light_mem.index.lookup import Location

if TYPE_CHECKING:
    import xxhash

    from light_mem.engine.local import LocalStorageEngine
    from light_mem.engine.places import Place
    from light_mem.engine.shard_file import ShardFile

log = logging.getLogger("light_mem")

# How many blocks that are not in the page cache the device is asked for at a time.
EXPECTED_BLOCKS = 4
# Short blocks are looked at again, and told of, so many bytes at a time, some 0.5 ms; at once where
# what comes next may wait.
_TELL_BYTES = 4 << 20
# What reading a file fails with when the device has lost the bytes: a bad sector, for a read past
# the page cache, and one whose protection information does not fit.
_UNREADABLE = (errno.EIO, errno.ENODATA, errno.EILSEQ)


class Reader:
    """Reads batches for one engine. Not thread-safe."""

    def __init__(
        self,
        engine: LocalStorageEngine,
        files: Mapping[int, ShardFile],
        copier: Copier,
        verify: bool,
        dropper: Dropper | None,
    ) -> None:
        """`files`: those that the engine has open by now."""
        # Weak: in a cycle, the maps of a closed store would stay until the next collection.
        self._engine: LocalStorageEngine = weakref.proxy(engine)
        self._lookup = engine.lookup
        self._copier = copier
        self._verify = verify
        self._files = files
        self._dropper = dropper
        self._touch = FirstTouch()
        self._cold = ColdReads() if dropper is None else None

    def read(self, batch: Sequence[BlockIO], report: Report, stop: Stop) -> None:
        """`StorageEngine.read`."""
        job = ReadJob(batch, self._lookup, report, stop)
        ahead = job.ahead()
        if self._dropper is not None:
            self._plan(self._dropper, ahead)
        self._touch.before_stores([batch[at].place for at, _ in ahead])
        expected = 0  # of those ahead
        for begun, (at, where) in enumerate(ahead, 1):
            if job.untold + job.nbytes[at] > _TELL_BYTES:
                self._judge(job)
            if self._cold is not None and self._cold.going_on:
                expected = self._expect(self._cold, ahead, begun, expected)
            self._load(job, at, where)
        self._judge(job)
        if len(ahead) < len(batch):
            self._settle_absent(job)

    def _judge(self, job: ReadJob) -> None:
        """Look again at what was copied, and tell: before anything that may wait for a device or a
        lock."""
        loaded: list[int] = []
        lost: list[int] = []
        damaged: list[int] = []
        for at, checksum in job.take_copied():
            where = job.located[at]
            assert where is not None
            # First the tag, then the sum: after an eviction the sum says nothing about damage.
            if not self._lookup.is_unchanged(where):
                lost.append(at)
            elif checksum is not None and checksum != where.checksum:
                damaged.append(at)
            else:
                loaded.append(at)
        job.settle(loaded, Outcome.LOADED)
        job.settle(lost, Outcome.LOST)
        for at in damaged:
            self._settle_damaged(job, at, WRONG_SUM)

    def _settle_damaged(self, job: ReadJob, at: int, problem: str) -> None:
        """Drop a block whose bytes are not what was written, unless it is gone, and tell."""
        where, (low, high, _) = job.located[at], job.batch[at]
        assert where is not None
        outcome = Outcome.DAMAGED
        try:
            self._engine.drop_damaged(where.shard, where.slot, where.tag, low, high, problem)
        except (OSError, StoreFormatError) as error:
            outcome = self._failed(error)
        job.report((at,), outcome)

    def _settle_unreadable(self, job: ReadJob, at: int, where: Location, error: Exception) -> None:
        """The device has lost a block's bytes: kept, it would be found and never read, and never be
        written again."""
        if self._lookup.is_unchanged(where):
            problem = f"the device does not give its bytes ({error})"
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

    def _plan(self, dropper: Dropper, ahead: Sequence[tuple[int, Location]]) -> None:
        """Say what a batch reads, so that the device is kept busy."""
        spans = []
        # What fails here the reads themselves say, each for its block.
        for _, where in ahead:
            try:
                file = self._engine.file(where.shard)
            except (OSError, StoreFormatError):
                continue
            spans += [file.read_span(run, nbytes) for run, nbytes in self._runs(where)]
        try:
            dropper.plan(spans)
        except OSError:
            pass  # no memory, say

    def _expect(
        self, cold: ColdReads, ahead: Sequence[tuple[int, Location]], begun: int, expected: int
    ) -> int:
        """Tell the device of the next blocks, those aside that lie behind the one before them.
        Returns where to go on."""
        for at in range(max(begun, expected), min(len(ahead), begun + EXPECTED_BLOCKS - 1)):
            (_, last), (_, where) = ahead[at - 1 : at + 1]
            (first, _), *more = where.runs
            if more or where.shard != last.shard or first != sum(last.runs[-1]):
                try:
                    file = self._engine.file(where.shard)
                    for run, nbytes in self._runs(where):
                        cold.expect(file.span(run, nbytes))
                except (OSError, StoreFormatError):
                    pass  # the read itself says what is wrong, for its block
            expected = at + 1
        return expected

    def _runs(self, where: Location) -> Iterator[tuple[tuple[int, int], int]]:
        """The runs of a block, and how many bytes of it lie in each."""
        if len(where.runs) == 1:
            yield where.runs[0], where.nbytes
            return
        left = where.nbytes
        for run in where.runs:
            nbytes = min(left, run[1] * self._engine.geometry.page_bytes)
            yield run, nbytes
            left -= nbytes

    def _load(self, job: ReadJob, at: int, where: Location) -> None:
        """Copy a block, to be judged; what it cannot copy it tells at once."""
        if where.nbytes != job.nbytes[at]:
            low, high, _ = job.batch[at]
            log.info(
                "block %s is stored with %d bytes, not %d: a miss",
                keymath.key_text(low, high),
                where.nbytes,
                job.nbytes[at],
            )
            job.report((at,), Outcome.MISSING)
            return
        try:
            checksum = self._copy(job, at, where)
        except Stopped:
            job.report((at,), Outcome.STOPPED)
        except (OSError, StoreFormatError) as error:  # LockTimeoutError is an OSError
            if getattr(error, "errno", None) in _UNREADABLE:
                self._settle_unreadable(job, at, where, error)
            else:
                job.report((at,), self._failed(error))
        else:
            job.has_copied(at, checksum)

    def _copy(self, job: ReadJob, at: int, where: Location) -> int | None:
        """Copy a block into its pages; the checksum of what was copied, if it is asked for. Raises
        Stopped, OSError, StoreFormatError."""
        low, high, place = job.batch[at]
        file = self._files.get(where.shard) or self._open(job, where.shard)
        if len(where.runs) == 1:
            slot, nbytes = where.runs[0][0], where.nbytes
            is_cold = self._is_cold(file, slot, nbytes)
            if is_cold is False and is_one_piece(place):
                if job.stop(at):
                    raise Stopped
                source = file.first_bytes(slot, nbytes)
                return self._copier.scatter_whole(low, high, place, source, self._verify)
        checksum = new_checksum(low, high) if self._verify else None
        stopped = partial(job.stop, at)
        if len(where.runs) == 1:
            self._copy_run(job, file, where.runs[0], place, checksum, stopped, is_cold)
        else:
            done = 0
            for run, nbytes in self._runs(where):
                part = place.part(done, done + nbytes)
                is_cold = self._is_cold(file, run[0], nbytes)
                self._copy_run(job, file, run, part, checksum, stopped, is_cold)
                done += nbytes
        return None if checksum is None else checksum.intdigest()

    def _is_cold(self, file: ShardFile, slot: int, nbytes: int) -> bool | None:
        """Whether slots are read from the device through the page cache; None: past it."""
        return None if self._cold is None else self._cold.is_cold(file.address(slot), nbytes)

    def _copy_run(
        self,
        job: ReadJob,
        file: ShardFile,
        run: tuple[int, int],
        place: Place,
        checksum: xxhash.xxh3_64 | None,
        stopped: Callable[[], bool],
        is_cold: bool | None,
    ) -> None:
        """Copy the bytes of a run of slots, as long as `place`; raises Stopped, OSError."""
        if is_cold is not False:  # a device is waited for
            self._judge(job)
        nbytes = place.nbytes
        if self._cold is None or not is_cold:
            file.scatter(self._copier, run, nbytes, place, checksum, stopped)
            return
        self._cold.read(file.span(run, nbytes), place, stopped)
        if checksum is not None:  # as after any copy, of what the slots hold now
            checksum.update(file.first_bytes(run[0], nbytes).data)

    def _open(self, job: ReadJob, shard: int) -> ShardFile:
        self._judge(job)
        return self._engine.file(shard)

    def _drop_senseless(self, entry: int, block: BlockIO) -> Outcome:
        """Drop a block that is listed with runs that make no sense: it would be found for good and
        never be read. Usually it is only gone by now."""
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
