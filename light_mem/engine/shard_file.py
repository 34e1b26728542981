"""One shard's files, mapped: `shard-NNN.data` holds the pages, `shard-NNN.slots` says whose.

Both files are preallocated, so that a store to the mapping cannot fail for want of room (it would
be SIGBUS, which Python cannot catch).
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from light_mem.engine import page_cache, slot_calls
from light_mem.engine.base import BlockIO
from light_mem.engine.copy import Stopping, new_checksum
from light_mem.engine.direct_writes import Cut
from light_mem.engine.dropping import Dropper
from light_mem.engine.gather import Gather, Gatherer, Gathering
from light_mem.engine.mapped_writes import MappedWrites
from light_mem.engine.places import Bytes1D, Place
from light_mem.engine.read_ahead import Span, open_direct
from light_mem.engine.shard_header import data_path, header_bytes, make_whole, map_whole
from light_mem.engine.sinks import FileSink, OpenFile, Sink
from light_mem.engine.slot_records import SlotRecords
from light_mem.errors import ServiceClosedError
from light_mem.index import format as fmt
from light_mem.index.description import Geometry
from light_mem.index.runs import Run, cut_at_runs

# Makes planned copies and returns the blocks' checksums; raises Stopped, OSError.
Copies = Callable[[Stopping], list[int]]


class ShardFile(SlotRecords):
    """A shard's pages and records in this process. Any process may hold one; slots are written
    only by the process whose intents name them, records only by it or under the shard's lock."""

    def __init__(
        self,
        directory: Path,
        geometry: Geometry,
        shard: int,
        dropper: Dropper | None = None,
    ) -> None:
        """With a `dropper`, what is written goes by system calls and is dropped."""
        self.page_bytes = geometry.page_bytes
        self.shard = shard
        self._dropper = dropper
        self._data, self._data_fd = map_whole(
            data_path(directory, shard),
            fmt.data_file_bytes(geometry.slots, geometry.page_bytes),
            header_bytes(fmt.DATA_MAGIC, geometry, shard),
        )
        try:
            super().__init__(directory, geometry, shard)
        except BaseException:
            os.close(self._data_fd)
            raise
        self._path = data_path(directory, shard)
        self._direct_fd: int | None = None  # None: not asked for yet, -1: there is none
        self._bytes = np.frombuffer(
            self._data, np.uint8, geometry.slots * geometry.page_bytes, fmt.SHARD_HEADER_BYTES
        )
        self._address = self._bytes.ctypes.data
        self._writes = MappedWrites(
            self._data, self._data_fd, fmt.SHARD_HEADER_BYTES, geometry.slots, self.page_bytes
        )
        self._geometry = geometry
        self._read_only: Bytes1D | None = None

    def plan(
        self,
        gatherer: Gatherer,
        blocks: Sequence[tuple[Sequence[Run], BlockIO]],
        by_calls: bool = False,
    ) -> Copies:
        """Plan to copy blocks into their runs of slots. The copies must be made before the next
        plan of this file. Once they were made, `land(cut())` waits until the bytes are there.

        `by_calls`: not through the mapping in any case.
        """
        if self._dropper is not None:
            return partial(self._gather_past, self._dropper, gatherer, blocks)
        writes = self._writes
        writes.begin(time.monotonic())
        put: list[tuple[Run, Sink]] = []
        wanted: list[Gather] = []
        for runs, (low, high, place) in blocks:
            parts = []
            for run, part in self._parts(runs, place):
                sink = writes.sink(run[0], run[1], by_calls)
                put.append((run, sink))
                parts.append((part, sink))
            wanted.append((low, high, parts))
        return partial(self._copy, gatherer.plan(wanted), put)

    def _copy(
        self, gathering: Gathering, put: list[tuple[Run, Sink]], stopped: Stopping
    ) -> list[int]:
        writes = self._writes
        writes.start()
        checksums = gathering.run(writes.leaving_out(stopped))
        for (start, length), sink in put:
            writes.was_put(start, length, sink)
        return checksums

    def _gather_past(
        self,
        dropper: Dropper,
        gatherer: Gatherer,
        blocks: Sequence[tuple[Sequence[Run], BlockIO]],
        stopped: Stopping,
    ) -> list[int]:
        """Copy blocks past the page cache."""
        checksums = []
        for runs, block in blocks:
            checksum = new_checksum(block.low, block.high)
            for run, part in self._parts(runs, block.place):
                with dropper.sink(self.span(run, part.nbytes), self._direct()) as sink:
                    gatherer.gather_part(part, sink, checksum, stopped)
            checksums.append(checksum.intdigest())
        return checksums

    def _parts(self, runs: Sequence[Run], place: Place) -> list[tuple[Run, Place]]:
        """What of a block goes to each of its runs."""
        if len(runs) == 1:
            return [(runs[0], place)]
        parts = cut_at_runs(runs, place.nbytes, self.page_bytes)
        return [(run, place.part(start, end)) for run, start, end in parts]

    def cut(self) -> Cut | None:
        """What was copied since the last cut and does not lie in its slots yet."""
        return None if self._dropper is None else self._dropper.cut()

    def land(self, cut: Cut | None) -> None:
        """Return when a cut lies in its slots; raises OSError, of the first that does not.
        Whatever comes, none of it is under way then."""
        if self._dropper is not None and cut is not None:
            self._dropper.land(cut)

    def expect(self, runs: Iterable[Run]) -> None:
        """These slots are written soon: what their ends share with others is read meanwhile."""
        if self._dropper is not None and self.page_bytes % mmap.PAGESIZE:
            for run in runs:
                page_cache.read_edges(*self.span(run, run[1] * self.page_bytes))

    def address(self, slot: int) -> int:
        """Where in this process a slot is mapped."""
        return self._address + slot * self.page_bytes

    def span(self, run: Run, nbytes: int) -> Span:
        """Where in the data file the first `nbytes` of a run of slots lie."""
        return Span(self._data_fd, fmt.SHARD_HEADER_BYTES + run[0] * self.page_bytes, nbytes)

    def past_cache(self, run: Run, nbytes: int) -> Span:
        """`span`, for reading past the page cache where the file system has that. The thread that
        reads and writes."""
        span = self.span(run, nbytes)
        direct = self._direct()
        return span if direct < 0 else span._replace(descriptor=direct)

    def _direct(self) -> int:
        """The data file's descriptor for O_DIRECT; -1: there is none."""
        if self._direct_fd is None:
            flags = os.O_RDONLY if self._dropper is None else os.O_RDWR
            self._direct_fd = open_direct(self._path, self._data_fd, flags)
            if self._direct_fd < 0 and self._dropper is not None:
                page_cache.read_no_further(self._data_fd)
        return self._direct_fd

    def is_cached(self, run: Run, nbytes: int) -> bool:
        """Whether the first `nbytes` of a run of slots lie in the page cache now."""
        return page_cache.holds(self.address(run[0]), nbytes)

    def pieces(self, run: Run, nbytes: int) -> Iterator[bytes]:
        """The first `nbytes` of a run of slots, by system calls; see `slot_calls.pieces`. Raises
        OSError, and ServiceClosedError after `close`. Any thread."""
        self._require_open()
        return slot_calls.pieces(*self.span(run, nbytes))

    def page(self, slot: int) -> bytes:
        """The page in a slot, by system calls; raises as `pieces`. Any thread."""
        return b"".join(self.pieces((slot, 1), self.page_bytes))

    def put_page(self, slot: int, page: bytes) -> None:
        """Store a page to a slot, by system calls. Raises OSError. Any thread."""
        FileSink(OpenFile(self._data_fd), self.span((slot, 1), 0).at).put(0, page)

    def read_only(self, start: int, length: int) -> Bytes1D:
        """`bytes` through a mapping that cannot be written through: a store is SIGSEGV. Whoever
        loads from it has read it by calls before, which bytes that are lost do not kill.

        Raises OSError, and ServiceClosedError after `close`.
        """
        self._require_open()
        if self._read_only is None:
            size = fmt.data_file_bytes(self._geometry.slots, self.page_bytes)
            make_whole(self._data_fd, self._path, size)
            mapped = mmap.mmap(self._data_fd, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
            self._read_only = np.frombuffer(mapped, np.uint8, offset=fmt.SHARD_HEADER_BYTES)
        return self._read_only[start * self.page_bytes : (start + length) * self.page_bytes]

    def bytes(self, start: int, length: int) -> Bytes1D:
        """The mapped bytes of a run of slots, uint8 [length * page_bytes]."""
        return self.first_bytes(start, length * self.page_bytes)

    def first_bytes(self, slot: int, nbytes: int) -> Bytes1D:
        """The mapped bytes from a slot on, uint8 [nbytes]."""
        at = slot * self.page_bytes
        return self._bytes[at : at + nbytes]

    def _require_open(self) -> None:
        if self._data_fd < 0:  # no file: a mapping would be zeros that are nobody's
            raise ServiceClosedError(f"shard {self.shard} is closed", shard=self.shard)

    def sync(self) -> None:
        """Put pages and records on the device; raises OSError."""
        # fdatasync also writes what was changed through a mapping (fsync(2), msync(2)).
        _sync(self._data_fd)
        super().sync()

    def close(self) -> None:
        """Close the descriptors; the mappings go with the last array over them."""
        self._writes.close()
        for descriptor in (self._data_fd, self._direct_fd):
            if descriptor is not None and descriptor >= 0:
                os.close(descriptor)
        self._data_fd = self._direct_fd = -1


_sync = getattr(os, "fdatasync", os.fsync)  # macOS has none
