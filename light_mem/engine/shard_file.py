"""One shard's files, mapped: `shard-NNN.data` holds the pages, `shard-NNN.slots` says whose.

The slots file makes the index expendable: a record a slot, written before the block is found in
the index and cleared when the block is taken out. Both files are preallocated, so that a store to
the mapping cannot fail for want of room (it would be SIGBUS, which Python cannot catch).
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from light_mem.engine import page_cache
from light_mem.engine.base import BlockIO, Stop, never
from light_mem.engine.copy import Copier, Stopped, new_checksum
from light_mem.engine.direct_writes import Group
from light_mem.engine.dropping import Dropper
from light_mem.engine.mapped_writes import MappedWrites
from light_mem.engine.pieces import is_one_piece
from light_mem.engine.places import Bytes1D, Place
from light_mem.engine.read_ahead import Span, open_direct
from light_mem.engine.shard_header import data_path, slots_path
from light_mem.errors import ServiceClosedError, StoreFormatError
from light_mem.index import format as fmt
from light_mem.index.description import Geometry
from light_mem.index.recovery import crc_of, record_crcs, states_of

_KEEP_WORD = fmt.RECORD.fields["keep"][1] // 8  # type: ignore[index]  # of a record: keep and crc
# A `format.RECORD` up to its crc, and the crc. To pack a record costs a part of what a table of one
# does.
_RECORD, _CRC = struct.Struct("<6Q3I"), struct.Struct("<I")
assert _RECORD.size == fmt.RECORD_CRC_BYTES
assert _RECORD.size + _CRC.size == fmt.RECORD.itemsize


class Written(NamedTuple):
    """A block whose bytes lie in its slots."""

    low: int
    high: int
    checksum: int
    nbytes: int
    runs: list[tuple[int, int]]
    used: int  # ns since 1970
    keep: int = 0  # time to live and pin, see `index/format.py`


class ShardFile:
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
        self._data, self._data_fd = _map(
            data_path(directory, shard), fmt.data_file_bytes(geometry.slots, geometry.page_bytes)
        )
        try:
            self._slots, descriptor = _map(
                slots_path(directory, shard), fmt.slots_file_bytes(geometry.slots)
            )
        except BaseException:
            os.close(self._data_fd)
            raise
        os.close(descriptor)  # a mapping keeps one of its own: three a shard are enough
        self._path = data_path(directory, shard)
        self._direct_fd: int | None = None  # None: not asked for yet, -1: there is none
        self._bytes = np.frombuffer(
            self._data, np.uint8, geometry.slots * geometry.page_bytes, fmt.SHARD_HEADER_BYTES
        )
        self._address = self._bytes.ctypes.data
        self._writes = MappedWrites(
            self._data, self._data_fd, fmt.SHARD_HEADER_BYTES, geometry.slots, self.page_bytes
        )
        self.records: npt.NDArray[np.void] = np.frombuffer(
            self._slots, fmt.RECORD, geometry.slots, fmt.SHARD_HEADER_BYTES
        )
        self._tags = self.records["tag"].data
        self._words = self.records.view("<u8").reshape(geometry.slots, -1)[:, _KEEP_WORD]
        self._geometry = geometry
        self._read_only: Bytes1D | None = None

    def gather(
        self,
        copier: Copier,
        runs: Sequence[tuple[int, int]],
        block: BlockIO,
        stop: Stop = never,
        position: int = 0,
        by_calls: bool = False,
    ) -> int:
        """Copy a block into its runs of slots and return its checksum; raises Stopped, OSError. Its
        bytes are there after `land` of what `cut` then returns.

        `stop` is asked about `position`. `by_calls`: not through the mapping in any case.
        """
        low, high, place = block
        if len(runs) == 1 and self._dropper is None and is_one_piece(place):
            if stop(position):
                raise Stopped
            start, length = runs[0]
            now = time.monotonic()
            sink = self._writes.sink(start, length, now, by_calls)
            digest = copier.gather_whole(low, high, place, sink)
            self._writes.was_put(start, length, now, sink)
            return digest
        checksum, stopped = new_checksum(low, high), partial(stop, position)
        done = 0
        for run in runs:
            end = done + run[1] * self.page_bytes
            part = place if len(runs) == 1 else place.part(done, end)
            self._gather_run(copier, run, part, checksum, stopped, by_calls)
            done = end
        return checksum.intdigest()

    def _gather_run(
        self,
        copier: Copier,
        run: tuple[int, int],
        place: Place,
        checksum: xxhash.xxh3_64,
        stopped: Callable[[], bool],
        by_calls: bool,
    ) -> None:
        """Copy what lies at `place` into a run of slots, whole or up to Stopped; raises OSError."""
        if self._dropper is not None:
            with self._dropper.sink(self.span(run, place.nbytes), self._direct()) as sink:
                copier.gather(place, sink, checksum, stopped)
            return
        start, length = run
        now = time.monotonic()
        sink = self._writes.sink(start, length, now, by_calls)
        copier.gather(place, sink, checksum, stopped)
        self._writes.was_put(start, length, now, sink)

    def cut(self) -> Group | None:
        """What `gather` has copied since the last cut and does not lie in its slots yet."""
        return None if self._dropper is None else self._dropper.cut()

    def land(self, group: Group | None) -> None:
        """Return when a group lies in its slots; raises OSError, of the first that does not.
        Whatever comes, none of it is under way then."""
        if self._dropper is not None and group is not None:
            self._dropper.land(group)

    def expect(self, runs: Iterable[tuple[int, int]]) -> None:
        """These slots are written soon: what their ends share with others is read meanwhile."""
        if self._dropper is not None and self.page_bytes % mmap.PAGESIZE:
            for run in runs:
                page_cache.read_edges(*self.span(run, run[1] * self.page_bytes))

    def address(self, slot: int) -> int:
        """Where in this process a slot is mapped."""
        return self._address + slot * self.page_bytes

    def span(self, run: tuple[int, int], nbytes: int) -> Span:
        """Where in the data file the first `nbytes` of a run of slots lie."""
        return Span(self._data_fd, fmt.SHARD_HEADER_BYTES + run[0] * self.page_bytes, nbytes)

    def past_cache(self, run: tuple[int, int], nbytes: int) -> Span:
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

    def is_cached(self, run: tuple[int, int], nbytes: int) -> bool:
        """Whether the first `nbytes` of a run of slots lie in the page cache now."""
        return page_cache.holds(self.address(run[0]), nbytes)

    def read_only(self, start: int, length: int) -> Bytes1D:
        """`bytes` through a mapping that cannot be written through: a store is SIGSEGV.

        Raises ServiceClosedError after `close`.
        """
        if self._data_fd < 0:  # no file: the mapping would be zeros that are nobody's
            raise ServiceClosedError(f"shard {self.shard} is closed")
        if self._read_only is None:
            size = fmt.data_file_bytes(self._geometry.slots, self.page_bytes)
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

    def write_records(self, blocks: Sequence[Written]) -> None:
        """Describe blocks whose bytes are in place; the record of a block's first slot comes
        after those of its further runs."""
        for block in blocks:
            for at in range(1, len(block.runs)):
                self._put_records([block._replace(runs=block.runs[at:], keep=0)], fmt.EXTENT)
        self._put_records(blocks, fmt.LIVE)

    def _put_records(self, blocks: Sequence[Written], state: int) -> None:
        slots, size, first = self._slots, fmt.RECORD.itemsize, fmt.SHARD_HEADER_BYTES
        for low, high, checksum, nbytes, runs, used, keep in blocks:
            slot, run = runs[0]
            next_run = runs[1][0] + 1 if len(runs) > 1 else 0
            record = _RECORD.pack(low, high, state, checksum, nbytes, used, run, next_run, keep)
            at = first + slot * size
            slots[at : at + size] = record + _CRC.pack(crc_of(record))

    def set_keep(self, slot: int, keep: int) -> None:
        """The stored block at `slot` is kept otherwise: one store, so that no kill tears it."""
        record = self.records[slot : slot + 1].copy()
        if record_crcs(record) != [int(record["crc"][0])]:
            return  # damaged: a fitting crc would make it believed
        record["keep"] = keep
        record["crc"] = record_crcs(record)
        self._words[slot] = record.view("<u8")[_KEEP_WORD]

    def follow_keeps(self, entries: npt.NDArray[np.void]) -> None:
        """Make the records say what the entries, ENTRY [slots], do: a holder of the shard's lock
        may have died between the two."""
        records = self.records
        differ = (records["keep"] != entries["keep"]) & (states_of(records) == fmt.LIVE)
        differ &= states_of(entries) == fmt.LIVE
        for slot in np.flatnonzero(differ).tolist():
            self.set_keep(slot, int(entries["keep"][slot]))

    def clear_records(self, starts: Sequence[int] | npt.NDArray[np.intp]) -> None:
        """The blocks that began at these slots are gone."""
        tags = self._tags
        if isinstance(starts, np.ndarray):
            starts = starts[np.asarray(tags)[starts] != fmt.FREE].tolist()
        for start in starts:
            if tags[start] != fmt.FREE:  # leaves clean pages clean
                tags[start] = fmt.FREE

    def sync(self) -> None:
        """Put pages and records on the device; raises OSError."""
        # fdatasync also writes what was changed through a mapping (fsync(2), msync(2)).
        _sync(self._data_fd)
        _sync_map(self._slots)

    def close(self) -> None:
        """Close the descriptors; the mappings go with the last array over them."""
        self._writes.close()
        for descriptor in (self._data_fd, self._direct_fd):
            if descriptor is not None and descriptor >= 0:
                os.close(descriptor)
        self._data_fd = self._direct_fd = -1


_sync = getattr(os, "fdatasync", os.fsync)  # macOS has none


def _sync_map(mapping: mmap.mmap) -> None:
    mapping.flush()


def _map(path: Path, size: int) -> tuple[mmap.mmap, int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor).st_size
        if found < size:
            # Mapped all the same, the missing part would be SIGBUS at the first touch.
            raise StoreFormatError(
                f"{path} has {found} bytes, its description says {size}",
                path=str(path),
                field="size",
                found=found,
                expected=size,
            )
        return mmap.mmap(descriptor, size), descriptor
    except BaseException:
        os.close(descriptor)
        raise
