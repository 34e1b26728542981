"""OpenStore: a store on a local disk as one process has it open, a member until it leaves.

Look-ups, changes of its shards, pins, numbers; `member.py` has leases, and how it is left. All
coordination is in the store's files, so any number of processes of any number of servers may have
one open.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from light_mem.engine import keeping, removing
from light_mem.engine.dropping import Dropper
from light_mem.engine.open_shards import OpenShards
from light_mem.engine.settings import EngineSettings
from light_mem.engine.shard_file import ShardFile
from light_mem.engine.store_identity import StoreIdentity
from light_mem.errors import LockTimeoutError, StoreBusyError, StoreFormatError
from light_mem.index import description, retention
from light_mem.index import file as index_file
from light_mem.index.ages import AgeBucket, by_age
from light_mem.index.description import Geometry
from light_mem.index.file import IndexFile, IndexUnusable
from light_mem.index.format import CHANGING, INDEX_VERSION
from light_mem.index.keys import KeyArray
from light_mem.index.leases import Leases
from light_mem.index.locks import LOCK_TIMEOUT_SECONDS, SHORT_SECONDS
from light_mem.index.lookup import Lookup
from light_mem.index.owners import Owner, OwnerInfo, Owners
from light_mem.index.replica import MOST_RUNS, ScanNeeded
from light_mem.logs import Limited

if TYPE_CHECKING:
    from light_mem.index.shard import ShardIndex

# For the lock of a shard that is to be tidied up: a living holder needs some milliseconds.
_SETTLE_SECONDS = 1.0


class OpenStore:
    """A store that `opening.prepare` has prepared, open in this process. Any thread.

    `Member` is one that can be left, `LocalStorageEngine` one that moves bytes as well.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        kind: str,
        settings: EngineSettings,
        dropper: Dropper | None,
        expected: StoreIdentity | None = None,
    ) -> None:
        """`dropper`: what writes past the page cache, with `page_cache="drop"`. `expected`: which
        store it has to be."""
        self.directory = Path(directory)
        geometry = description.load(self.directory)
        if geometry is None:
            raise description.no_store(self.directory, "a description")
        if expected is not None:
            expected.require_at(self.directory, geometry.store_id)
        self.geometry = geometry
        self.verify, self.time_to_live = settings.verify, settings.time_to_live
        self.keeps: dict[tuple[int, int], int] = {}  # of blocks to write: instead of `time_to_live`
        self.limited = Limited()  # for what a failing disk would say of every block
        self._owners = Owners(self.directory)
        self.identity = StoreIdentity(geometry.store_id, self._owners.locks.place)
        try:
            self._index = _index_of(self.directory, geometry)
            self.lookup = Lookup(self._index)
            # Set before joining, which may reclaim and so change shards. Owner 0 means nobody.
            self.leases = Leases(self._owners, 0)
            self._open = OpenShards(
                self.directory,
                geometry,
                self.identity,
                self._index,
                self.lookup,
                self.leases,
                dropper,
            )
            self._owner = self._join(kind)
            if description.load(self.directory) != geometry:  # from now on it stays as it is
                self._owner.leave()
                raise StoreFormatError(
                    f"{self.directory} was given another size while it was opened: try again",
                    path=str(self.directory),
                    field="storage_size",
                )
            self.leases = self._open.leases = Leases(self._owners, self._owner.number)
        except BaseException:
            self._owners.close()
            raise

    def _join(self, kind: str) -> Owner:
        try:
            return self._owners.join(kind)
        except StoreBusyError:
            if not self.reclaim():  # records of the dead may take all the room
                raise
            return self._owners.join(kind)

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
        return entry >= 0 and self.lookup.nbytes_of(entry) == nbytes

    # --- changes ---------------------------------------------------------------------------------

    def change(
        self, shard: int, timeout: float = LOCK_TIMEOUT_SECONDS
    ) -> AbstractContextManager[tuple[ShardIndex, ShardFile]]:
        """Change a shard, under its lock; see `OpenShards.change`. For the engine and for tools."""
        return self._open.change(shard, timeout)

    def change_at_hand(self, shard: int) -> AbstractContextManager[tuple[ShardIndex, ShardFile]]:
        """`change` that waits for nothing and scans nothing; see `ShardIndex.change`."""
        return self._open.change(shard, timeout=0, most_runs=0)

    def file(self, shard: int) -> ShardFile:
        """A shard's files; see `OpenShards.file`. Any thread."""
        return self._open.file(shard)

    def prepare(self) -> None:
        """Open all shards, for `write_now`. One thread."""
        while self._open.prepare_next():
            pass

    def is_at_hand(self, shard: int) -> bool:
        """Whether a shard is open, and nobody is changing it or has died doing so: then a change
        has nothing to wait for, and nothing to put in order."""
        return self._open.is_open(shard) and not self._index.control["dirty"][shard]

    def is_near(self, shard: int) -> bool:
        """`ShardIndex.is_near` of a shard that is open. Any thread."""
        return self._open.is_near(shard)

    def prepare_shard(self, shard: int) -> bool:
        """Scan an open shard for `write_now`: free space under its lock, order of use without it.
        Whether blocks to evict are at hand. One thread; raises as `change`, SHORT_SECONDS."""
        try:
            with self._open.change(shard, SHORT_SECONDS, MOST_RUNS) as (index, _):
                sort_out = index.sorting()
        except ScanNeeded:
            return False
        return sort_out()

    def drop_damaged(
        self,
        shard: int,
        slot: int,
        tag: int,
        low: int,
        high: int,
        problem: str = removing.WRONG_SUM,
        timeout: float = LOCK_TIMEOUT_SECONDS,
    ) -> None:
        """Take out a block that was found damaged, if its tag is still this one."""
        removing.drop_damaged(self, shard, slot, tag, low, high, problem, timeout)

    # --- keeping blocks --------------------------------------------------------------------------

    def keeps_for(self, keys: Sequence[tuple[int, int]]) -> list[int]:
        """The `keep` of each block that is written now."""
        usual = retention.keep_for(self.time_to_live)
        if not self.keeps:
            return [usual] * len(keys)
        return [self.keeps.get(key, usual) for key in keys]

    def pin(self, keys: KeyArray, expired: bool = False) -> int:
        """Pin blocks, so that they are not evicted; see `keeping.pin`. Any thread."""
        return keeping.pin(self, keys, expired)

    def unpin(self, keys: KeyArray) -> int:
        """Take pins away; returns how many of the keys were pinned. Any thread."""
        return keeping.unpin(self, keys)

    # --- taking blocks out -----------------------------------------------------------------------

    def delete(self, keys: KeyArray) -> int:
        return removing.delete(self, keys)

    def clear(self) -> int:
        return removing.clear(self)

    # --- after deaths -----------------------------------------------------------------------------

    def reclaim(self, timeout: float = _SETTLE_SECONDS, only: Collection[int] | None = None) -> int:
        """Give back the slots that dead processes were filling, and those taken out that only they
        had leased, `only` in these shards; returns how many dead have nothing left here.

        A shard whose lock is not free within `timeout` seconds, for a stopped process has it, is
        passed over and logged: whoever comes next does it.
        """
        return self._owners.reclaim(partial(removing.take_back, self, timeout=timeout, only=only))

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
                with self.change(shard, _SETTLE_SECONDS):
                    pass
            except LockTimeoutError as error:
                self.limited.warning(
                    "shard %d of %s is not put in order: %s", shard, self.directory, str(error)
                )

    # --- numbers ----------------------------------------------------------------------------------

    def free_slots(self, shard: int) -> int:
        """Slots of a shard that hold nothing, about now."""
        return self.geometry.slots - int(self._index.control["used_slots"][shard])

    def set_used(self, low: int, high: int, used: int) -> None:
        """Say when a stored block was last used, ns since 1970: one that was moved here keeps its
        place in the order of use."""
        entry = self.lookup.find_one(low, high, touch=False, expired=True)
        if entry >= 0:
            self._index.uses[entry] = self._index.entries["used"][entry] = used

    def mark_open(self) -> None:
        """Record that the index in memory may be newer than on the device; call it before that is
        so."""
        self._index.mark_open()

    def count(self, lookups: int, hits: int) -> None:
        """Add to the store's statistics of look-ups."""
        self._index.count(lookups, hits)

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
        return by_age(self._index.entries, self._index.uses, time.time_ns())


def _index_of(directory: Path, geometry: Geometry) -> IndexFile:
    """The index of a store that `opening.prepare` has put in order, unless that was another
    version of this library's: a server's worker or client after an upgrade."""
    try:
        return IndexFile(directory / index_file.NAME, geometry)
    except IndexUnusable as error:
        raise StoreFormatError(
            f"{error}; is the server of another version?",
            path=str(directory),
            field="index",
            found=str(error),
            expected=f"an index of version {INDEX_VERSION}",
        ) from None
