"""The index at an opening: whether the one that is there can be used, and one made anew."""

from __future__ import annotations

import logging
from pathlib import Path

from light_mem.engine import reindex
from light_mem.errors import StoreBusyError
from light_mem.index import file as index_file
from light_mem.index.description import Geometry
from light_mem.index.file import IndexFile, IndexUnusable
from light_mem.index.owners import Owners, listing

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


def problem_of(directory: Path, geometry: Geometry, owners: Owners) -> str:
    """Why the index must be made anew; "": it need not. Changes nothing.

    Raises StoreBusyError where it must and others have the store open.
    """
    problem = ""
    try:
        file = IndexFile(directory / index_file.NAME, geometry, writable=False)
        # Whoever has the store open has proved that this kernel wrote the index.
        if not file.trustworthy and not owners.others():
            problem = "the machine went down with the index unsynced"
        file.close()
    except FileNotFoundError:
        problem = "the index is missing"
    except IndexUnusable as error:
        problem = str(error)
    if problem and owners.others():
        # They go on with the index they have mapped: a second one would split the store.
        alive = owners.alive()
        raise StoreBusyError(
            f"{problem}, and it cannot be made anew while {directory} is open in: "
            f"{listing(alive)}. Stop them, or run light-mem rebuild {directory} --force",
            owners=alive,
        )
    return problem


class NewIndex:
    """An index made anew: its room first, then what it lists, last its place, in one step.

    The store is ours alone. Until `publish` nothing has changed but for a file under a temporary
    name, which `discard` removes.
    """

    def __init__(self, directory: Path, geometry: Geometry) -> None:
        """Take the room. Raises StoreFullError, OSError."""
        self._directory, self._geometry = directory, geometry
        self._path = directory / index_file.NAME
        self._temporary = index_file.create(directory, geometry)
        self.blocks = 0

    def fill(self) -> None:
        """List the blocks that the slots files describe, in the old index's order of use."""
        directory, geometry = self._directory, self._geometry
        shards = range(geometry.shards)
        try:
            old = reindex.OldIndex(self._path, geometry) if self._path.exists() else None
            self._file = IndexFile(self._temporary, geometry)
            plans = (reindex.plan_shard(directory, geometry, shard, old) for shard in shards)
            self.blocks = reindex.fill(self._file, plans, old)
        except BaseException:
            self.discard()
            raise

    def publish(self) -> None:
        """Clear the records of what it does not list, and put it in its place."""
        try:
            for shard in range(self._geometry.shards):
                reindex.clear_unlisted(self._directory, self._file, shard)
            self._file.close()
            index_file.publish(self._directory, self._temporary)
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Remove it: it is not to be."""
        self._temporary.unlink(missing_ok=True)


def put_in_place(
    new: NewIndex, directory: Path, geometry: Geometry, before: Geometry, problem: str
) -> None:
    """Publish an index that was filled, and log why there is a new one. `before`: geometry of the
    existing index."""
    listed = counts(directory, before, "blocks")
    new.publish()
    if geometry.slots == before.slots:
        log.warning("store %s: %s; made anew with %d blocks", directory, problem, new.blocks)
        return
    dropped = 0 if listed is None else max(0, sum(listed) - new.blocks)
    log.log(
        logging.WARNING if dropped else logging.INFO,
        "store %s now holds %d bytes; %d blocks are kept, %d are dropped",
        directory,
        geometry.storage_size,
        new.blocks,
        dropped,
    )
