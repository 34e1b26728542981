"""Opens an existing store for changes as a server would: joins it, gives back what kills left."""

from __future__ import annotations

import os
from pathlib import Path

from light_mem.blocks import pages_per_block
from light_mem.engine import foreign, opening
from light_mem.engine.local import LocalStorageEngine
from light_mem.index.description import check_slots
from light_mem.maintenance.store import Store

OPEN_SECONDS = 60.0  # a server that opens a large store holds the open lock for as long


def check_size(page_bytes: int, shards: int, storage_size: int) -> None:
    """Raise InvalidArgumentError for a size with which no server could open the store: a shard must
    have numbers for its slots, and room for one full block. How many pages that has is what
    LIGHTMEM_MAX_BLOCK_SIZE_MB says here: it should say the same as for the server."""
    opening.check_sizes(page_bytes, shards, storage_size, pages_per_block(page_bytes))
    check_slots(storage_size, shards, page_bytes)


def check_new(
    directory: str | os.PathLike[str], page_bytes: int, shards: int, storage_size: int
) -> None:
    """`check_size` of a store that is to be made; raises StoreFormatError where files of others are
    in its place."""
    check_size(page_bytes, shards, storage_size)
    foreign.refuse_foreign(Path(directory))


def open_tool(
    directory: str | os.PathLike[str], storage_size: int | None = None
) -> LocalStorageEngine:
    """An engine over a store that is there already, as kind "tool"; with another size if given.

    Raises StoreFormatError (no store, or a file of another one), StoreBusyError (its index cannot
    be used and others have it open), StoreFullError.
    """
    geometry = Store(directory).geometry
    return LocalStorageEngine.open_store(
        Path(directory),
        page_bytes=geometry.page_bytes,
        num_of_shard=geometry.shards,
        storage_size=geometry.storage_size if storage_size is None else storage_size,
        block_pages=1,  # a store that is there is opened, whatever its size
        kind="tool",
    )
