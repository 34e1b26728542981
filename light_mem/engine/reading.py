"""Reading batches of blocks: find, copy, look again. A part of LocalStorageEngine.

No lock is held, so a block may go while it is copied; the tag and the checksum, asked for after the
copy, tell. Only a block found damaged is taken out under the lock.
"""

from __future__ import annotations

import errno
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from light_mem.engine.base import BlockIO, Outcome, Report, Stop
from light_mem.engine.cold_reads import Arriving, ColdReads
from light_mem.engine.copy import Copier, Stopped, new_checksum
from light_mem.engine.dropping import Dropper
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

# Of blocks that are not in the page cache, what is asked of the device at a time: a few small ones
# keep it busy, and so does one large one.
AHEAD_BLOCKS = 4
AHEAD_BYTES = 16 << 20
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
        self._cold = ColdReads()

    def read(self, batch: Sequence[BlockIO], report: Report, stop: Stop) -> None:
        """`StorageEngine.read`."""
        keys = [block[:2] for block in batch]
        entries = self._lookup.find_each(keys)
        located = self._lookup.locate_many(entries, keys)
        if self._dropper is not None:
            self._plan(self._dropper, located)
        arriving: dict[int, Arriving] = {}
        begun = 0  # blocks before this one are on their way, or need not be
        try:
            for at, where in enumerate(located):
                if self._dropper is None:
                    begun = self._begin(batch, located, arriving, max(at, begun), at, stop)
                try:
                    if where is not None:
                        its = arriving.get(at)
                        outcome = self._load(batch[at], where, partial(stop, at), its)
                    elif entries[at] >= 0:
                        outcome = self._drop_senseless(entries[at], batch[at])
                    else:
                        outcome = Outcome.MISSING
                except (LockTimeoutError, OSError, StoreFormatError) as error:
                    engine = self._engine
                    engine.limited.warning("read from %s failed: %s", engine.directory, str(error))
                    outcome = Outcome.FAILED
                arriving.pop(at, None)  # not before: a Ctrl-C may end the wait for it
                report(at, outcome)
        finally:
            for each in arriving.values():
                each.give_up()

    def _begin(
        self,
        batch: Sequence[BlockIO],
        located: Sequence[Location | None],
        arriving: dict[int, Arriving],
        begun: int,
        at: int,
        stop: Stop,
    ) -> int:
        """Let blocks that are not in the page cache come from the device: the one that is read
        next, and while that is one of them, some after it. Returns where to go on."""
        on_their_way = sum(each.nbytes for each in arriving.values())
        while begun < len(located) and (
            begun == at or (0 < on_their_way < AHEAD_BYTES and len(arriving) < AHEAD_BLOCKS)
        ):
            where, block = located[begun], batch[begun]
            if where is not None and len(where.runs) == 1 and where.nbytes == block.nbytes:
                run = where.runs[0]
                try:
                    file = self._file(where.shard)
                except (OSError, StoreFormatError):
                    break  # the read itself says what is wrong
                if self._cold.is_cold(file.address(run[0]), where.nbytes):
                    arriving[begun] = self._cold.begin(
                        file.span(run, where.nbytes), block.place, partial(stop, begun)
                    )
                    on_their_way += where.nbytes
            begun += 1
        return begun

    def close(self) -> None:
        """End the threads that read."""
        self._cold.close()

    def _plan(self, dropper: Dropper, located: Sequence[Location | None]) -> None:
        """Say what a batch reads, so that the device is kept busy."""
        spans = []
        try:
            for where in located:
                if where is not None:
                    left = where.nbytes
                    file = self._file(where.shard)
                    for run in where.runs:
                        nbytes = min(left, run[1] * file.page_bytes)
                        spans.append(file.read_span(run, nbytes))
                        left -= nbytes
        except (OSError, StoreFormatError):
            pass  # the reads themselves say what is wrong, each for its block
        dropper.plan(spans)

    def _load(
        self,
        block: BlockIO,
        where: Location,
        stopped: Callable[[], bool],
        arriving: Arriving | None,
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
            if arriving is None:
                self._copy(file, where, place, checksum, stopped)
            else:
                arriving.finish()
                if checksum is not None:  # as after any copy, of what the slots hold now
                    slots = file.bytes(*where.runs[0])
                    checksum.update(slots[:nbytes].data)
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
        single = len(where.runs) == 1
        done = 0
        for run in where.runs:
            end = min(where.nbytes, done + run[1] * file.page_bytes)
            part = place if single else place.part(done, end)
            file.scatter(self._copier, run, end - done, part, checksum, stopped)
            done = end

    def _file(self, shard: int) -> ShardFile:
        file = self._files.get(shard)
        return self._engine.file(shard) if file is None else file

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
