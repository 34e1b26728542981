"""Where a shard's two files lie, and the headers that say whose they are."""

from __future__ import annotations

import errno
import logging
import mmap
import os
from contextlib import suppress
from pathlib import Path

import numpy as np

from light_mem.engine import slot_calls
from light_mem.errors import StoreFormatError
from light_mem.index import format as fmt
from light_mem.index import store_files
from light_mem.index.description import Geometry
from light_mem.index.room import lengthen

log = logging.getLogger("light_mem")


def data_path(directory: Path, shard: int) -> Path:
    """Where a shard's pages lie."""
    return directory / f"shard-{shard:03}.data"


def slots_path(directory: Path, shard: int) -> Path:
    """Where a shard's slot records lie."""
    return directory / f"shard-{shard:03}.slots"


def header_bytes(magic: bytes, geometry: Geometry, shard: int) -> bytes:
    """The header of one of a shard's two files."""
    header = np.zeros(1, fmt.SHARD_HEADER)
    header["magic"] = magic
    header["version"] = fmt.FORMAT_VERSION
    header["store_id"] = bytes.fromhex(geometry.store_id)
    header["page_bytes"] = geometry.page_bytes
    header["shard"] = shard
    header["shards"] = geometry.shards
    header["crc"] = fmt.header_crc(header, fmt.SHARD_HEADER_CRC)
    return header.tobytes()


def read_header(path: Path) -> np.void | None:
    """The header of a shard's file; None when it is missing, cut short or damaged.

    Raises StoreFormatError when it is whole but of another version.
    """
    try:
        # Unbuffered: Python 3.14 would read 128 KiB, of each file of the store.
        with path.open("rb", buffering=0) as file:
            raw = _first_bytes(file.fileno())
    except FileNotFoundError:
        return None
    return _header_in(raw, path)


def require_header(path: Path, found: np.void | None, expected: bytes) -> None:
    """Raise StoreFormatError where a file has the header of another store or shard. One that is
    damaged (None) is nobody else's: a header is written whole, before its file grows."""
    if found is None or found.tobytes() == expected:
        return
    raise StoreFormatError(
        f"{path} belongs to another store or shard; nothing was changed",
        path=str(path),
        field="header",
        found=bytes(found["store_id"]).hex(),
        expected=bytes(np.frombuffer(expected, fmt.SHARD_HEADER)["store_id"][0]).hex(),
    )


def _header_of(descriptor: int, path: Path) -> np.void | None:
    """`read_header` of an open file; None also where the device does not give it any more."""
    try:
        raw = _first_bytes(descriptor)
    except OSError as error:
        if slot_calls.problem_of(error) is None:
            raise
        return None
    return _header_in(raw, path)


def _first_bytes(descriptor: int) -> bytes:
    """As many as a header has."""
    advises = hasattr(os, "posix_fadvise")
    with suppress(OSError):  # a kernel without it; it is advice
        if advises:  # else the kernel would read ahead of it, blocks that nobody may want
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    try:
        return os.pread(descriptor, fmt.SHARD_HEADER.itemsize, 0)
    finally:
        with suppress(OSError):
            if advises:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_NORMAL)


def _header_in(raw: bytes, path: Path) -> np.void | None:
    """The header that a file begins with; as `read_header`."""
    if len(raw) < fmt.SHARD_HEADER.itemsize:
        return None
    header = np.frombuffer(raw, fmt.SHARD_HEADER)
    if bytes(header["magic"][0]) not in (fmt.DATA_MAGIC, fmt.SLOTS_MAGIC):
        return None
    if int(header["crc"][0]) != fmt.header_crc(header, fmt.SHARD_HEADER_CRC):
        return None
    if int(header["version"][0]) != fmt.FORMAT_VERSION:
        raise StoreFormatError(
            f"{path} has format version {int(header['version'][0])}, this library reads "
            f"{fmt.FORMAT_VERSION}; nothing was changed",
            path=str(path),
            field="version",
            found=int(header["version"][0]),
            expected=fmt.FORMAT_VERSION,
        )
    found: np.void = header[0]
    return found


def holds_data(path: Path) -> bool:
    """Whether a file holds anything but zeros, and not only room for it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        at = 0
        while True:
            at = os.lseek(descriptor, at, os.SEEK_DATA)  # ... or zeros that somebody has read
            piece = os.pread(descriptor, 1 << 20, at)
            if piece.strip(b"\0"):
                return True
            at += len(piece)
    except OSError as error:
        return error.errno != errno.ENXIO  # the end
    finally:
        os.close(descriptor)


def map_whole(path: Path, size: int, header: bytes) -> tuple[mmap.mmap, int]:
    """Map a shard's file, once it is whole; with its descriptor. Raises OSError; StoreFullError
    when it was cut short and there is no room for what it lacks; StoreFormatError for a symlink, or
    the file of another store: a store may have been moved away, and another one been made in its
    place, since this process opened it."""
    descriptor = store_files.open_file(path, os.O_RDWR)
    try:
        # First: another store's file is not lengthened.
        require_header(path, _header_of(descriptor, path), header)
        make_whole(descriptor, path, size)
        return mmap.mmap(descriptor, size), descriptor
    except BaseException:
        os.close(descriptor)
        raise


def make_whole(descriptor: int, path: Path, size: int) -> None:
    """Before a shard's file is mapped: lengthen it where somebody has cut it short since the store
    was opened. Its blocks there are found damaged as they are read, as after an opening that finds
    it short, and the shard is of use to who maps it now. Raises StoreFullError, OSError."""
    found = os.fstat(descriptor).st_size
    if found < size:
        # Mapped all the same, the missing part would be SIGBUS at the first touch.
        lengthen(descriptor, path, size)
        log.warning(
            "%s was cut short, from %d to %d bytes, while the store was open: it is lengthened "
            "again, and what it lost is a miss",
            path,
            size,
            found,
        )
