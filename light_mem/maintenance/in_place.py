"""The index corrected in the memory that running servers have mapped: `rebuild` with `force`.

One shard at a time, under its lock, in the order in which the index always changes: a slot that
gets another block is FREE with a new generation before, and LIVE after, its fields are right. What
a server is writing at the moment stays. A kill leaves the shard's dirty mark, as a server's would.
"""

from __future__ import annotations

import logging
import os
import time

import numpy as np
import numpy.typing as npt

from light_mem.engine import reindex
from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.shard_file import ShardFile
from light_mem.errors import StoreBusyError
from light_mem.index import description, recovery, store_files
from light_mem.index import file as index_file
from light_mem.index import format as fmt
from light_mem.index.locks import PathLock, lock_path
from light_mem.index.recovery import Table
from light_mem.index.room import allocate
from light_mem.index.runs import Run
from light_mem.index.shard import ShardIndex
from light_mem.maintenance.opening import OPEN_SECONDS
from light_mem.maintenance.owners import Ownership, listing, maps_index
from light_mem.maintenance.report import OwnerReport, RebuildReport
from light_mem.maintenance.store import Store, blocks_in, runs_of

log = logging.getLogger("light_mem")


def rebuild_in_place(store: Store, started: float) -> RebuildReport:
    """Correct the index of a store that others have open.

    Raises LockTimeoutError when a stopped process holds a shard's lock.
    """
    alive = Ownership(store.directory).alive
    with PathLock(lock_path(store.directory, "open")).hold(OPEN_SECONDS):
        if not store.described:
            description.save(store.directory, store.geometry)
        _restore_frame(store)
        engine = LocalStorageEngine(store.directory, kind="tool")
        # The last server may have left, and marked it clean, since we looked.
        engine.mark_open()
    blocks = nbytes = added = removed = 0
    try:
        for shard in range(store.geometry.shards):
            with engine.change(shard) as (index, file):
                gone, new = _correct(store, index, file)
                added, removed = added + new, removed + gone
                live = recovery.states_of(index.entries) == fmt.LIVE
                blocks += int(np.count_nonzero(live))
                nbytes += int(index.entries["nbytes"][live].sum())
    finally:
        engine.close()
    return RebuildReport(
        str(store.directory),
        False,
        True,
        blocks,
        nbytes,
        blocks - added,
        0,
        0,
        removed,
        _elsewhere(store, alive),
        time.monotonic() - started,
    )


def _elsewhere(store: Store, alive: tuple[OwnerReport, ...]) -> tuple[OwnerReport, ...]:
    # Only what is seen to be wrong: a process of another container cannot be looked at.
    return tuple(o for o in alive if o.command and maps_index(o.pid, store.directory) is False)


def _restore_frame(store: Store) -> None:
    """Give the index file its size and header again, as the same file where there is one; its
    shards are then put in order by whoever takes their locks."""
    if store.usable:
        return
    if store.index_version not in (None, fmt.INDEX_VERSION):
        alive = Ownership(store.directory).alive
        raise StoreBusyError(
            f"the index of {store.directory} is of version {store.index_version}, and those who "
            f"have it open go by that: {listing(alive)}; stop them first",
            owners=alive,
        )
    temporary = index_file.create(store.directory, store.geometry)
    if not store.index_path.exists():
        index_file.publish(store.directory, temporary)
        return
    try:
        size = temporary.stat().st_size
        header = bytes(reindex.read_at(temporary, 0, fmt.BLOCK_ALIGN))
    finally:
        temporary.unlink()
    descriptor = store_files.open_file(store.index_path, os.O_RDWR)
    try:
        allocate(descriptor, store.index_path, size)
        control = np.zeros(1, fmt.CONTROL)
        control["dirty"] = fmt.RELINKING
        for shard in range(store.geometry.shards):
            with store.held(shard):
                os.pwrite(descriptor, control.tobytes(), fmt.BLOCK_ALIGN * (1 + shard))
        os.pwrite(descriptor, header, 0)
    finally:
        os.close(descriptor)
    log.warning("store %s: the header of its index was restored in place", store.directory)


def _correct(store: Store, index: ShardIndex, file: ShardFile) -> tuple[int, int]:
    """Make one shard list what its records describe; returns blocks taken out and put in."""
    index.put_in_order()
    entries = index.entries
    writing = _not_stored(entries)
    plan = reindex.plan_shard(store.directory, store.geometry, index.shard, None).entries
    heads, several = blocks_in(plan, store.geometry.page_bytes)
    same = reindex.same_block(plan[heads], entries[heads])
    entries["keep"][heads[same]] = plan["keep"][heads[same]]
    lost = heads[same & (index.uses[heads] == 0)]
    index.uses[lost] = entries["used"][lost]
    new: list[list[Run]] = []
    wanted = np.zeros(len(entries), bool)
    for head in heads[~same].tolist():
        runs = runs_of(several, head, plan["run"][head])
        # A record may be there before its block is published: that is its writer's to do.
        if not any(writing[start : start + length].any() for start, length in runs):
            new.append(runs)
            for start, length in runs:
                wanted[start : start + length] = True
    listed, theirs = blocks_in(entries, store.geometry.page_bytes)
    removed = 0
    for slot in listed.tolist():
        runs = runs_of(theirs, slot, entries["run"][slot])
        if any(wanted[start : start + length].any() for start, length in runs):
            index.remove(slot)
            removed += 1
    put_in = 0
    writing = _not_stored(entries)  # what was leased has become HELD
    for runs in new:
        slot = runs[0][0]
        if any(writing[start : start + length].any() for start, length in runs):
            continue
        # A key that is stored elsewhere stays there: its bytes may be in use at the moment.
        if index.find(int(plan["low"][slot]), int(plan["high"][slot])) is None:
            list_block(index, plan, runs)
            put_in += 1
    index.put_in_order()
    file.clear_records(index.unlisted_slots())
    return removed, put_in


def _not_stored(entries: Table) -> npt.NDArray[np.bool_]:
    """Slots of blocks that are being written, or HELD for a lease."""
    states = recovery.states_of(entries)
    taken = np.zeros(len(entries), bool)
    for slot in np.flatnonzero((states == fmt.WRITING) | (states == fmt.HELD)).tolist():
        for start, length in recovery.follow_runs(entries, states, slot) or []:
            taken[start : start + length] = True
    return taken


def list_block(index: ShardIndex, plan: Table, runs: list[Run]) -> None:
    """List a block of `plan`, ENTRY [slots], at these runs, which nobody has; in no chain yet and
    not counted: the shard is to be put in order."""
    entries = index.entries
    for at in reversed(range(len(runs))):  # the first slot, which look-ups find, comes last
        slot = runs[at][0]
        generation = (int(entries["tag"][slot]) >> fmt.GENERATION_SHIFT) + 1
        entries["tag"][slot] = fmt.make_tag(fmt.FREE, 0, generation)
        for name in ("low", "high", "checksum", "nbytes", "used", "run", "next_run", "keep"):
            entries[name][slot] = plan[name][slot]
        index.uses[slot] = plan["used"][slot]
        entries["next"][slot] = 0
        state = fmt.LIVE if at == 0 else fmt.EXTENT
        entries["tag"][slot] = fmt.make_tag(state, 0, generation + 1)
