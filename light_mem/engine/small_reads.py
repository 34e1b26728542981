"""Small reads in the thread that asks for them.

To queue a block, to wake a worker and to be told by it takes some 400 us whatever the block; one of
64 KiB that lies in the page cache is read in a tenth of that. So a short read is tried at once, and
the workers get whatever that leaves: blocks that are not in the page cache, not found, changed
meanwhile or damaged. It never waits for a device: `preadv2(2)` with RWF_NOWAIT does not wait for
its answer, but begins to read what is not in the page cache, and then waits while the device's
queue is full (Linux 6.18, a saturated disk: 9% of such calls, up to 38 ms). So it is asked only for
what mincore(2) has seen there. The GIL is free while the kernel copies, and a file that somebody
has cut short is a short read here, where a mapping would be SIGBUS. Blocks of small rows are read
into one buffer, summed up by one call and copied to their rows by another: 64 rows of 3,840 bytes
take three quarters of the time that they take with a buffer and a sum for each.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from light_mem.engine.base import BlockIO
from light_mem.engine.copy import new_checksum
from light_mem.engine.in_server import InServer
from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.pieces import has_small_rows
from light_mem.engine.places import Bytes1D
from light_mem.engine.scatter import Scatterer
from light_mem.engine.table_layout import READ
from light_mem.engine.task_table import TaskTable
from light_mem.errors import StoreFormatError
from light_mem.index.lookup import Location
from light_mem.index.runs import Run, cut_at_runs

if TYPE_CHECKING:
    from typing_extensions import Buffer

SUPPORTED = hasattr(os, "preadv") and hasattr(os, "RWF_NOWAIT")  # Linux 4.14


class SmallReads(InServer):
    """Reads blocks in the server's process."""

    def __init__(self, engine: LocalStorageEngine, table: TaskTable) -> None:
        super().__init__(engine, table, READ)
        self._lookup = engine.lookup
        self._verify = engine.verify
        self._scatterer = Scatterer()
        self._closed = not SUPPORTED

    def read(self, blocks: Sequence[BlockIO]) -> bool:
        """Read all blocks into their places; False: not done, leave them to the workers.

        Counts as use. The places may hold anything after False, as after a read that was aborted.
        """
        with self._turn() as mine:
            if not mine:
                return False
            started = time.perf_counter_ns()
            moved = 0
            try:
                # All are looked for before the first is copied: often the last is not stored.
                located: list[Location] = []
                for block in blocks:
                    where = self._locate(block)
                    if where is None:
                        return False
                    located.append(where)
                for block, where in zip(blocks, located, strict=True):
                    if not self._load(block, where):
                        return False
                    moved += block.nbytes
            except BlockingIOError:
                return False  # not in the page cache
            except OSError as error:
                if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS):
                    self._closed = True  # a file system or kernel without RWF_NOWAIT: never again
                return False
            except StoreFormatError:
                return False  # the worker says what is wrong with the file
            if self._was_closed():  # a descriptor may have been another's
                return False
            self._count(len(blocks), moved, started)
            return True

    def _locate(self, block: BlockIO) -> Location | None:
        """Where a block lies; None: it is not stored with that length, or not in the page cache."""
        low, high, place = block
        entry = self._lookup.find_one(low, high)
        where = self._lookup.locate(entry, low, high) if entry >= 0 else None
        if where is None or where.nbytes != place.nbytes:
            return None
        file, page_bytes = self._engine.file(where.shard), self._engine.geometry.page_bytes
        parts = cut_at_runs(where.runs, where.nbytes, page_bytes)
        return where if all(file.is_cached(run, end - start) for run, start, end in parts) else None

    def _load(self, block: BlockIO, where: Location) -> bool:
        low, high, place = block
        lookup, nbytes = self._lookup, place.nbytes
        if len(where.runs) == 1 and has_small_rows(place) and len(place.numbers) > 1:

            def fill(piece: Bytes1D) -> bool:
                # The tag after the bytes: then a wrong sum is damage, and nothing else.
                run = where.runs[0]
                return self._read_run(where, run, [piece], nbytes) and lookup.is_unchanged(where)

            wanted = where.checksum if self._verify else None
            return self._scatterer.scatter_checked(low, high, place, fill, wanted)
        parts = place.slices()
        if len(where.runs) == 1:
            if not self._read_run(where, where.runs[0], parts, nbytes):
                return False
        else:
            for run, start, end in cut_at_runs(
                where.runs, nbytes, self._engine.geometry.page_bytes
            ):
                if not self._read_run(where, run, place.part(start, end).slices(), end - start):
                    return False
        # First the tag, then the sum: after an eviction the sum says nothing about damage.
        if not lookup.is_unchanged(where):
            return False
        if self._verify:
            checksum = new_checksum(low, high)
            for part in parts:
                checksum.update(part.data)
            return bool(checksum.intdigest() == where.checksum)
        return True

    def _read_run(self, where: Location, run: Run, parts: list[Bytes1D], nbytes: int) -> bool:
        descriptor, at, _ = self._engine.file(where.shard).span(run, nbytes)
        buffers = cast("list[Buffer]", parts)
        return os.preadv(descriptor, buffers, at, os.RWF_NOWAIT) == nbytes

    def close(self) -> None:
        super().close()
        if not self._busy:  # a finalizer may call this in the middle of a block of this thread
            self._scatterer.forget()
