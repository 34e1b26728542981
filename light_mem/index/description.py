"""What a store is: its geometry and identity, in `store.json`, written whole or not at all."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import NamedTuple

import xxhash

from light_mem.errors import InvalidArgumentError, StoreFormatError
from light_mem.index import format as fmt
from light_mem.index import store_files
from light_mem.index.room import refuse_full

NAME = "store.json"
MAX_SLOTS = 2**31 - 2  # a shard: slot numbers are 32 bits wide, with one number kept for "none"


class Geometry(NamedTuple):
    """Sizes of a store: bytes a page, number of shards, slots a shard, and the identity."""

    store_id: str  # 32 hex digits
    page_bytes: int
    shards: int
    slots: int
    storage_size: int

    @classmethod
    def new(cls, page_bytes: int, shards: int, storage_size: int) -> Geometry:
        """Geometry of a new store: as many slots as `storage_size` bytes of pages hold."""
        return cls(
            os.urandom(16).hex(),
            page_bytes,
            shards,
            slots_for(storage_size, shards, page_bytes),
            storage_size,
        )

    def resized(self, storage_size: int) -> Geometry:
        """The same store with another `storage_size`."""
        slots = slots_for(storage_size, self.shards, self.page_bytes)
        return Geometry(self.store_id, self.page_bytes, self.shards, slots, storage_size)

    def slots_of(self, nbytes: int) -> int:
        """Slots that a block of so many bytes takes."""
        # Not by `slots_needed`: a look-up asks for each block, and would pay for a second call.
        return -(-nbytes // self.page_bytes)


def slots_for(storage_size: int, shards: int, page_bytes: int) -> int:
    """Slots a shard."""
    return min(storage_size // shards // page_bytes, MAX_SLOTS)


def check_slots(storage_size: int, shards: int, page_bytes: int) -> None:
    """Raise InvalidArgumentError for a size of which the shards would hold a part only."""
    if storage_size // shards // page_bytes > MAX_SLOTS:
        limit = MAX_SLOTS * page_bytes * shards
        raise InvalidArgumentError(
            f"storage_size {storage_size} is too large: {shards} shards of pages of {page_bytes} "
            f"bytes hold at most {limit} bytes; use more shards",
            storage_size=storage_size,
            limit=limit,
        )


def _crc(fields: dict[str, object]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(fields, sort_keys=True).encode())


def save(directory: Path, geometry: Geometry) -> None:
    """Write the description: a new file, synced, then renamed over the old one."""
    fields = {"format": "lightmem", "version": fmt.FORMAT_VERSION, **geometry._asdict()}
    text = json.dumps({**fields, "crc": _crc(fields)}, indent=1) + "\n"
    temporary = directory / f"{NAME}.{os.getpid()}.tmp"
    try:
        descriptor = store_files.make(temporary)
        try:
            left = text.encode()
            while left:
                left = left[os.write(descriptor, left) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        path = directory / NAME
        refuse_full(error, path, len(text), f"{path} cannot be written")
        raise
    os.replace(temporary, directory / NAME)
    sync_directory(directory)


def load(directory: Path) -> Geometry | None:
    """The description; None when it is missing or damaged.

    Raises StoreFormatError when it is whole but of another format version.
    """
    try:
        fields = json.loads((directory / NAME).read_bytes())
        crc = fields.pop("crc")
        if crc != _crc(fields) or fields.pop("format") != "lightmem":
            return None
        version = fields.pop("version")
        if version == fmt.FORMAT_VERSION:
            return Geometry(**fields)
    except (FileNotFoundError, IsADirectoryError):
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    raise StoreFormatError(
        f"{directory} has format version {version}, this library reads {fmt.FORMAT_VERSION}; "
        "nothing was changed",
        path=str(directory),
        field="version",
        found=version,
        expected=fmt.FORMAT_VERSION,
    )


def no_store(directory: Path, expected: str, remedy: str = "") -> StoreFormatError:
    """The error that a directory holds no store; `expected`: what would have made it one. Raises
    OSError where this process may not look."""
    return StoreFormatError(
        f"{directory} holds no store: {_what_is_there(directory, expected)}{remedy}",
        path=str(directory),
        field=NAME,
        found=None,
        expected=expected,
    )


def _what_is_there(directory: Path, expected: str) -> str:
    try:
        is_link = stat.S_ISLNK(directory.lstat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return "it does not exist"
    if not directory.is_dir():
        return "it is a symlink that leads to no directory" if is_link else "it is no directory"
    return f"it lacks {expected}" if os.listdir(directory) else "it is empty"


def sync_directory(directory: Path) -> None:
    """Make names in the directory durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
