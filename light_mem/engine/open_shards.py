"""The shards of one store as one process has them open, changed under their lock."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from light_mem.engine.dropping import Dropper
from light_mem.engine.fence import Fence
from light_mem.engine.shard_file import ShardFile
from light_mem.engine.store_identity import StoreIdentity
from light_mem.errors import ServiceClosedError, StoreFormatError
from light_mem.index.description import Geometry
from light_mem.index.file import IndexFile
from light_mem.index.leases import Leases
from light_mem.index.locks import LOCK_TIMEOUT_SECONDS
from light_mem.index.lookup import Lookup

if TYPE_CHECKING:
    from light_mem.index.shard import ShardIndex


class OpenShards:
    """Opens a shard when it is first needed. Any thread."""

    def __init__(
        self,
        directory: Path,
        geometry: Geometry,
        identity: StoreIdentity,
        index: IndexFile,
        lookup: Lookup,
        leases: Leases,
        dropper: Dropper | None,
    ) -> None:
        """`identity`: of the store as this process opened it; `leases` and `dropper` are those of
        this process."""
        self.leases = leases  # for shards that are opened from now on
        self._directory = directory
        self._geometry = geometry
        self._identity = identity
        self._index = index
        self._lookup = lookup
        self._dropper = dropper
        self._indexes: dict[int, ShardIndex] = {}
        self._files: dict[int, ShardFile] = {}
        self._guard = threading.RLock()  # a finalizer may leave while this thread has it
        self._fence = Fence()
        self._prepared = 0  # shards before this one
        self._closing = False

    def prepare_next(self) -> bool:
        """Open the next shard ahead of use; False when all are open. Failures are reported at first
        use. Single-threaded."""
        shard = self._prepared
        if shard >= self._geometry.shards:
            return False
        self._prepared += 1
        try:
            self.index(shard).prepare()
            self.file(shard)
        except (OSError, StoreFormatError, ServiceClosedError):
            self._prepared = self._geometry.shards  # the next ones would fail as well
        return True

    def is_open(self, shard: int) -> bool:
        """Whether a shard can be read and changed at once."""
        return shard in self._files and shard in self._indexes

    def is_near(self, shard: int) -> bool:
        """`ShardIndex.is_near` of a shard that is open."""
        return self._indexes[shard].is_near

    @property
    def files(self) -> Mapping[int, ShardFile]:
        """The files that are open by now, by shard."""
        return self._files

    def change(
        self, shard: int, timeout: float = LOCK_TIMEOUT_SECONDS, most_runs: float = math.inf
    ) -> AbstractContextManager[tuple[ShardIndex, ShardFile]]:
        """Change a shard, under its lock; raises LockTimeoutError, StoreFormatError and
        StoreFullError (see `file`), OSError, and ServiceClosedError once the store was left. What
        is taken out of the index must be cleared from the records before this ends. `most_runs`:
        see `ShardIndex.change`."""
        return _Change(self, shard, timeout, most_runs)

    def index(self, shard: int) -> ShardIndex:
        """The index of a shard, to be used under its lock."""
        index = self._indexes.get(shard)
        if index is None:
            from light_mem.index.shard import open_shard  # 15 ms: not before the first change

            leased = partial(self.leases.of_shard, shard)
            index = self._indexes[shard] = open_shard(
                self._directory, self._index, shard, self._lookup, leased
            )
        return index

    def file(self, shard: int) -> ShardFile:
        """A shard's files, mapped. Raises OSError, StoreFormatError (symlinks, or files of another
        store, which was made at this path), StoreFullError (they were cut short, and there is no
        room to lengthen them), and ServiceClosedError once the store was left."""
        file = self._files.get(shard)
        if file is None:
            with self._guard:
                file = self._files.get(shard)
                if file is None:
                    self._fence.check()  # nobody would close them
                    file = self._files[shard] = self._open_file(shard)
        return file

    def _open_file(self, shard: int) -> ShardFile:
        file = ShardFile(self._directory, self._geometry, shard, self._dropper)
        try:
            # Afterwards: else it could have been moved away between the two.
            self._identity.require_at(self._directory, self._geometry.store_id)
        except BaseException:
            file.close()
            raise
        return file

    def shut(self, timeout: float) -> bool:
        """Let no change begin any more; whether those that had begun have ended; see `Fence`."""
        return self._fence.shut(timeout)

    def close(self) -> None:
        """Close the files, after `shut`. While a change is still being made, perhaps further up in
        this very thread, they stay open, and its end closes them: it may yet write to a descriptor,
        whose number must not be another file's by then."""
        self._closing = True
        self._close_once_quiet()

    def _close_once_quiet(self) -> None:
        if self._fence.is_held:
            return
        with self._guard:
            for file in self._files.values():
                file.close()
            self._files.clear()

    def _ended(self) -> None:
        """A change has ended."""
        if self._closing:
            self._close_once_quiet()


class _Change(AbstractContextManager["tuple[ShardIndex, ShardFile]"]):
    """See `OpenShards.change`. No generator: one costs 1 us, several after a copy."""

    __slots__ = ("_change", "_most_runs", "_open", "_shard", "_timeout")

    def __init__(self, shards: OpenShards, shard: int, timeout: float, most_runs: float) -> None:
        self._open, self._shard = shards, shard
        self._timeout, self._most_runs = timeout, most_runs

    def __enter__(self) -> tuple[ShardIndex, ShardFile]:
        shards = self._open
        index, file = shards.index(self._shard), shards.file(self._shard)
        change = self._change = index.change(self._timeout, shards._fence, self._most_runs)
        try:
            if change.__enter__():
                # The holder that died may have taken blocks out and not cleared their records: an
                # index made anew from them must not list what others have written over.
                file.clear_records(index.unlisted_slots())
                file.follow_keeps(index.entries)
            return index, file
        except BaseException:
            change.give_up()
            shards._ended()
            raise

    def __exit__(self, *error: Any) -> None:
        try:
            self._change.__exit__(*error)
        except BaseException:
            self._change.give_up()
            raise
        finally:
            self._open._ended()
