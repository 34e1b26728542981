"""LocalStorageEngine: blocks in the shards of a store on a local disk.

One engine a process: the server's answers look-ups and takes blocks out, the workers' move bytes.
All coordination is in the store's files, so any number of processes of any number of servers may
hold one.
"""

from __future__ import annotations

import _thread
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from light_mem.engine import keeping, removing
from light_mem.engine.base import (
    BlockIO,
    Outcome,
    Report,
    Stop,
    StorageEngine,
    check_places,
    never,
)
from light_mem.engine.copy import Copier
from light_mem.engine.device_reads import DeviceReads
from light_mem.engine.dropping import Dropper
from light_mem.engine.intents import Intents
from light_mem.engine.open_shards import OpenShards
from light_mem.engine.publishing import Publisher
from light_mem.engine.reading import Reader
from light_mem.engine.shard_file import ShardFile
from light_mem.engine.write_now import WriteNow
from light_mem.engine.writing import Writer
from light_mem.errors import LeaseLimitError, LockTimeoutError, StoreBusyError, StoreFormatError
from light_mem.index import description, retention
from light_mem.index import file as index_file
from light_mem.index.ages import AgeBucket, by_age
from light_mem.index.file import IndexFile
from light_mem.index.format import CHANGING, RELINKING
from light_mem.index.keys import KeyArray
from light_mem.index.leases import Leases
from light_mem.index.locks import LOCK_TIMEOUT_SECONDS, PathLock, lock_path
from light_mem.index.lookup import Lookup
from light_mem.index.owners import Owner, OwnerInfo, Owners
from light_mem.logs import Limited

if TYPE_CHECKING:
    from light_mem.index.shard import ShardIndex

log = logging.getLogger("light_mem")

# Log records keep their arguments: an exception among them would keep its frames, and with them
# mappings of a store that is long closed. So errors are logged as text.


class LocalStorageEngine(StorageEngine):
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
        verify: bool = True,
        durability: str = "kernel",
        page_cache: str = "keep",
        time_to_live: float | None = None,
    ) -> None:
        """Open a store that `open_store` has prepared; `kind` names this process to operators.

        `time_to_live`: seconds after which what this engine writes counts as absent.
        """
        self.directory = Path(directory)
        geometry = description.load(self.directory)
        if geometry is None:
            raise StoreFormatError(
                f"{self.directory} holds no store",
                path=str(self.directory),
                field="store.json",
                found=None,
                expected="a description",
            )
        self.geometry = geometry
        self.verify = verify
        self.time_to_live = time_to_live
        self.keeps: dict[tuple[int, int], int] = {}  # of blocks to write: instead of `time_to_live`
        self._copier = Copier()
        self._dropper = Dropper() if page_cache == "drop" else None
        self._closed = False
        self._ending = threading.Lock()  # only tried: of the thread that ends leases for finalizers
        self._in_order = True  # nothing of ours was left behind
        self.limited = Limited()  # for what a failing disk would say of every block
        self.evicts = True  # False: a write takes only free room, else its outcome is NO_ROOM
        self._owners = Owners(self.directory)
        try:
            self._index = IndexFile(self.directory / index_file.NAME, geometry)
            self.lookup = Lookup(self._index)
            # Before joining, which may reclaim: that changes shards. Of owner 0, who is nobody.
            self.leases = Leases(self._owners, 0)
            self._open = OpenShards(
                self.directory, geometry, self._index, self.lookup, self.leases, self._dropper
            )
            self._owner = self._join(kind)
            self.leases = self._open.leases = Leases(self._owners, self._owner.number)
        except BaseException:
            self._owners.close()
            raise
        # Not `self.file`: no cycle, in which the maps of a closed store would stay.
        inserts = self._index.control["inserts"]
        self._device = DeviceReads(
            geometry.page_bytes,
            self._open.file,
            lambda shard: int(inserts[shard]),
            drops=self.drops,
        )
        self._reader = Reader(self, self._open.files, self._copier, verify, self._device)
        intents = Intents(self._owner)
        publisher = Publisher(self, self._owner, intents, flush=durability == "flush")
        self._writer = Writer(self, self._owner, intents, self._copier, publisher)
        self._write_now = WriteNow(self, self._owner, intents, self._copier)

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
        verify: bool = True,
        durability: str = "kernel",
        time_to_live: float | None = None,
        recover: bool = True,
    ) -> LocalStorageEngine:
        """Make or open the store in `directory`; see `opening.prepare` for the errors.

        `recover=False` leaves `recover()` to the caller, who need not wait for it: until then
        slots of dead processes stay taken. What is stored is found in any case.
        """
        from light_mem.engine import opening  # not for workers, which open what is prepared

        opening.check_sizes(page_bytes, num_of_shard, storage_size, block_pages)
        path = Path(directory)
        opening.require_room_for_new(path.absolute(), page_bytes, num_of_shard, storage_size)
        opening.make_directory(path)
        with PathLock(lock_path(path, "open")).hold(timeout=60):
            opening.refuse_other_version(path)
            owners = Owners(path)
            try:
                opening.prepare(path, page_bytes, num_of_shard, storage_size, owners)
            finally:
                owners.close()
            engine = cls(
                path, kind=kind, verify=verify, durability=durability, time_to_live=time_to_live
            )
            engine._index.mark_open()
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

    def _join(self, kind: str) -> Owner:
        try:
            return self._owners.join(kind)
        except StoreBusyError:
            if not self.reclaim():  # records of the dead may take all the room
                raise
            return self._owners.join(kind)

    # --- look-ups --------------------------------------------------------------------------------

    def find(
        self, keys: KeyArray, touch: bool = True, nbytes: npt.NDArray[np.int64] | None = None
    ) -> npt.NDArray[np.bool_]:
        return self.find_entries(keys, touch, nbytes) >= 0

    def find_entries(
        self, keys: KeyArray, touch: bool = True, nbytes: npt.NDArray[np.int64] | None = None
    ) -> npt.NDArray[np.int64]:
        """`find`, but where in the index the blocks are listed, -1: they are not. Any thread."""
        entries = self.lookup.find(keys, touch)
        if nbytes is not None:
            found = np.flatnonzero(entries >= 0)
            stored = self._index.entries["nbytes"][entries[found]]
            entries[found[stored != nbytes[found].astype(np.uint64)]] = -1
        return entries

    def is_stored(self, low: int, high: int, nbytes: int) -> bool:
        """Whether a block of this key and length is stored; not counted as use. Any thread."""
        entry = self.lookup.find_one(low, high, touch=False)
        return entry >= 0 and int(self._index.entries["nbytes"][entry]) == nbytes

    # --- moving bytes ----------------------------------------------------------------------------

    def write(self, batch: Sequence[BlockIO], report: Report, stop: Stop = never) -> None:
        self.begin_write(batch, report, stop)
        self.finish_writes()

    def begin_write(self, batch: Sequence[BlockIO], report: Report, stop: Stop = never) -> None:
        """`write` for who has more to write: with `page_cache="drop"` it may return before the last
        blocks are on the device. Their outcomes are told by the next call, or `finish_writes`."""
        check_places(batch, self.geometry.page_bytes)
        self._writer.begin(batch, report, stop)
        if self._dropper is not None:
            self._drop(self._dropper.keep_up)

    def finish_writes(self) -> bool:
        """End what `begin_write` has left; whether there was any."""
        return self._writer.finish()

    @property
    def has_begun_writes(self) -> bool:
        """Whether there is something for `finish_writes`."""
        return self._writer.has_begun

    def prepare(self) -> None:
        """Open all shards, for `write_now`. One thread."""
        while self._open.prepare_next():
            pass

    def is_at_hand(self, shard: int) -> bool:
        """Whether a shard is open, and nobody is changing it or has died doing so: then a change
        has nothing to wait for, and nothing to put in order."""
        return self._open.is_open(shard) and not self._index.control["dirty"][shard]

    @property
    def drops(self) -> bool:
        """Whether what is written goes past the page cache, or is dropped from it."""
        return self._dropper is not None

    @property
    def is_closed(self) -> bool:
        """Whether `close` has begun."""
        return self._closed

    def write_now(self, block: BlockIO) -> Outcome | None:
        """Write one block without waiting for a lock; see `WriteNow.write`. From the one thread
        that writes."""
        check_places([block], self.geometry.page_bytes)
        # What was begun shares its intents, and would be given back.
        return None if self._writer.has_begun else self._write_now.write(block)

    def read(self, batch: Sequence[BlockIO], report: Report, stop: Stop = never) -> None:
        self.begin_read(batch, report, stop)
        self.finish_reads()

    def begin_read(
        self,
        batch: Sequence[BlockIO],
        report: Report,
        stop: Stop = never,
        entries: list[int] | None = None,
    ) -> None:
        """`read` for who has more to read: a batch that waits for a device may be read, and its
        outcomes told, by the next call, or by `finish_reads`.

        `entries`: where the blocks were found a moment ago, see `find_entries`; any number does.
        """
        check_places(batch, self.geometry.page_bytes)
        self._reader.begin(batch, report, stop, entries)

    def finish_reads(self) -> bool:
        """End what `begin_read` has left; whether there was any."""
        return self._reader.finish()

    @property
    def has_begun_reads(self) -> bool:
        """Whether there is something for `finish_reads`."""
        return self._reader.has_begun

    def rest(self) -> bool:
        """For a worker without work: do one piece of what can wait, or of what its first blocks
        would wait for (80 ms, most of it imports); whether there was any."""
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
        """The blocks are stored: what fails here costs page cache, and is said."""
        try:
            return step()
        except OSError as error:
            self.limited.warning("%s: writing out failed: %s", self.directory, str(error))
            return True

    def drop_damaged(
        self,
        shard: int,
        slot: int,
        tag: int,
        low: int,
        high: int,
        problem: str = removing.WRONG_SUM,
    ) -> None:
        """Take out a block that was found damaged, if its tag is still this one."""
        removing.drop_damaged(self, shard, slot, tag, low, high, problem)

    # --- keeping blocks --------------------------------------------------------------------------

    def keeps_for(self, keys: Sequence[tuple[int, int]]) -> list[int]:
        """The `keep` of each block that is written now."""
        usual = retention.keep_for(self.time_to_live)
        if not self.keeps:
            return [usual] * len(keys)
        return [self.keeps.get(key, usual) for key in keys]

    def pin(self, keys: KeyArray) -> int:
        """Pin blocks, so that they are not evicted; see `keeping.pin`. Any thread."""
        return keeping.pin(self, keys)

    def unpin(self, keys: KeyArray) -> int:
        """Take pins away; returns how many of the keys were pinned. Any thread."""
        return keeping.unpin(self, keys)

    def lease(self, low: int, high: int) -> keeping.Leased | None:
        """Keep a block where it lies until `end_lease`; see `keeping.lease`. Any thread."""
        try:
            keeping.end_dropped(self, timeout=0)  # what is not to be had now can wait
            try:
                return keeping.lease(self, low, high)
            except LeaseLimitError:
                if not self.leases.dropped:
                    raise
            keeping.end_dropped(self, timeout=1)  # ... unless it is what is in the way
            return keeping.lease(self, low, high)
        finally:
            self._leave_if_closed()

    def end_dropped(self) -> None:
        """End the leases of views that were dropped, as far as that needs no waiting. For who
        comes here now and then: `lease` and `close` do it as well. Any thread."""
        if self.leases.dropped:
            keeping.end_dropped(self, timeout=0)
            self._leave_if_closed()

    # --- taking blocks out -----------------------------------------------------------------------

    def delete(self, keys: KeyArray) -> int:
        return removing.delete(self, keys)

    def clear(self) -> int:
        return removing.clear(self)

    def reclaim(self) -> int:
        """Give back the slots that dead processes were filling, and those taken out that only they
        had leased; returns how many were dead."""
        return self._owners.reclaim(partial(removing.take_back, self))

    def recover(self) -> int:
        """Tidy up after dead processes: give back their slots, put in order the shards in which
        they died; returns how many died. Raises LockTimeoutError, OSError, StoreFormatError."""
        dead = self.reclaim()
        self.settle()
        return dead

    def settle(self, least: int = CHANGING) -> None:
        """Put shards in order whose holder died changing them (with `least` RELINKING: only those
        in which look-ups miss blocks, for good where nobody writes); the next change would too."""
        for shard in np.flatnonzero(self._index.control["dirty"].copy() >= least).tolist():
            try:
                with self.change(shard, timeout=1):  # a living holder needs some milliseconds
                    pass
            except LockTimeoutError as error:
                self.limited.warning(
                    "shard %d of %s is not put in order: %s", shard, self.directory, str(error)
                )

    def free_slots(self, shard: int) -> int:
        """Slots of a shard that hold nothing, about now."""
        return self.geometry.slots - int(self._index.control["used_slots"][shard])

    def set_used(self, low: int, high: int, used: int) -> None:
        """Say when a stored block was last used, ns since 1970: one that was moved here keeps its
        place in the order of use."""
        entry = self.lookup.find_one(low, high, touch=False)
        if entry >= 0:
            self._index.entries["used"][entry] = used

    def count(self, lookups: int, hits: int) -> None:
        """Add to the store's statistics of look-ups."""
        self._index.count(lookups, hits)

    # --- the rest --------------------------------------------------------------------------------

    def owners(self) -> list[OwnerInfo]:
        """Other processes that have the store open."""
        return self._owners.alive()

    def stats(self) -> dict[str, int]:
        control = self._index.control
        names = (
            "blocks",
            "used_slots",
            "evictions",
            "inserts",
            "removals",
            "damaged",
            "pinned_slots",
        )
        numbers = {name: int(control[name].sum()) for name in names}
        numbers["pinned_blocks"] = int(control["pinned"].sum())
        numbers["slots"] = self.geometry.slots * self.geometry.shards
        numbers["page_bytes"] = self.geometry.page_bytes
        numbers["shards"] = self.geometry.shards
        return numbers

    def ages(self) -> list[AgeBucket]:
        """The stored blocks by the time since their last use. Takes no lock. Any thread."""
        return by_age(self._index.entries, time.time_ns())

    def close(self) -> None:
        """Leave the store; the last one to leave syncs the index. Calling it again does nothing.

        While blocks are leased the process stays a member, until the last lease has ended.
        """
        if self._closed:
            return
        self._closed = True
        self._reader.finish()
        try:
            self._writer.close()
        except (LockTimeoutError, OSError, StoreFormatError) as error:
            self._in_order = False
            # Our record stays, without its lock: whoever opens the store next gives them back.
            log.warning(
                "store %s is left with slots of failed writes: %s", self.directory, str(error)
            )
        keeping.end_dropped(self, timeout=1)  # a living holder needs some milliseconds
        self._leave_unless_leased()

    def end_lease(self, leased: keeping.Leased) -> None:
        """End a lease of `lease`; the last one of a closed engine ends its membership too."""
        keeping.end_lease(self, leased.shard, leased.slot)
        self._leave_if_closed()

    def drop_lease(self, leased: keeping.Leased) -> None:
        """As `end_lease`, from a finalizer: it only notes what is to be done, for its thread may
        hold any lock. Who comes next does it; a closed engine, where nobody may, has a thread."""
        self.leases.dropped.append((leased.shard, leased.slot))
        if self._closed and self._ending.acquire(blocking=False):
            try:
                # Not `threading.Thread`, whose `start` waits for the thread.
                _thread.start_new_thread(self._end_dropped_of_closed, ())
            except RuntimeError:  # none to be had: the process ends, or another view's end does it
                self._ending.release()

    def _end_dropped_of_closed(self) -> None:
        again = True
        while again:
            try:
                ended = keeping.end_dropped(self, LOCK_TIMEOUT_SECONDS)
            finally:
                self._ending.release()
            # A finalizer that saw this thread at work left it its note.
            again = ended and bool(self.leases.dropped) and self._ending.acquire(blocking=False)
        self._leave_unless_leased()

    def _leave_if_closed(self) -> None:
        if self._closed:
            self._leave_unless_leased()

    def _leave_unless_leased(self) -> None:
        """Leave the store. Who still looks at blocks in it stays a member, so that they stay what
        they are; leases that could not be ended end with the membership, as at a death."""
        if not self.leases.close():
            return
        quiet = self._open.shut(LOCK_TIMEOUT_SECONDS)
        if quiet and self._in_order and not self.leases.open:
            self._owner.leave()
        try:
            if not quiet:
                raise LockTimeoutError("a change has not ended", path=str(self.directory))
            with PathLock(lock_path(self.directory, "open")).hold(timeout=10):
                if not self._owners.others():
                    self._index.mark_clean()
        except (LockTimeoutError, OSError) as error:
            log.warning("store %s is left without a sync: %s", self.directory, str(error))
        self._owners.close()
        self._device.close()
        self._copier.forget()
        if self._dropper is not None:
            self._drop(self._dropper.finish)
        self.limited.flush()
        self._open.close()

    def change(
        self, shard: int, timeout: float = LOCK_TIMEOUT_SECONDS
    ) -> AbstractContextManager[tuple[ShardIndex, ShardFile]]:
        """Change a shard, under its lock; see `OpenShards.change`. For the engine and for tools."""
        return self._open.change(shard, timeout)

    def file(self, shard: int) -> ShardFile:
        """A shard's files; see `OpenShards.file`. Any thread."""
        return self._open.file(shard)
