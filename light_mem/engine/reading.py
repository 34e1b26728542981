"""Reading batches of blocks: find, copy, look again. A part of LocalStorageEngine.

No lock is held, so a block may go while it is copied; the tag and the checksum, asked for after the
copy, tell. Only a block found damaged is taken out under the lock.
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
from light_mem.engine.copy import Copier, Stopped, new_checksum
from light_mem.engine.dropping import Dropper
from light_mem.engine.first_touch import FirstTouch
from light_mem.engine.removing import WRONG_SUM
from light_mem.errors import LockTimeoutError, StoreFormatError
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
# To tell of a block costs a tenth of the copy of a short one, so they are told of by the megabyte;
# at once where what comes next may wait.
_TELL_BYTES = 1 << 20
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
        self._report: Report = lambda _, __: None
        self._loaded: list[int] = []  # positions in the batch in hand, and not told of yet
        self._untold = 0  # their bytes

    def read(self, batch: Sequence[BlockIO], report: Report, stop: Stop) -> None:
        """`StorageEngine.read`. In the order of the files: that is how a device reads ahead."""
        keys = [block[:2] for block in batch]
        entries = self._lookup.find_each(keys)
        located = self._lookup.locate_many(entries, keys)
        order = sorted(range(len(batch)), key=entries.__getitem__)
        ahead = [where for at in order if (where := located[at]) is not None]
        if self._dropper is not None:
            self._plan(self._dropper, ahead)
        expected = begun = 0  # of those ahead
        self._report, self._loaded, self._untold = report, [], 0
        for at in order:
            where, nbytes = located[at], batch[at].nbytes
            if self._untold + nbytes > _TELL_BYTES:
                self._tell()
            try:
                if where is not None:
                    begun += 1
                    if self._cold is not None and self._cold.going_on:
                        expected = self._expect(self._cold, ahead, begun, expected)
                    outcome = self._load(batch[at], where, partial(stop, at))
                elif entries[at] >= 0:
                    outcome = self._drop_senseless(entries[at], batch[at])
                else:
                    outcome = Outcome.MISSING
            except (LockTimeoutError, OSError, StoreFormatError) as error:
                engine = self._engine
                engine.limited.warning("read from %s failed: %s", engine.directory, str(error))
                outcome = Outcome.FAILED
            if outcome is Outcome.LOADED:
                self._loaded.append(at)
                self._untold += nbytes
            else:
                report((at,), outcome)
        self._tell()

    def _tell(self) -> None:
        """Tell of what was loaded: before anything that may wait for a device or a lock."""
        if self._loaded:
            loaded, self._loaded, self._untold = self._loaded, [], 0
            self._report(loaded, Outcome.LOADED)

    def _plan(self, dropper: Dropper, ahead: Sequence[Location]) -> None:
        """Say what a batch reads, so that the device is kept busy."""
        spans = []
        # What fails here the reads themselves say, each for its block.
        for where in ahead:
            try:
                file = self._file(where.shard)
            except (OSError, StoreFormatError):
                continue
            spans += [file.read_span(run, nbytes) for run, nbytes in self._runs(where)]
        try:
            dropper.plan(spans)
        except OSError:
            pass  # no memory, say

    def _expect(self, cold: ColdReads, ahead: Sequence[Location], begun: int, expected: int) -> int:
        """Tell the device of the next blocks, those aside that lie behind the one before them.
        Returns where to go on."""
        for at in range(max(begun, expected), min(len(ahead), begun + EXPECTED_BLOCKS - 1)):
            last, where = ahead[at - 1], ahead[at]
            (first, _), *more = where.runs
            if more or where.shard != last.shard or first != sum(last.runs[-1]):
                try:
                    file = self._file(where.shard)
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

    def _load(
        self,
        block: BlockIO,
        where: Location,
        stopped: Callable[[], bool],
    ) -> Outcome:
        low, high, place = block
        nbytes = place.nbytes
        if where.nbytes != nbytes:
            log.info(
                "block %s is stored with %d bytes, not %d: a miss",
                keymath.key_text(low, high),
                where.nbytes,
                nbytes,
            )
            return Outcome.MISSING
        file = self._file(where.shard)
        checksum = new_checksum(low, high) if self._verify else None
        problem = ""
        try:
            self._touch.before_store(place)
            self._copy(file, where, place, checksum, stopped)
        except Stopped:
            return Outcome.STOPPED
        except OSError as error:
            # Kept, such a block would be found and never read, and never be written again.
            if error.errno not in _UNREADABLE:
                raise
            problem = f"the device does not give its bytes ({error})"
        # First the tag, then the sum: after an eviction the sum says nothing about damage.
        if not self._lookup.is_unchanged(where):
            return Outcome.LOST
        if not problem and checksum is not None and checksum.intdigest() != where.checksum:
            problem = WRONG_SUM
        if problem:
            self._tell()
            self._engine.drop_damaged(where.shard, where.slot, where.tag, low, high, problem)
            return Outcome.DAMAGED
        return Outcome.LOADED

    def _copy(
        self,
        file: ShardFile,
        where: Location,
        place: Place,
        checksum: xxhash.xxh3_64 | None,
        stopped: Callable[[], bool],
    ) -> None:
        """Copy a block, run by run; raises Stopped, OSError."""
        if len(where.runs) == 1:
            self._copy_run(file, where.runs[0], where.nbytes, place, checksum, stopped)
            return
        done = 0
        for run, nbytes in self._runs(where):
            part = place.part(done, done + nbytes)
            self._copy_run(file, run, nbytes, part, checksum, stopped)
            done += nbytes

    def _copy_run(
        self,
        file: ShardFile,
        run: tuple[int, int],
        nbytes: int,
        place: Place,
        checksum: xxhash.xxh3_64 | None,
        stopped: Callable[[], bool],
    ) -> None:
        cold = self._cold
        is_cold = cold is not None and cold.is_cold(file.address(run[0]), nbytes)
        if cold is None or is_cold:  # a device is waited for
            self._tell()
        if cold is None or not is_cold:
            file.scatter(self._copier, run, nbytes, place, checksum, stopped)
            return
        cold.read(file.span(run, nbytes), place, stopped)
        if checksum is not None:  # as after any copy, of what the slots hold now
            checksum.update(file.bytes(*run)[:nbytes].data)

    def _file(self, shard: int) -> ShardFile:
        file = self._files.get(shard)
        if file is None:
            self._tell()
            file = self._engine.file(shard)
        return file

    def _drop_senseless(self, entry: int, block: BlockIO) -> Outcome:
        """Drop a block that is listed with runs that make no sense: it would be found for good and
        never be read. Usually it is only gone by now."""
        if self._lookup.find_one(block.low, block.high, touch=False) != entry:
            return Outcome.LOST  # gone since it was looked up
        self._tell()
        tag = self._lookup.tag(entry)
        shard, slot = divmod(entry, self._engine.geometry.slots)
        with self._engine.change(shard) as (index, _):
            listed = index.find(block.low, block.high) == slot and self._lookup.tag(entry) == tag
            if not listed or self._lookup.locate(entry, block.low, block.high) is not None:
                return Outcome.MISSING
        problem = "its runs of slots make no sense"
        self._engine.drop_damaged(shard, slot, tag, block.low, block.high, problem)
        return Outcome.DAMAGED
