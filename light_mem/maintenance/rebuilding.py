"""The index made anew from the shard files, without an index or with a garbage one.

Alone (the usual case): a new file beside the old one, synced, renamed over it. Killed before the
rename, nothing has happened; after it, everything has.

While servers have the store open a new file would split it: they go on with the old one, and both
give the same slots away. So that is refused, unless `force` says otherwise; the index is then
corrected in place, shard by shard under their locks, in the very memory that the servers have
mapped. Where that is not possible (the file was replaced) the report names who must be restarted.

The blocks are those that the slots file describes. One that only the old index knows, because its
record was lost, is kept when its bytes fit its checksum: nothing that can be read is given up.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np

from light_mem.engine import reindex, shard_file, shard_header
from light_mem.engine.opening import drop_unfinished, prepare
from light_mem.index import description, recovery
from light_mem.index import file as index_file
from light_mem.index import format as fmt
from light_mem.index.file import IndexFile
from light_mem.index.locks import PathLock, lock_path
from light_mem.index.owners import Owners
from light_mem.index.recovery import Table
from light_mem.index.runs import Run
from light_mem.index.written import Written
from light_mem.maintenance.data import block_at
from light_mem.maintenance.data_file import DataFile
from light_mem.maintenance.in_place import rebuild_in_place
from light_mem.maintenance.opening import OPEN_SECONDS
from light_mem.maintenance.owners import Ownership, require_alone
from light_mem.maintenance.report import RebuildReport
from light_mem.maintenance.store import Store, blocks_in, runs_of


@dataclass
class _Sums:
    """What a rebuild has come to so far."""

    blocks: int = 0
    nbytes: int = 0
    kept_order: int = 0
    dropped: int = 0
    lost: int = 0
    adopted: list[tuple[int, Table, list[Run]]] = field(default_factory=list)  # shard, ENTRY [1]


def rebuild(
    directory: str | os.PathLike[str], *, dry_run: bool = False, force: bool = False
) -> RebuildReport:
    """Make the index of a store anew; see the module for how.

    dry_run  only say what would be: nothing is changed, nothing is locked
    force    go on although other processes have the store open

    The data of blocks is not read (`verify` does that), except that of blocks without a record.
    Raises StoreFormatError (no store), StoreBusyError, StoreFullError, LockTimeoutError.
    """
    started = time.monotonic()
    store = Store(directory)
    store.refuse_foreign()
    sums = _Sums()
    if dry_run:
        for _ in _plans(store, sums):
            pass
    elif force and Ownership(store.directory).alive:
        return rebuild_in_place(store, started)
    else:
        with PathLock(lock_path(store.directory, "open")).hold(OPEN_SECONDS):
            require_alone(store.directory, "making the index anew")
            drop_unfinished(store.directory)
            _publish(store, sums)
            _complete(store, sums)
    return RebuildReport(
        str(store.directory),
        dry_run,
        False,
        sums.blocks,
        sums.nbytes,
        sums.kept_order,
        len(sums.adopted),
        sums.dropped,
        sums.lost,
        (),
        time.monotonic() - started,
    )


def _plans(store: Store, sums: _Sums) -> Iterator[reindex.ShardPlan]:
    """The new entries, shard by shard: those of one shard are in memory at a time."""
    old = reindex.OldIndex(store.index_path, store.geometry)
    for shard in range(store.geometry.shards):
        plan = reindex.plan_shard(store.directory, store.geometry, shard, old)
        _keep_unrecorded(store, shard, plan.entries, old, sums)
        live = recovery.states_of(plan.entries) == fmt.LIVE
        sums.blocks += int(np.count_nonzero(live))
        sums.nbytes += int(plan.entries["nbytes"][live].sum())
        sums.kept_order += plan.kept_order
        sums.dropped += plan.dropped
        yield plan


def _keep_unrecorded(
    store: Store, shard: int, entries: Table, old: reindex.OldIndex, sums: _Sums
) -> None:
    """Add the blocks that only the old index knows and whose bytes are right."""
    page_bytes = store.geometry.page_bytes
    before = old.entries(shard)
    size = min(len(entries), len(before))
    heads, several = blocks_in(before, page_bytes)
    heads = heads[heads < size]
    unknown = heads[~reindex.same_block(entries[heads], before[heads])].tolist()
    path = shard_header.data_path(store.directory, shard)
    if not unknown or not path.exists():
        sums.lost += len(unknown) * old.sound
        return
    taken = np.zeros(len(entries), bool)
    for start, length in zip(*recovery.occupied_runs(entries), strict=True):
        taken[start : start + length] = True
    live = entries[recovery.states_of(entries) == fmt.LIVE]
    known = set(zip(live["low"].tolist(), live["high"].tolist(), strict=True))
    data = DataFile(path)
    try:
        for head in unknown:
            key = int(before["low"][head]), int(before["high"][head])
            if key in known:
                continue  # the same key, elsewhere: nothing is lost
            runs = runs_of(several, head, before["run"][head])
            free = all(a + n <= size and not taken[a : a + n].any() for a, n in runs)
            if not free or data.problem(block_at(before[head], head, runs, page_bytes)):
                sums.lost += old.sound  # an index that is not is perhaps another store's
                continue
            for at, (start, length) in enumerate(runs):
                entries[start] = before[start]
                state = fmt.LIVE if at == 0 else fmt.EXTENT
                entries["tag"][start] = fmt.make_tag(state, 0, 1)
                entries["used"][start] = min(int(before["used"][start]), time.time_ns())
                taken[start : start + length] = True
            known.add(key)
            sums.adopted.append((shard, entries[[head]], runs))
    finally:
        data.close()


def _publish(store: Store, sums: _Sums) -> None:
    """Write the new index and put it in its place, in one step."""
    old = reindex.OldIndex(store.index_path, store.geometry)
    temporary = index_file.create(store.directory, store.geometry)
    try:
        file = IndexFile(temporary, store.geometry)
        reindex.fill(file, _plans(store, sums), old)
        for shard in range(store.geometry.shards):
            reindex.clear_unlisted(store.directory, file, shard)
        file.mark_clean()  # synced: it outlives a power cut
        file.close()
        index_file.publish(store.directory, temporary)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _complete(store: Store, sums: _Sums) -> None:
    """What else a server would find missing: the description, shard files, records."""
    geometry = store.geometry
    if not store.described:
        description.save(store.directory, geometry)
    # Also where there are records to write: files with holes are allocated before they are mapped.
    if sums.adopted or any(finding.kind == "file" for finding in store.file_findings()):
        owners = Owners(store.directory)
        try:
            size = geometry.storage_size
            prepare(store.directory, geometry.page_bytes, geometry.shards, size, owners)
        finally:
            owners.close()
    for shard, rows in groupby(sums.adopted, key=lambda block: block[0]):
        file = shard_file.ShardFile(store.directory, geometry, shard)
        try:
            for _, entry, runs in rows:
                file.write_records([Written.of(entry[0], runs)])
            file.sync()
        finally:
            file.close()
