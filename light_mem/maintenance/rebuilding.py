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
from typing import NamedTuple

import numpy as np

from light_mem.engine import reindex, shard_file
from light_mem.engine.opening import drop_unfinished, prepare
from light_mem.index import description, recovery
from light_mem.index import file as index_file
from light_mem.index import format as fmt
from light_mem.index.file import IndexFile
from light_mem.index.locks import PathLock, lock_path
from light_mem.index.owners import Owners
from light_mem.index.recovery import Table
from light_mem.maintenance.data import DataFile, block_at
from light_mem.maintenance.in_place import rebuild_in_place
from light_mem.maintenance.opening import OPEN_SECONDS
from light_mem.maintenance.owners import Ownership, require_alone
from light_mem.maintenance.report import RebuildReport
from light_mem.maintenance.store import Store, blocks_in


class _Shard(NamedTuple):
    plan: reindex.Plan
    adopted: list[tuple[int, list[tuple[int, int]]]]  # first slot, runs
    lost: int


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
    if dry_run:
        return _report(store, _plan(store), started, dry_run=True)
    if force and Ownership(store.directory).alive:
        return rebuild_in_place(store, started)
    with PathLock(lock_path(store.directory, "open")).hold(OPEN_SECONDS):
        require_alone(store.directory, "making the index anew")
        drop_unfinished(store.directory)
        shards = _plan(store)
        _publish(store, shards)
        _complete(store, shards)
    return _report(store, shards, started)


def _plan(store: Store) -> list[_Shard]:
    old = reindex.OldIndex(store.index_path, store.geometry)
    return [plan_shard(store, shard, old) for shard in range(store.geometry.shards)]


def plan_shard(store: Store, shard: int, old: reindex.OldIndex) -> _Shard:
    """The new entries of a shard, blocks that only the old index knows among them."""
    geometry = store.geometry
    plan = reindex.plan_shard(store.directory, geometry, shard, old)
    entries, before = plan.entries, old.entries(shard)
    size = min(len(entries), len(before))
    heads, several = blocks_in(before, geometry.page_bytes)
    heads = heads[heads < size]
    unknown = heads[~reindex.same_block(entries[heads], before[heads])].tolist()
    if not unknown:
        return _Shard(plan, [], 0)
    taken = np.zeros(len(entries), bool)
    for start, length in zip(*recovery.occupied_runs(entries), strict=True):
        taken[start : start + length] = True
    known = set(zip(*_keys(entries[recovery.states_of(entries) == fmt.LIVE]), strict=True))
    adopted = []
    lost = 0
    path = shard_file.data_path(store.directory, shard)
    data = DataFile(path) if path.exists() else None
    try:
        for head in unknown:
            runs = several.get(head) or [(head, int(before["run"][head]))]
            if (int(before["low"][head]), int(before["high"][head])) in known:
                continue  # the same key, elsewhere: nothing is lost
            free = all(a + n <= size and not taken[a : a + n].any() for a, n in runs)
            block = block_at(before[head], head, runs, geometry.page_bytes)
            if data is None or not free or data.problem(block):
                lost += int(old.sound)  # else it may well be another store's
                continue
            _adopt(entries, before, runs)
            for start, length in runs:
                taken[start : start + length] = True
            known.add((int(before["low"][head]), int(before["high"][head])))
            adopted.append((head, runs))
    finally:
        if data is not None:
            data.close()
    return _Shard(plan, adopted, lost)


def _keys(entries: Table) -> tuple[list[int], list[int]]:
    return entries["low"].tolist(), entries["high"].tolist()


def _adopt(entries: Table, before: Table, runs: list[tuple[int, int]]) -> None:
    for at, (start, _) in enumerate(runs):
        entries[start] = before[start]
        state = fmt.LIVE if at == 0 else fmt.EXTENT
        entries["tag"][start] = fmt.make_tag(state, 0, 1)
        entries["used"][start] = min(int(before["used"][start]), time.time_ns())


def _publish(store: Store, shards: list[_Shard]) -> None:
    """Write the new index and put it in its place, in one step."""
    old = reindex.OldIndex(store.index_path, store.geometry)
    temporary = index_file.create(store.directory, store.geometry)
    try:
        file = IndexFile(temporary, store.geometry)
        reindex.fill(file, [planned.plan for planned in shards], old)
        for shard in range(store.geometry.shards):
            reindex.clear_unlisted(store.directory, file, shard)
        file.mark_clean()  # synced: it outlives a power cut
        file.close()
        index_file.publish(store.directory, temporary)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _complete(store: Store, shards: list[_Shard]) -> None:
    """What else a server would find missing: the description, shard files, records."""
    geometry = store.geometry
    if not store.described:
        description.save(store.directory, geometry)
    if any(finding.kind == "file" for finding in store.file_findings()):
        owners = Owners(store.directory)
        try:
            size = geometry.storage_size
            prepare(store.directory, geometry.page_bytes, geometry.shards, size, owners)
        finally:
            owners.close()
    for number, shard in enumerate(shards):
        write_records(store, number, shard.plan.entries, shard.adopted)


def write_records(
    store: Store, shard: int, entries: Table, blocks: list[tuple[int, list[tuple[int, int]]]]
) -> None:
    """Give blocks that have none their records."""
    if not blocks:
        return
    file = shard_file.ShardFile(store.directory, store.geometry, shard)
    try:
        for slot, runs in blocks:
            names = ("low", "high", "checksum", "nbytes", "used")
            low, high, checksum, nbytes, used = (int(entries[name][slot]) for name in names)
            file.write_records(runs, low, high, checksum, nbytes, used)
        file.sync()
    finally:
        file.close()


def _report(
    store: Store, shards: list[_Shard], started: float, dry_run: bool = False
) -> RebuildReport:
    blocks = nbytes = 0
    for shard in shards:
        entries = shard.plan.entries
        live = recovery.states_of(entries) == fmt.LIVE
        blocks += int(np.count_nonzero(live))
        nbytes += int(entries["nbytes"][live].sum())
    return RebuildReport(
        str(store.directory),
        dry_run,
        False,
        blocks,
        nbytes,
        sum(shard.plan.kept_order for shard in shards),
        sum(len(shard.adopted) for shard in shards),
        sum(shard.plan.dropped for shard in shards),
        sum(shard.lost for shard in shards),
        (),
        time.monotonic() - started,
    )
