"""Makes, opens, resizes and rebuilds the files of a store, under the store's open lock.

Whoever opens takes `open.lock` (workers do not: their server holds the store for them), then:
description -> shard files of the right size -> an index that can be trusted. What is missing is
made, what is damaged beyond use is made anew from what describes itself, and whatever belongs to
another store or version is an error that changes nothing.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from pathlib import Path

import numpy as np

from light_mem.engine import shard_file
from light_mem.errors import (
    InvalidArgumentError,
    StoreBusyError,
    StoreFormatError,
    StoreFullError,
)
from light_mem.index import description, recovery
from light_mem.index import file as index_file
from light_mem.index import format as fmt
from light_mem.index.description import Geometry
from light_mem.index.file import IndexFile, IndexUnusable
from light_mem.index.owners import Owners

log = logging.getLogger("light_mem")

MAX_SHARDS = 1000


def make_directory(directory: Path) -> None:
    """The store's directory, 0700; raises StoreFormatError when it is something else."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError:
        raise StoreFormatError(
            f"{directory} is not a directory",
            path=str(directory),
            field="directory",
            found="file",
            expected="directory",
        ) from None


def check_sizes(page_bytes: int, shards: int, storage_size: int, block_pages: int) -> None:
    """Raise InvalidArgumentError unless every shard has room for one full block."""
    if not 1 <= shards <= MAX_SHARDS:
        raise InvalidArgumentError(f"num_of_shard is 1 to {MAX_SHARDS}, not {shards}")
    if description.slots_for(storage_size, shards, page_bytes) < block_pages:
        least = block_pages * page_bytes * shards
        raise InvalidArgumentError(
            f"storage_size {storage_size} is too small: {shards} shards of one block of "
            f"{block_pages} pages of {page_bytes} bytes need {least}",
            storage_size=storage_size,
            least=least,
        )


def prepare(
    directory: Path, page_bytes: int, shards: int, storage_size: int, owners: Owners
) -> Geometry:
    """Bring the store's files in order and return its geometry; the open lock is held.

    Raises StoreFormatError (other geometry), StoreFullError, StoreBusyError.
    """
    described = description.load(directory)
    geometry = described or _from_shards(directory)
    alone = not owners.others()
    if geometry is None:
        geometry = Geometry.new(page_bytes, shards, storage_size)
        _require_empty(directory)
        _make_shards(directory, geometry, alone)
        _make_index(directory, geometry)
        description.save(directory, geometry)  # last: from here on the store exists
        return geometry
    _require_same(directory, geometry, page_bytes, shards)
    wanted = geometry
    if storage_size != geometry.storage_size:
        if alone:
            wanted = geometry.resized(storage_size)
        else:
            log.warning(
                "store %s keeps its storage_size of %d bytes (%d were asked for): another "
                "process has it open",
                directory,
                geometry.storage_size,
                storage_size,
            )
    _make_shards(directory, wanted, alone)
    if described != wanted:
        description.save(directory, wanted)
    _ensure_index(directory, wanted, owners)
    if alone:
        _cut_shards(directory, wanted)
    return wanted


def _require_empty(directory: Path) -> None:
    # A directory with shards but without any readable header is not ours to overwrite.
    found = sorted(p.name for p in directory.glob("shard-*.data") if p.stat().st_size)
    if found:
        raise StoreFormatError(
            f"{directory} has shard files that describe no store of this format: {found}; "
            "nothing was changed",
            path=str(directory),
            field="header",
            found=found,
            expected="a readable header",
        )


def _require_same(directory: Path, geometry: Geometry, page_bytes: int, shards: int) -> None:
    pairs = {
        "page_bytes": (geometry.page_bytes, page_bytes),
        "num_of_shard": (geometry.shards, shards),
    }
    for field, (found, expected) in pairs.items():
        if found != expected:
            raise StoreFormatError(
                f"the store {directory} has {field} {found}, not {expected}; nothing was changed",
                path=str(directory),
                field=field,
                found=found,
                expected=expected,
            )


def _from_shards(directory: Path) -> Geometry | None:
    """The description from the shards' own headers; None when there are none."""
    for path in sorted(directory.glob("shard-*.data")):
        header = shard_file.read_header(path)
        if header is None:
            continue
        shards, page_bytes = int(header["shards"]), int(header["page_bytes"])
        sizes = [p.stat().st_size for p in directory.glob("shard-*.data")]
        slots = (max(sizes) - fmt.SHARD_HEADER_BYTES) // page_bytes
        log.warning("store %s: its description was lost; made anew from the shards", directory)
        store_id = bytes(header["store_id"]).ljust(16, b"\0").hex()
        return Geometry(store_id, page_bytes, shards, slots, slots * shards * page_bytes)
    return None


def _make_shards(directory: Path, geometry: Geometry, alone: bool) -> None:
    """Make or lengthen the shards' files; refuse those of another store before any change."""
    wanted: list[tuple[Path, bytes, int]] = []
    for shard in range(geometry.shards):
        for path, magic, size in (
            (
                shard_file.data_path(directory, shard),
                fmt.DATA_MAGIC,
                fmt.data_file_bytes(geometry.slots, geometry.page_bytes),
            ),
            (
                shard_file.slots_path(directory, shard),
                fmt.SLOTS_MAGIC,
                fmt.slots_file_bytes(geometry.slots),
            ),
        ):
            header = shard_file.header_bytes(magic, geometry, shard)
            found = shard_file.read_header(path)
            if found is not None and found.tobytes() != header:
                raise StoreFormatError(
                    f"{path} belongs to another store or shard; nothing was changed",
                    path=str(path),
                    field="header",
                    found=bytes(found["store_id"]).hex(),
                    expected=geometry.store_id,
                )
            wanted.append((path, header, size))
    _require_room(directory, sum(max(0, size - _allocated(path)) for path, _, size in wanted))
    for path, header, size in wanted:
        _make_file(path, header, size, alone)


def _allocated(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512  # st_blocks counts 512-byte units, whatever st_blksize
    except FileNotFoundError:
        return 0


def _require_room(directory: Path, needed: int) -> None:
    available = shutil.disk_usage(directory).free
    if needed > available:
        raise StoreFullError(
            f"the store {directory} needs {needed} bytes more, its file system has {available}",
            needed=needed,
            available=available,
        )


def _make_file(path: Path, header: bytes, size: int, alone: bool) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        found = os.fstat(descriptor).st_size
        # A file restored by a tool that makes holes is long enough and yet has no room.
        if found < size or (alone and _allocated(path) < size):
            if 0 < found < size:
                log.warning("%s had %d of %d bytes; what it lost is a miss", path, found, size)
            try:
                os.posix_fallocate(descriptor, 0, size)
            except OSError as error:
                os.ftruncate(descriptor, found)
                if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
                    raise StoreFullError(
                        f"{path} needs {size} bytes: {error.strerror}",
                        needed=size,
                        available=found,
                        errno=error.errno,
                    ) from error
                raise
        if os.pread(descriptor, len(header), 0) != header:
            os.pwrite(descriptor, header, 0)
    finally:
        os.close(descriptor)


def _cut_shards(directory: Path, geometry: Geometry) -> None:
    # After the index no longer names what lies behind the end, and with nobody else mapping it.
    for shard in range(geometry.shards):
        for path, size in (
            (
                shard_file.data_path(directory, shard),
                fmt.data_file_bytes(geometry.slots, geometry.page_bytes),
            ),
            (shard_file.slots_path(directory, shard), fmt.slots_file_bytes(geometry.slots)),
        ):
            if path.stat().st_size > size:
                os.truncate(path, size)


def _ensure_index(directory: Path, geometry: Geometry, owners: Owners) -> None:
    reason = ""
    try:
        file = IndexFile(directory / index_file.NAME, geometry)
        if not file.trustworthy:
            reason = "the machine went down with the index unsynced"
        file.close()
    except FileNotFoundError:
        reason = "the index is missing"
    except IndexUnusable as error:
        reason = str(error)
    if reason:
        if owners.others():
            # They go on with the index they have mapped: a second one would split the store.
            raise StoreBusyError(
                f"{reason}, and it cannot be made anew while others have the store open: "
                f"{owners.alive()}",
                owners=owners.alive(),
            )
        blocks = _make_index(directory, geometry)
        log.warning("store %s: %s; made anew with %d blocks", directory, reason, blocks)


def _make_index(directory: Path, geometry: Geometry) -> int:
    """A new index from the slots files; returns its blocks."""
    temporary = index_file.create(directory, geometry)
    try:
        file = IndexFile(temporary, geometry)
        blocks = 0
        for shard in range(geometry.shards):
            with shard_file.slots_path(directory, shard).open("rb") as records_file:
                records_file.seek(fmt.SHARD_HEADER_BYTES)
                raw = bytearray(records_file.read(fmt.RECORD.itemsize * geometry.slots))
            blocks += recovery.fill_shard(file, shard, np.frombuffer(raw, fmt.RECORD))
        file.close()
        index_file.publish(directory, temporary)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return blocks
