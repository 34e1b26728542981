"""The index at an opening: whether the one that is there can be used, and one made anew."""

from __future__ import annotations

import logging
from pathlib import Path

from light_mem.engine import reindex
from light_mem.errors import StoreBusyError
from light_mem.index import file as index_file
from light_mem.index import format as fmt
from light_mem.index.description import Geometry
from light_mem.index.file import IndexFile, IndexUnusable
from light_mem.index.owners import Owners, listing
from light_mem.index.room import fill_holes

log = logging.getLogger("light_mem")


def counts(
    directory: Path, geometry: Geometry, name: str, trusted: bool = False
) -> list[int] | None:
    """A counter of each shard, as the index has it; None: it cannot be used. `trusted`: nor where
    a power cut may have mixed pages of different times."""
    try:
        file = IndexFile(directory / index_file.NAME, geometry, writable=False)
    except (FileNotFoundError, IndexUnusable):
        return None
    counts: list[int] = file.control[name].tolist()
    is_trusted = file.trustworthy
    file.close()
    return counts if is_trusted or not trusted else None


def fill_index_holes(directory: Path, geometry: Geometry) -> None:
    """Allocate what an index that can be used lacks of its room, before anything is stored to it.
    Nobody else has the store open. Raises StoreFullError."""
    path = directory / index_file.NAME
    try:
        IndexFile(path, geometry, writable=False).close()
    except (FileNotFoundError, IndexUnusable):
        return
    fill_holes(path, fmt.index_layout(geometry.shards, geometry.slots).size)


def ensure_index(directory: Path, geometry: Geometry, owners: Owners, before: Geometry) -> None:
    """`before`: what the index that is there was made for."""
    reason = ""
    try:
        file = IndexFile(directory / index_file.NAME, geometry)
        # Whoever has the store open has proved that this kernel wrote the index.
        if not file.trustworthy and not owners.others():
            reason = "the machine went down with the index unsynced"
        file.close()
    except FileNotFoundError:
        reason = "the index is missing"
    except IndexUnusable as error:
        reason = str(error)
    if reason:
        if owners.others():
            # They go on with the index they have mapped: a second one would split the store.
            alive = owners.alive()
            raise StoreBusyError(
                f"{reason}, and it cannot be made anew while {directory} is open in: "
                f"{listing(alive)}. Stop them, or run light-mem rebuild {directory} --force",
                owners=alive,
            )
        listed = counts(directory, before, "blocks")
        blocks = make_index(directory, geometry)
        if geometry.slots != before.slots:
            dropped = 0 if listed is None else max(0, sum(listed) - blocks)
            log.log(
                logging.WARNING if dropped else logging.INFO,
                "store %s now holds %d bytes; %d blocks are kept, %d are dropped",
                directory,
                geometry.storage_size,
                blocks,
                dropped,
            )
        else:
            log.warning("store %s: %s; made anew with %d blocks", directory, reason, blocks)


def make_index(directory: Path, geometry: Geometry) -> int:
    """Make the index of a store anew, in one step; returns its blocks. The store is ours alone."""
    path = directory / index_file.NAME
    old = reindex.OldIndex(path, geometry) if path.exists() else None
    temporary = index_file.create(directory, geometry)
    try:
        file = IndexFile(temporary, geometry)
        plans = (reindex.plan_shard(directory, geometry, s, old) for s in range(geometry.shards))
        blocks = reindex.fill(file, plans, old)
        for shard in range(geometry.shards):
            reindex.clear_unlisted(directory, file, shard)
        file.close()
        index_file.publish(directory, temporary)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return blocks
