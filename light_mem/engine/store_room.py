"""The room that a store needs on its file system, asked for before anything is made or grows."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from light_mem.errors import StoreFullError
from light_mem.index import description, owners
from light_mem.index import file as index_file
from light_mem.index import format as fmt
from light_mem.index.description import Geometry
from light_mem.index.room import held, lacking

_DESCRIPTION_BYTES = fmt.BLOCK_ALIGN  # of a file system's blocks: a description has below 1024


def require_room_for_new(directory: Path, page_bytes: int, shards: int, storage_size: int) -> None:
    """Raise StoreFullError for a new store that cannot fit, before anything of it is made."""
    if any(directory.glob("shard-*")) or (directory / description.NAME).exists():
        return
    there = next(p for p in (directory, *directory.parents) if p.exists())
    if there.is_dir():
        slots = description.slots_for(storage_size, shards, page_bytes)
        a_shard = fmt.data_file_bytes(slots, page_bytes) + fmt.slots_file_bytes(slots)
        others = lacking(directory / owners.NAME, owners.FILE_BYTES)
        needed = shards * a_shard + others + new_index_bytes(shards, slots) + _DESCRIPTION_BYTES
        require_room(directory, there, needed)


def new_index_bytes(shards: int, slots: int) -> int:
    """Room for an index that is made anew, beside the one that is there."""
    return fmt.index_layout(shards, slots).size


@contextmanager
def room_for_another_size(directory: Path, geometry: Geometry) -> Iterator[None]:
    """Keep the room that a store needs to become `geometry`, which is smaller, while blocks move.
    Raises StoreFullError, and has changed nothing then.

    Whoever opens the store meanwhile gives it free: they keep it from another size in any case.
    """
    needed = new_index_bytes(geometry.shards, geometry.slots) + _DESCRIPTION_BYTES
    require_room(directory, directory, needed)
    with held(index_file.temporary_path(directory), needed):
        yield


def lacking_beside_shards(
    directory: Path, geometry: Geometry, before: Geometry | None, index_anew: bool
) -> int:
    """Bytes that what is no shard file lacks, or will: `owners`, the description, the index.

    before       what the description says, None: there is none, it will be written
    index_anew   a new index is made beside the one that is there
    """
    needed = lacking(directory / owners.NAME, owners.FILE_BYTES)
    if geometry != before:
        needed += _DESCRIPTION_BYTES
    index = new_index_bytes(geometry.shards, geometry.slots)
    return needed + (index if index_anew else lacking(directory / index_file.NAME, index))


def require_room(directory: Path, there: Path, needed: int) -> None:
    """Raise StoreFullError where a file system has not the bytes that a store needs more; `there`:
    the store's directory, or what there is of its path."""
    usage = shutil.disk_usage(there)
    available = usage.free
    # Without a size (a tmpfs with size=0, ramfs) it does not say; allocating finds a real lack.
    if usage.total and needed > available:
        raise StoreFullError(
            f"the store {directory} needs {needed} bytes more, its file system has {available}",
            needed=needed,
            available=available,
        )
