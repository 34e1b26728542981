"""Reading batches of blocks: find, copy, look again. A part of LocalStorageEngine.

No lock is held, so a block may go while it is copied; the tag and the checksum, asked for after the
copy, tell. Only a block found damaged is taken out under the lock.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from light_mem.engine.base import BlockIO, Outcome, Report, Stop
from light_mem.engine.copy import Copier, Stopped, new_checksum
from light_mem.engine.dropping import Dropper
from light_mem.errors import LockTimeoutError, StoreFormatError
from light_mem.index import keys as keymath
from light_mem.index.lookup import Location

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

    def read(self, batch: Sequence[BlockIO], report: Report, stop: Stop) -> None:
        """`StorageEngine.read`."""
        keys = [block[:2] for block in batch]
        entries = self._lookup.find_each(keys)
        located = self._lookup.locate_many(entries, keys)
        if self._dropper is not None:
            self._plan(self._dropper, located)
        for at, where in enumerate(located):
            try:
                if where is not None:
                    outcome = self._load(batch[at], where, partial(stop, at))
                elif entries[at] >= 0:
                    outcome = self._drop_senseless(entries[at], batch[at])
                else:
                    outcome = Outcome.MISSING
            except (LockTimeoutError, OSError, StoreFormatError) as error:
                engine = self._engine
                engine.limited.warning("read from %s failed: %s", engine.directory, str(error))
                outcome = Outcome.FAILED
            report(at, outcome)

    def _plan(self, dropper: Dropper, located: Sequence[Location | None]) -> None:
        """Say what a batch reads, so that the device is kept busy."""
        spans = []
        try:
            for where in located:
                if where is not None:
                    left = where.nbytes
                    file = self._engine.file(where.shard)
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
        mapped: bool = False,
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
        file = self._files.get(where.shard)
        if file is None:
            file = self._engine.file(where.shard)
        checksum = new_checksum(low, high) if self._verify else None
        single = len(where.runs) == 1
        done = 0
        try:
            for start, length in where.runs:
                end = min(nbytes, done + length * file.page_bytes)
                file.scatter(
                    self._copier,
                    (start, length),
                    end - done,
                    place if single else place.part(done, end),
                    checksum,
                    stopped,
                    mapped,
                )
                done = end
        except Stopped:
            return Outcome.STOPPED
        # First the tag, then the sum: after an eviction the sum says nothing about damage.
        if not self._lookup.is_unchanged(where):
            return Outcome.LOST
        if checksum is not None and checksum.intdigest() != where.checksum:
            if not mapped:
                # Of what a system call read, the sum is taken in the KV memory: who writes there
                # meanwhile, against the rules, must not make a sound block look damaged.
                return self._load(block, where, stopped, mapped=True)
            self._engine.drop_damaged(where.shard, where.slot, where.tag, low, high)
            return Outcome.DAMAGED
        return Outcome.LOADED

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
        self._engine.drop_damaged(shard, slot, tag, block.low, block.high)
        return Outcome.DAMAGED
