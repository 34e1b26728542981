"""Shard files that a store has lost, removed by somebody: what becomes of their blocks.

The open lock is held. Without the data file the blocks are gone: they are taken out before an empty
one is made, so that no look-up finds them. Without the slots file the index still lists them, and a
new one is written from it, so that they outlive the index. A kill before that is done leaves the
file missing, or blocks without a record, which `verify --repair` finds. All that only where nobody
else has the store open.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from light_mem.engine import reindex, shard_header
from light_mem.engine.slot_records import SlotRecords
from light_mem.index import file as index_file
from light_mem.index import format as fmt
from light_mem.index.description import Geometry
from light_mem.index.file import IndexFile, IndexUnusable
from light_mem.index.lookup import Lookup
from light_mem.index.recovery import states_of
from light_mem.index.room import fill_holes
from light_mem.index.shard import ShardIndex, open_shard
from light_mem.index.written import Written

log = logging.getLogger("light_mem")


def before_data_is_made(directory: Path, geometry: Geometry, shard: int, alone: bool) -> None:
    """A shard's data file is missing, and is about to be made anew: take its blocks out. Raises
    LockTimeoutError, OSError."""
    name = shard_header.data_path(directory, shard).name
    if alone:
        taken_out = _take_out(directory, geometry, shard)
        log.warning(
            "store %s: %s was missing and is made anew, empty; %d blocks went with it",
            directory,
            name,
            taken_out,
        )
        return
    # Others go on with the file that they have mapped, in which the blocks still are. Who maps it
    # from now on has another.
    log.warning(
        "store %s: %s was missing and is made anew, empty; its blocks are found damaged as they "
        "are read. Those who have the store open may use the removed file: restart them",
        directory,
        name,
    )


def after_slots_are_made(
    directory: Path, geometry: Geometry, shard: int, into: Geometry, alone: bool
) -> None:
    """A shard's slots file was missing, and was made anew: describe its blocks in it, which the
    index lists. `geometry` is what the index has, `into` what the new file has. Raises
    LockTimeoutError, OSError."""
    name = shard_header.slots_path(directory, shard).name
    if not alone:
        log.warning(
            "store %s: %s was missing and is made anew, empty; its blocks are served as before, "
            "and lost if the index is made anew. Those who have the store open may use the removed "
            "file: restart them, then run `light-mem verify %s --repair`",
            directory,
            name,
            directory,
        )
        return
    described = _describe(directory, geometry, shard, into)
    if described is None:
        log.warning(
            "store %s: %s was missing and is made anew, empty; its blocks are lost, for the index "
            "cannot be used either",
            directory,
            name,
        )
        return
    log.warning(
        "store %s: %s was missing and is made anew from the index, with %d blocks",
        directory,
        name,
        described,
    )


def _take_out(directory: Path, geometry: Geometry, shard: int) -> int:
    """Take out the blocks of a shard; returns how many there were."""
    records = reindex.read_records(directory, geometry, shard)
    described = np.flatnonzero(states_of(records) != fmt.FREE)
    taken_out = int(np.count_nonzero(states_of(records) == fmt.LIVE))
    with _changed(directory, geometry, shard) as changed:
        if changed is not None:
            taken_out = len(changed[0].clear())
        reindex.clear_records(directory, shard, described)  # also for an index made anew
    return taken_out


def _describe(directory: Path, geometry: Geometry, shard: int, into: Geometry) -> int | None:
    """Write a shard's records from the index; returns how many blocks they describe, None: the
    index cannot be believed."""
    with _changed(directory, geometry, shard) as changed:
        if changed is None:
            return None
        index, lookup = changed
        live = np.flatnonzero(states_of(index.entries) == fmt.LIVE)
        blocks = []
        for slot in live.tolist():
            entry = index.entries[slot]
            runs = lookup.runs(shard, slot, int(entry["nbytes"]))
            if runs is not None and all(start + n <= into.slots for start, n in runs):
                blocks.append(Written.of(entry, runs))
        SlotRecords(directory, into, shard).write_records(blocks)
        return len(blocks)


@contextmanager
def _changed(
    directory: Path, geometry: Geometry, shard: int
) -> Iterator[tuple[ShardIndex, Lookup] | None]:
    """Change a shard's index while nobody has the store open; None: there is none that can be
    believed, and the next step of opening makes one from the records."""
    try:
        file = IndexFile(directory / index_file.NAME, geometry)
    except (FileNotFoundError, IndexUnusable):
        yield None
        return
    if not file.trustworthy:
        yield None
        return
    # An index of another size, restored from backup, still has holes here: fill them.
    fill_holes(file.path, fmt.index_layout(geometry.shards, geometry.slots).size)
    lookup = Lookup(file)
    # No other process has the store open, so there are no leases.
    index = open_shard(directory, file, shard, lookup, set)
    was_clean = bool(file.header["clean"][0])
    file.mark_open()
    with index.change():
        yield index, lookup
    if was_clean:  # else records of dead owners may not have reached the device
        file.mark_clean()
