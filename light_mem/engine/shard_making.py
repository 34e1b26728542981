"""The shards' files on the file system: made, lengthened, cut. A part of opening a store.

All room is allocated here, so that a full disk is an error now and never SIGBUS at a store.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path

from light_mem.engine import lost_shards, shard_header
from light_mem.index import format as fmt
from light_mem.index import store_files
from light_mem.index.description import Geometry
from light_mem.index.room import allocate, lacking, lengthen

log = logging.getLogger("light_mem")


class ShardMaking:
    """The files of a store's shards as an opening finds them, and makes or lengthens them."""

    def __init__(self, directory: Path, geometry: Geometry, before: Geometry | None) -> None:
        """Only looks. `before` is what the description said until now, None for a new store. What
        a store has lost is said in the log. Raises StoreFormatError for files of another store,
        OSError."""
        self._directory, self._geometry, self._before = directory, geometry, before
        self._wanted: list[tuple[Path, bytes, int]] = []
        self._missing: dict[bytes, list[int]] = {fmt.DATA_MAGIC: [], fmt.SLOTS_MAGIC: []}  # shards
        self._grown: list[tuple[Path, int | None]] = []
        cut: list[str] = []
        damaged: list[str] = []
        for shard in range(geometry.shards):
            least = _shard_sizes(directory, before or geometry, shard)
            for (path, size), magic in zip(
                _shard_sizes(directory, geometry, shard).items(),
                (fmt.DATA_MAGIC, fmt.SLOTS_MAGIC),
                strict=True,
            ):
                header = shard_header.header_bytes(magic, geometry, shard)
                found = shard_header.read_header(path)
                shard_header.require_header(path, found, header)
                self._wanted.append((path, header, size))
                if before is None:
                    continue
                if not path.exists():
                    self._missing[magic].append(shard)
                elif path.stat().st_size < min(size, least[path]):
                    cut.append(path.name)
                elif found is None:
                    damaged.append(path.name)
        if cut:
            log.warning("store %s: %s were cut short; what they lost is a miss", directory, cut)
        if damaged:
            log.warning(
                "store %s: the headers of %s were damaged, and are written anew", directory, damaged
            )

    @property
    def lacking(self) -> int:
        """Bytes of room that the files lack now."""
        return sum(lacking(path, size) for path, _, size in self._wanted)

    def make(self, alone: bool) -> None:
        """Make or lengthen the files; `alone`: nobody else has them mapped. Raises StoreFullError,
        LockTimeoutError, OSError."""
        directory, geometry = self._directory, self._geometry
        before = self._before or geometry
        for shard in self._missing[fmt.DATA_MAGIC]:
            lost_shards.before_data_is_made(directory, before, shard, alone)
        for path, header, size in self._wanted:
            found = path.stat().st_size if path.exists() else None
            if found is None or found < size:
                self._grown.append((path, found))
            _make_file(path, header, size, alone)
        for shard in self._missing[fmt.SLOTS_MAGIC]:
            lost_shards.after_slots_are_made(directory, before, shard, geometry, alone)

    def take_back(self) -> None:
        """Give back the room that `make` has taken, for an opening that cannot go on. Nobody else
        has the files mapped, and nothing says yet that they have grown."""
        for path, size in self._grown:
            with suppress(OSError):  # the error that ends the opening is the one to report
                if size is None:  # still a lost file; the next opening repairs it as such
                    path.unlink()
                else:
                    os.truncate(path, size)


def cut_shards(directory: Path, geometry: Geometry) -> None:
    """Cut what is longer than it should be: once the index no longer names what lies behind the
    end, and with nobody else mapping it."""
    for shard in range(geometry.shards):
        for path, size in _shard_sizes(directory, geometry, shard).items():
            if path.stat().st_size > size:
                descriptor = store_files.open_file(path, os.O_WRONLY)
                try:
                    os.ftruncate(descriptor, size)
                finally:
                    os.close(descriptor)


def remove_shards(directory: Path, geometry: Geometry) -> None:
    """Remove the files of a store that could not be made."""
    for shard in range(geometry.shards):
        shard_header.data_path(directory, shard).unlink(missing_ok=True)
        shard_header.slots_path(directory, shard).unlink(missing_ok=True)


def _shard_sizes(directory: Path, geometry: Geometry, shard: int) -> dict[Path, int]:
    """A shard's data file and slots file, and their sizes in bytes."""
    return {
        shard_header.data_path(directory, shard): fmt.data_file_bytes(
            geometry.slots, geometry.page_bytes
        ),
        shard_header.slots_path(directory, shard): fmt.slots_file_bytes(geometry.slots),
    }


def _make_file(path: Path, header: bytes, size: int, alone: bool) -> None:
    descriptor = store_files.open_or_make(path)
    try:
        found = os.fstat(descriptor).st_size
        # Before the file grows: one that is not empty says whose it is, also after a kill.
        if os.pread(descriptor, len(header), 0) != header:
            os.pwrite(descriptor, header, 0)
        if alone and (found < size or lacking(path, size)):
            allocate(descriptor, path, size)
        elif found < size:
            lengthen(descriptor, path, size)
    finally:
        os.close(descriptor)
