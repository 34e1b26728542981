"""The shards' files on the file system: made, lengthened, cut. A part of opening a store.

All room is allocated here, so that a full disk is an error now and never SIGBUS at a store.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from light_mem.engine import lost_shards, shard_header
from light_mem.errors import StoreFormatError, StoreFullError
from light_mem.index import description, store_files
from light_mem.index import format as fmt
from light_mem.index.description import Geometry
from light_mem.index.room import allocate, lacking

log = logging.getLogger("light_mem")


def require_room_for_new(directory: Path, page_bytes: int, shards: int, storage_size: int) -> None:
    """Raise StoreFullError for a new store that cannot fit, before anything of it is made."""
    if any(directory.glob("shard-*")) or (directory / description.NAME).exists():
        return
    there = next(p for p in (directory, *directory.parents) if p.exists())
    if there.is_dir():
        slots = description.slots_for(storage_size, shards, page_bytes)
        a_shard = fmt.data_file_bytes(slots, page_bytes) + fmt.slots_file_bytes(slots)
        _require_room(directory, there, shards * a_shard)


def make_shards(directory: Path, geometry: Geometry, before: Geometry | None, alone: bool) -> None:
    """Make or lengthen the shards' files; refuse those of another store before any change.

    `before` is what the description said until now, None for a new store; `alone`: nobody else has
    them mapped. What a store has lost is said in the log. Raises StoreFormatError, StoreFullError,
    LockTimeoutError, OSError.
    """
    wanted: list[tuple[Path, bytes, int]] = []
    missing: dict[bytes, list[int]] = {fmt.DATA_MAGIC: [], fmt.SLOTS_MAGIC: []}  # shards
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
            if found is not None and found.tobytes() != header:
                raise StoreFormatError(
                    f"{path} belongs to another store or shard; nothing was changed",
                    path=str(path),
                    field="header",
                    found=bytes(found["store_id"]).hex(),
                    expected=geometry.store_id,
                )
            wanted.append((path, header, size))
            if before is None:
                continue
            if not path.exists():
                missing[magic].append(shard)
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
    _require_room(directory, directory, sum(lacking(path, size) for path, _, size in wanted))
    for shard in missing[fmt.DATA_MAGIC]:
        lost_shards.before_data_is_made(directory, before or geometry, shard, alone)
    for path, header, size in wanted:
        _make_file(path, header, size, alone)
    for shard in missing[fmt.SLOTS_MAGIC]:
        lost_shards.after_slots_are_made(directory, before or geometry, shard, geometry, alone)


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


def _require_room(directory: Path, there: Path, needed: int) -> None:
    """`there`: the directory, or what there is of its path."""
    available = shutil.disk_usage(there).free
    if needed > available:
        raise StoreFullError(
            f"the store {directory} needs {needed} bytes more, its file system has {available}",
            needed=needed,
            available=available,
        )


def _make_file(path: Path, header: bytes, size: int, alone: bool) -> None:
    descriptor = store_files.open_or_make(path)
    try:
        found = os.fstat(descriptor).st_size
        # Before the file grows: one that is not empty says whose it is, also after a kill.
        if os.pread(descriptor, len(header), 0) != header:
            os.pwrite(descriptor, header, 0)
        if found < size or (alone and lacking(path, size)):
            allocate(descriptor, path, size)
    finally:
        os.close(descriptor)
