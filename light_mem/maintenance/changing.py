"""Takes blocks out on request: all of them, those unused for long, those that do not fit any more.

Each change is one of the engine's own, under a shard's lock, so servers may go on meanwhile (but
for `resize`, which needs the store alone) and a kill at any moment leaves nothing half done: what
is not yet taken out is taken out by running it again. `dry_run` says what would go.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack

import numpy as np

from light_mem.blocks import seconds, whole_number
from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.opening import pinned_beyond
from light_mem.engine.removing import take_out
from light_mem.engine.store_room import room_for_another_size
from light_mem.index import format as fmt
from light_mem.index import retention
from light_mem.index.recovery import Ints
from light_mem.index.runs import slots_needed
from light_mem.maintenance.compacting import compact, worth_of
from light_mem.maintenance.inspecting import listed
from light_mem.maintenance.opening import check_size, open_tool
from light_mem.maintenance.owners import Ownership, opened_meanwhile, require_alone
from light_mem.maintenance.report import ChangeReport
from light_mem.maintenance.store import Store

BATCH = 256  # blocks taken out in one hold of a shard's lock: some milliseconds


def clear(directory: str | os.PathLike[str], *, dry_run: bool = False) -> ChangeReport:
    """Take out every stored block; the files keep their size. Raises as opening does."""
    started = time.monotonic()
    store = Store(directory)
    parts = list(listed(store))
    removed = sum(len(part.heads) for part in parts)
    nbytes = sum(int(part.rows["nbytes"].sum()) for part in parts)
    if not dry_run:
        engine = open_tool(directory)
        try:
            removed = engine.clear()
        finally:
            engine.close()
    return _report(store, dry_run, removed, nbytes, 0, started)


def evict(
    directory: str | os.PathLike[str], older_than: float, *, dry_run: bool = False
) -> ChangeReport:
    """Take out the blocks that nobody has used for `older_than` seconds, and those that expired.

    A block that is used meanwhile stays, and so do pinned and leased ones. Raises
    InvalidArgumentError for a negative time, and as opening does.
    """
    older_than = seconds("older_than", older_than)
    started = time.monotonic()
    store = Store(directory)
    now = time.time_ns()
    before = now - int(min(older_than * 1e9, now))  # times of use begin at 1970
    removed = nbytes = 0
    engine = None if dry_run else open_tool(directory)
    try:
        for part in listed(store):
            is_old = part.rows["used"] < np.uint64(before)
            is_old &= part.rows["keep"] < fmt.KEEP_PINNED
            is_old |= retention.expired(part.rows["keep"])
            old = part.heads[is_old]
            if engine is None:
                removed += len(old)
                nbytes += int(part.rows["nbytes"][is_old].sum())
                continue
            for first in range(0, len(old), BATCH):
                batch = old[first : first + BATCH]
                count, size = _evict(engine, part.shard, batch, before)
                removed, nbytes = removed + count, nbytes + size
    finally:
        if engine is not None:
            engine.close()
    return _report(store, dry_run, removed, nbytes, 0, started)


def _evict(engine: LocalStorageEngine, shard: int, slots: Ints, before: int) -> tuple[int, int]:
    removed = nbytes = 0
    with engine.change(shard) as (index, file):
        for slot in slots.tolist():
            entry = index.entries[slot]
            if fmt.state_of(entry["tag"]) != fmt.LIVE or slot in index.leases.slots():
                continue
            # Whatever is stored there now: what counts is that nobody has used it for so long.
            old = int(index.uses[slot]) < before and not index.retention.is_pinned(slot)
            if old or index.retention.has_expired(slot):
                nbytes += int(entry["nbytes"])
                removed += 1
                take_out(index, file, slot)
        index.control["evictions"] += removed
    return removed, nbytes


def resize(
    directory: str | os.PathLike[str], storage_size: int, *, dry_run: bool = False
) -> ChangeReport:
    """Give a store another `storage_size` (bytes of pages). Nobody else may have it open.

    A larger store keeps every block. In a smaller one the pinned and the most recently used
    blocks that fit a shard's new size move to its front first; what is left behind the new end
    goes. Killed in the middle, the store has its old size and all blocks that are not yet given
    up, or the new one.
    Raises InvalidArgumentError (too small for a server, see `check_size`), StoreBusyError,
    StoreFullError; PinLimitError when more than half of a shard would be pinned. Then nothing was
    changed; but for StoreBusyError, LockTimeoutError and OSError when a smaller store was opened by
    another process, or its device failed, while blocks were moved: it keeps its size, and what has
    gone until then is gone.
    """
    storage_size = whole_number("storage_size", storage_size, 1, 2**63 - 1)
    started = time.monotonic()
    store = Store(directory)
    geometry = store.geometry
    check_size(geometry.page_bytes, geometry.shards, storage_size)
    resized = geometry.resized(storage_size)
    slots = resized.slots
    too_many = pinned_beyond(store.directory, geometry, slots)
    if too_many is not None:
        raise too_many
    before = _totals(store)
    if dry_run:
        kept = _would_keep(store, slots)
        removed, nbytes = before[0] - kept[0], before[1] - kept[1]
        return _report(store, True, removed, nbytes, 0, started)._replace(
            storage_size=storage_size, blocks=kept[0]
        )
    require_alone(store.directory, "another size")
    moved = 0
    with ExitStack() as room:
        if slots < geometry.slots:
            engine = open_tool(directory)
            try:
                # On a full disk it fails here, and not when blocks have gone for a size that is not
                # to be had.
                room.enter_context(room_for_another_size(store.directory, resized))
                for shard in range(geometry.shards):
                    moved += compact(engine, shard, slots)
            finally:
                engine.close()
        open_tool(directory, storage_size).close()  # which gives that room free, to use it
    after = Store(directory)
    if after.geometry.storage_size != storage_size:
        raise opened_meanwhile(store.directory, Ownership(store.directory).alive)
    left = _totals(after)
    return _report(
        after, False, max(0, before[0] - left[0]), max(0, before[1] - left[1]), moved, started
    )


def _totals(store: Store) -> tuple[int, int]:
    """Stored blocks and their bytes."""
    count = nbytes = 0
    for part in listed(store):
        count += len(part.heads)
        nbytes += int(part.rows["nbytes"].sum())
    return count, nbytes


def _would_keep(store: Store, slots: int) -> tuple[int, int]:
    """Blocks, and their bytes, that fit `slots` a shard when the last used come first."""
    count = nbytes = 0
    for part in listed(store):
        order = np.lexsort((part.rows["used"], worth_of(part.rows["keep"])))[::-1]
        sizes = part.rows["nbytes"][order].astype(np.int64)
        fits = np.cumsum(slots_needed(sizes, store.geometry.page_bytes)) <= slots
        count += int(np.count_nonzero(fits))
        nbytes += int(sizes[fits].sum())
    return count, nbytes


def _report(
    store: Store, dry_run: bool, removed: int, nbytes: int, moved: int, started: float
) -> ChangeReport:
    left = _totals(store)[0] - (removed if dry_run else 0)
    return ChangeReport(
        str(store.directory),
        dry_run,
        removed,
        nbytes,
        moved,
        left,
        store.geometry.storage_size,
        time.monotonic() - started,
    )
