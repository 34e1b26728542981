"""LocalStorageEngine: blocks in the shards of a store on a local disk.

One engine a process: the server's answers look-ups and takes blocks out, the workers' move bytes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from light_mem.engine.base import (
    BlockIO,
    Outcome,
    Report,
    Stop,
    StorageEngine,
    check_places,
    never,
)
from light_mem.engine.device_reads import DeviceReads
from light_mem.engine.dropping import Dropper
from light_mem.engine.filling import Filler
from light_mem.engine.first_touch import FirstTouch
from light_mem.engine.gather import Gatherer
from light_mem.engine.intents import Intents
from light_mem.engine.member import Member
from light_mem.engine.publishing import Publisher
from light_mem.engine.reading import Reader
from light_mem.engine.scatter import Scatterer
from light_mem.engine.settings import DEFAULTS, EngineSettings
from light_mem.engine.store_identity import StoreIdentity
from light_mem.engine.write_job import WriteJob
from light_mem.engine.write_now import WriteNow
from light_mem.engine.writing import Writer
from light_mem.errors import LockTimeoutError, StoreFormatError
from light_mem.index.format import RELINKING
from light_mem.index.locks import PathLock, lock_path
from light_mem.index.owners import Owners

if TYPE_CHECKING:
    from light_mem.engine.scans_ahead import ScansAhead

log = logging.getLogger("light_mem")


class LocalStorageEngine(Member, StorageEngine):
    """Blocks in mapped shard files, found through the mapped index.

    What it leaves out: it keeps no lock while it copies, so a block may be evicted under a reader;
    the reader then sees that its tag has changed and reports LOST. Look-ups may be called from any
    thread; `write` and `read` from one thread an engine.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        kind: str,
        settings: EngineSettings = DEFAULTS,
        expected: StoreIdentity | None = None,
    ) -> None:
        """Open a store that `open_store` has prepared; `kind` names this process to operators.

        `expected`: which store it has to be. Raises StoreFormatError (none, or another one),
        StoreBusyError, OSError.
        """
        self._gatherer, self._scatterer = Gatherer(), Scatterer()
        self._dropper = Dropper() if settings.page_cache == "drop" else None
        self.evicts = True  # False: a write takes only free room, else its outcome is NO_ROOM
        super().__init__(directory, kind, settings, self._dropper, expected)
        # Not `self.file`: no cycle, in which the maps of a closed store would stay.
        inserts = self._index.control["inserts"]
        self._device = DeviceReads(
            self.geometry.page_bytes,
            self._open.file,
            lambda shard: int(inserts[shard]),
            drops=self.drops,
        )
        self._touch = touch = FirstTouch()
        self._reader = Reader(
            self, self._open.files, self._scatterer, self.verify, self._device, touch
        )
        intents = Intents(self._owner)
        publisher = Publisher(self, self._owner, intents, flush=settings.durability == "flush")
        filler = Filler(self, self._gatherer, touch)
        self._writer = Writer(self, self._owner, intents, filler, publisher)
        self._write_now = WriteNow(self, self._owner, intents, self._gatherer)

    @classmethod
    def open_store(
        cls,
        directory: str | os.PathLike[str],
        *,
        page_bytes: int,
        num_of_shard: int,
        storage_size: int,
        block_pages: int,
        kind: str = "server",
        settings: EngineSettings = DEFAULTS,
        recover: bool = True,
    ) -> LocalStorageEngine:
        """Make or open the store in `directory`; see `opening.prepare` for the errors.

        `recover=False` leaves `recover()` to the caller, who need not wait for it: until then
        slots of dead processes stay taken. What is stored is found in any case.
        """
        # Not for workers, which open what is prepared.
        from light_mem.engine import foreign, opening, store_room

        opening.check_sizes(page_bytes, num_of_shard, storage_size, block_pages)
        path = Path(directory)
        foreign.refuse_foreign(path)  # before the lock's own file is made
        store_room.require_room_for_new(path.absolute(), page_bytes, num_of_shard, storage_size)
        opening.make_directory(path)
        engine: LocalStorageEngine | None = None
        try:
            with PathLock(lock_path(path, "open")).hold(timeout=60):
                foreign.refuse_foreign(path)  # another may have come meanwhile
                owners = Owners(path)
                try:
                    opening.prepare(path, page_bytes, num_of_shard, storage_size, owners)
                finally:
                    owners.close()
                engine = cls(path, kind=kind, settings=settings)
                engine.mark_open()
        except BaseException:
            if engine is not None:  # else a member for as long as this process lives
                engine.close()
            raise
        try:
            if recover:
                engine.recover()
            else:
                engine.settle(RELINKING)
        except LockTimeoutError as error:
            # A stopped stranger holds a shard: the store opens all the same, and slots of dead
            # processes there stay taken until a write finds no room.
            log.warning("store %s: %s", path, str(error))
        except BaseException:
            engine.close()
            raise
        return engine

    # --- moving bytes ----------------------------------------------------------------------------

    def write(self, batch: Sequence[BlockIO], report: Report, stop: Stop = never) -> None:
        self.begin_write(batch, report, stop)
        self.finish_writes()

    def begin_write(
        self,
        batch: Sequence[BlockIO],
        report: Report,
        stop: Stop = never,
        mixed: Sequence[int] | None = None,
        by_calls: bool = False,
    ) -> None:
        """`write` for who has more to write: with `page_cache="drop"` it may return before the last
        blocks are on the device. Their outcomes are told by the next call, or `finish_writes`.

        `mixed`: the keys' `keys.mix`, where that is known. `by_calls`: touch no mapped slot, which
        may be SIGBUS.
        """
        check_places(batch, self.geometry.page_bytes)
        if by_calls:
            self._reader.go_by_calls()
        self._writer.begin(WriteJob(batch, self.geometry, report, stop, mixed, by_calls))
        if self._dropper is not None:
            self._drop(self._dropper.keep_up)

    def finish_writes(self) -> bool:
        """End what `begin_write` has left; whether there was any."""
        return self._writer.finish()

    @property
    def has_begun_writes(self) -> bool:
        """Whether there is something for `finish_writes`."""
        return self._writer.has_begun

    @property
    def has_slots_in_hand(self) -> bool:
        """Whether there are slots that others cannot have until we publish, or give them back."""
        return self._writer.has_slots_in_hand

    @property
    def drops(self) -> bool:
        """Whether what is written goes past the page cache, or is dropped from it."""
        return self._dropper is not None

    def write_now(self, block: BlockIO, ahead: ScansAhead | None = None) -> Outcome | None:
        """Write one block without waiting for a lock; see `WriteNow.write`. From the one thread
        that writes."""
        check_places([block], self.geometry.page_bytes)
        # Blocks begun earlier share the intents, and this call would give their slots back.
        return None if self._writer.has_begun else self._write_now.write(block, ahead)

    def read(self, batch: Sequence[BlockIO], report: Report, stop: Stop = never) -> None:
        self.begin_read(batch, report, stop)
        self.finish_reads()

    def begin_read(
        self,
        batch: Sequence[BlockIO],
        report: Report,
        stop: Stop = never,
        entries: list[int] | None = None,
        by_calls: bool = False,
    ) -> None:
        """`read` for who has more to read: a batch that waits for a device may be read, and its
        outcomes told, by the next call, or by `finish_reads`.

        `entries`: where the blocks were found a moment ago, see `find_entries`; any number does.
        `by_calls`: touch no mapped slot, which takes longer: for blocks over which a process may
        have died. What the device does not give is SIGBUS there, and damage by calls.
        """
        check_places(batch, self.geometry.page_bytes)
        self._reader.begin(batch, report, stop, entries, by_calls)

    def finish_reads(self) -> bool:
        """End what `begin_read` has left; whether there was any."""
        return self._reader.finish()

    @property
    def has_begun_reads(self) -> bool:
        """Whether there is something for `finish_reads`."""
        return self._reader.has_begun

    @property
    def reads_have_landed(self) -> bool:
        """Whether `finish_reads` would wait for no device."""
        return self._device.have_landed

    def rest(self) -> bool:
        """For a worker without work: do one piece of the work that was put off, or of the
        preparation that its first blocks would wait for (80 ms, most of it imports). Returns
        whether there was any."""
        if self._dropper is not None and self._drop(self._dropper.drop_next):
            return True
        return self._open.prepare_next()

    @property
    def has_later(self) -> bool:
        """Whether there is something for `bring_in`. The thread that reads."""
        return self._device.has_later

    def bring_in(self) -> bool:
        """While nobody waits for the device: bring in a piece of what was read past the page cache;
        whether there was any. The thread that reads."""
        return self._device.bring_in()

    def _drop(self, step: Callable[[], bool | None]) -> bool | None:
        """Finish dropping pages. The blocks are stored, so an error only costs page cache; it is
        logged."""
        try:
            return step()
        except OSError as error:
            self.limited.warning("%s: writing out failed: %s", self.directory, str(error))
            return True

    def _end_moves(self) -> bool:
        self._reader.finish()
        try:
            self._writer.close()
        except (LockTimeoutError, OSError, StoreFormatError) as error:
            # Our record stays, unlocked: the next process to open the store gives the slots back.
            log.warning(
                "store %s is left with slots of failed writes: %s", self.directory, str(error)
            )
            return False
        return True

    def _let_go(self) -> None:
        self._device.close()
        self._gatherer.forget()
        self._scatterer.forget()
        self._touch.forget()
        if self._dropper is not None:
            self._drop(self._dropper.finish)
