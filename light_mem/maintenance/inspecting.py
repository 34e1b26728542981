"""What is in a store, without locking or changing anything: its numbers, and its blocks one by one.

Numbers of a store in use are those of about one moment. Without an index that can be used, blocks
are those of the slots files, and what only the index knows is None.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from light_mem.blocks import parse_hashes
from light_mem.engine.reindex import read_records
from light_mem.index import format as fmt
from light_mem.index import keys as keymath
from light_mem.index import recovery, retention
from light_mem.index.keys import HashValue, KeyArray, U64Array
from light_mem.index.recovery import Table
from light_mem.index.runs import Run
from light_mem.maintenance.owners import Ownership
from light_mem.maintenance.report import BlockReport, ShardReport, StoreReport
from light_mem.maintenance.store import Store, as_words, blocks_in, runs_of
from light_mem.maintenance.verifying import unfinished_of

COUNTERS = ("inserts", "evictions", "removals", "damaged")


def inspect(directory: str | os.PathLike[str]) -> StoreReport:
    """The numbers of a store; raises StoreFormatError when there is none. Any process."""
    store = Store(directory)
    g = store.geometry
    shards: list[ShardReport] = []
    used: list[U64Array] = []
    written: list[U64Array] = []
    pinned = pinned_slots = expired = writing = held = 0
    control = store.control()
    for shard in range(g.shards):
        table = store.table(shard)
        states = recovery.states_of(table)
        live = np.flatnonzero(states == fmt.LIVE)
        records = read_records(store.directory, g, shard)
        listed = np.flatnonzero(recovery.states_of(records) == fmt.LIVE)
        written.append(records["used"][listed])
        used.append(table["used"][live])
        pinned_here, slots_here = retention.pinned_among(table, g.page_bytes)
        pinned, pinned_slots = pinned + pinned_here, pinned_slots + slots_here
        expired += int(np.count_nonzero(retention.expired(table["keep"][live])))
        writing += int(np.count_nonzero(states == fmt.WRITING))
        held += int(np.count_nonzero(states == fmt.HELD))
        counters = [int(control[n][shard]) if store.usable else 0 for n in COUNTERS]
        slots = int(table["run"][states != fmt.FREE].sum())
        shards.append(
            ShardReport(shard, live.size, int(table["nbytes"][live].sum()), slots, *counters)
        )
    uses, writes = np.concatenate(used), np.concatenate(written)
    index_bytes = fmt.index_layout(g.shards, g.slots).size
    totals = {n: sum(getattr(s, n) for s in shards) if store.usable else None for n in COUNTERS}
    lookups, hits = store.looked_up if store.usable else (None, None)
    known = uses.size > 0 and store.usable
    return StoreReport(
        directory=str(store.directory),
        format_version=fmt.FORMAT_VERSION,
        store_id=g.store_id,
        page_bytes=g.page_bytes,
        shards=g.shards,
        slots=g.slots,
        storage_size=g.storage_size,
        capacity=g.shards * g.slots * g.page_bytes,
        index_state=store.index_problem or "ok",
        index_bytes=index_bytes,
        index_bytes_a_slot=round(index_bytes / (g.shards * g.slots), 1),
        blocks=sum(s.blocks for s in shards),
        block_bytes=sum(s.block_bytes for s in shards),
        used_slots=sum(s.used_slots for s in shards),
        pinned_blocks=pinned,
        pinned_slots=pinned_slots,
        expired_blocks=expired,
        writing_blocks=writing,
        held_blocks=held,
        oldest_use=int(uses.min()) if known else None,
        newest_use=int(uses.max()) if known else None,
        median_use=int(np.partition(uses, uses.size // 2)[uses.size // 2]) if known else None,
        oldest_write=int(writes.min()) if writes.size else None,
        newest_write=int(writes.max()) if writes.size else None,
        lookups=lookups,
        hits=hits,
        inserts=totals["inserts"],
        evictions=totals["evictions"],
        removals=totals["removals"],
        damaged=totals["damaged"],
        owners=Ownership(store.directory).alive,
        by_shard=tuple(shards),
        unfinished=tuple(unfinished_of(store)),
    )


class Listed(NamedTuple):
    """The blocks of one shard, by place."""

    shard: int
    heads: recovery.Ints  # first slots
    rows: Table  # their entries, ENTRY [n]
    several: dict[int, list[Run]]  # by first slot: runs of those that have many

    def runs(self, n: int) -> list[Run]:
        """The runs of the n-th block."""
        slot = int(self.heads[n])
        return runs_of(self.several, slot, self.rows["run"][n])


def listed(store: Store, keys: KeyArray | None = None) -> Iterator[Listed]:
    """The stored blocks of a store, or those of `keys`, shard by shard."""
    for shard in range(store.geometry.shards):
        table = store.table(shard)
        heads, several = blocks_in(table, store.geometry.page_bytes)
        if keys is not None:
            heads = heads[np.isin(table["low"][heads], keys[:, 0])]
            wanted = set(map(tuple, keys.tolist()))
            found = zip(table["low"][heads].tolist(), table["high"][heads].tolist(), strict=True)
            heads = heads[np.array([key in wanted for key in found], bool)]
        rows = as_words(table)[heads].view(fmt.ENTRY).reshape(-1)
        yield Listed(shard, heads, rows, several)


def blocks(
    directory: str | os.PathLike[str], hashes: list[HashValue] | None = None
) -> Iterator[BlockReport]:
    """The blocks of a store by shard and place, or those of `hashes` that are stored.

    Raises StoreFormatError (no store), InvalidArgumentError (a value that is no hash, one hash that
    is in no list).
    """
    keys = None if hashes is None else keymath.as_keys(parse_hashes(hashes))
    return _blocks(Store(directory), keys)


def _blocks(store: Store, keys: KeyArray | None) -> Iterator[BlockReport]:
    for part in listed(store, keys):
        records = read_records(store.directory, store.geometry, part.shard)
        for n in range(len(part.heads)):
            yield _report(part, records, n)


def _report(part: Listed, records: Table, n: int) -> BlockReport:
    slot, entry = int(part.heads[n]), part.rows[n]
    record, runs = records[slot], part.runs(n)
    mine = all(int(record[n]) == int(entry[n]) for n in ("low", "high", "checksum"))
    recorded = mine and fmt.state_of(record["tag"]) == fmt.LIVE
    expires = retention.expires_at(int(entry["keep"]))
    return BlockReport(
        key=keymath.key_text(int(entry["low"]), int(entry["high"])),
        shard=part.shard,
        slot=slot,
        runs=tuple(runs),
        pages=sum(length for _, length in runs),
        nbytes=int(entry["nbytes"]),
        checksum=f"{int(entry['checksum']):016x}",
        used=int(entry["used"]),
        written=int(record["used"]) if recorded else None,
        pinned=int(entry["keep"]) >= fmt.KEEP_PINNED,
        expires=None if expires is None else expires * 10**9,
    )
