"""Small reads in the thread that asks for them.

To queue a block, to wake a worker and to be told by it takes some 400 us whatever the block; one of
64 KiB that lies in the page cache is read in a tenth of that. So a short read is tried at once, and
the workers get whatever that leaves: blocks that are not in the page cache, not found, changed
meanwhile or damaged. It never waits for a device: `preadv2(2)` with RWF_NOWAIT does not wait for
its answer, but begins to read what is not in the page cache, and then waits while the device's
queue is full (Linux 6.18, a saturated disk: 9% of such calls, up to 38 ms). So it is asked only for
what mincore(2) has seen there. The GIL is free while the kernel copies, and a file that somebody
has cut short is a short read here, where a mapping would be SIGBUS.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from light_mem.engine.base import BlockIO
from light_mem.engine.copy import new_checksum
from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.places import Bytes1D
from light_mem.engine.table_layout import READ, WORKER
from light_mem.engine.task_table import TaskTable, latency_at
from light_mem.errors import StoreFormatError
from light_mem.index.lookup import Location

if TYPE_CHECKING:
    from typing_extensions import Buffer

SUPPORTED = hasattr(os, "preadv") and hasattr(os, "RWF_NOWAIT")  # Linux 4.14
_WORDS = {name: offset // 8 for name, (_, offset, *_) in WORKER.fields.items()}  # type: ignore[union-attr]


class SmallReads:
    """Reads blocks in the server's process. Any thread; one at a time, the others are refused."""

    def __init__(self, engine: LocalStorageEngine, table: TaskTable) -> None:
        self._engine = engine
        self._lookup = engine.lookup
        self._verify = engine.verify
        # Numbers of worker 0, who stands for the server.
        self._numbers = table.worker_words(0)
        self._latencies = table.latencies
        # Reentrant: a signal's handler or a finalizer may close in the middle of a read.
        self._guard = threading.RLock()
        self._closed = not SUPPORTED

    def read(self, blocks: Sequence[BlockIO]) -> bool:
        """Read all blocks into their places; False: not done, leave them to the workers.

        Counts as use. The places may hold anything after False, as after a read that was aborted.
        """
        if not self._guard.acquire(blocking=False):
            return False
        try:
            if self._closed:
                return False
            started = time.perf_counter_ns()
            moved = 0
            for block in blocks:
                if not self._load(block):
                    return False
                moved += block.nbytes
            if self._was_closed():  # by this very thread: a descriptor may have been another's
                return False
            numbers = self._numbers
            numbers[_WORDS["blocks_read"]] += len(blocks)
            numbers[_WORDS["bytes_read"]] += moved
            spent = time.perf_counter_ns() - started
            numbers[_WORDS["read_ns"]] += spent
            self._latencies.add(latency_at(0, READ), spent)
            return True
        except BlockingIOError:
            return False  # not in the page cache
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS):
                self._closed = True  # a file system or kernel without RWF_NOWAIT: never again
            return False
        except StoreFormatError:
            return False  # the worker says what is wrong with the file
        finally:
            self._guard.release()

    def _was_closed(self) -> bool:
        return self._closed

    def _load(self, block: BlockIO) -> bool:
        low, high, place = block
        lookup = self._lookup
        entry = lookup.find_one(low, high)
        where = lookup.locate(entry, low, high) if entry >= 0 else None
        nbytes = place.nbytes
        if where is None or where.nbytes != nbytes:
            return False
        parts = place.slices()
        if len(where.runs) == 1:
            if not self._read_run(where, where.runs[0], parts, nbytes):
                return False
        else:
            done = 0
            for run in where.runs:
                end = min(nbytes, done + run[1] * self._engine.geometry.page_bytes)
                if not self._read_run(where, run, place.part(done, end).slices(), end - done):
                    return False
                done = end
        # First the tag, then the sum: after an eviction the sum says nothing about damage.
        if not lookup.is_unchanged(where):
            return False
        if self._verify:
            checksum = new_checksum(low, high)
            for part in parts:
                checksum.update(part.data)
            return bool(checksum.intdigest() == where.checksum)
        return True

    def _read_run(
        self, where: Location, run: tuple[int, int], parts: list[Bytes1D], nbytes: int
    ) -> bool:
        file = self._engine.file(where.shard)
        if not file.is_cached(run, nbytes):
            return False
        descriptor, at, _ = file.span(run, nbytes)
        buffers = cast("list[Buffer]", parts)
        return os.preadv(descriptor, buffers, at, os.RWF_NOWAIT) == nbytes

    def close(self) -> None:
        """No block is read here any more, nor being read, when this returns; one that this very
        thread is reading is not believed."""
        with self._guard:
            self._closed = True
