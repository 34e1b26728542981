"""One look at a store and the servers that have it open."""

from __future__ import annotations

import os
import time
from typing import NamedTuple

from light_mem.engine.table_stats import ServiceNumbers, read_numbers
from light_mem.index.ages import AgeBucket, added, by_age
from light_mem.index.owners import since_1970
from light_mem.maintenance.owners import command_of
from light_mem.maintenance.store import Store
from light_mem.monitor.servers import ServerTable, find_tables


class StoreLook(NamedTuple):
    """A store's own numbers, which outlive its servers; None: the index cannot be used."""

    directory: str
    store_id: str
    page_bytes: int
    shards: int
    slots: int  # of all shards
    index_state: str  # "ok", or why it cannot be used
    blocks: int | None
    used_slots: int | None
    pinned_blocks: int | None
    pinned_slots: int | None
    lookups: int | None  # hashes asked for, by all servers ever
    hits: int | None
    inserts: int | None
    evictions: int | None
    removals: int | None
    damaged: int | None
    ages: tuple[AgeBucket, ...] | None  # None too when they were not asked for


class ServerLook(NamedTuple):
    """One service of a server."""

    table_id: str
    pid: int
    started: float  # of the process, s since 1970
    command: str  # "" when it cannot be seen
    workers: int  # that it is meant to have
    num_pages: int
    pages_per_block: int
    numbers: ServiceNumbers


class Look(NamedTuple):
    """Everything at about one moment."""

    at: float  # s since 1970
    clock: float  # monotonic seconds, for rates
    store: StoreLook
    servers: tuple[ServerLook, ...]  # by pid
    unseen: int  # living servers whose numbers cannot be read: another user's, another container's


def look(directory: str | os.PathLike[str], ages: bool = True) -> Look:
    """Look at a store and its servers. Any process; takes no lock, stops nobody.

    ages    also the blocks by the time since their last use: reads the whole index

    Raises StoreFormatError when there is no store, OSError.
    """
    store = Store(directory)
    tables, unseen = find_tables(store.directory)
    servers = tuple(_server(table) for table in tables)
    return Look(time.time(), time.monotonic(), _store(store, ages), servers, unseen)


def _store(store: Store, ages: bool) -> StoreLook:
    g = store.geometry
    numbers: dict[str, int | None] = dict.fromkeys(
        ("blocks", "used_slots", "pinned_slots", "inserts", "evictions", "removals", "damaged")
    )
    pinned: int | None = None
    lookups: int | None = None
    hits: int | None = None
    buckets: tuple[AgeBucket, ...] | None = None
    if store.usable:
        control = store.control()
        numbers = {name: int(control[name].sum()) for name in numbers}
        pinned = int(control["pinned"].sum())
        lookups, hits = store.looked_up
        if ages:
            now = time.time_ns()
            tables = map(store.entries, range(g.shards))
            parts = [by_age(table, table["used"], now) for table in tables]
            buckets = tuple(added(parts))
    return StoreLook(
        directory=str(store.directory.absolute()),
        store_id=g.store_id,
        page_bytes=g.page_bytes,
        shards=g.shards,
        slots=g.shards * g.slots,
        index_state=store.index_problem or "ok",
        pinned_blocks=pinned,
        lookups=lookups,
        hits=hits,
        ages=buckets,
        **numbers,
    )


def _server(found: ServerTable) -> ServerLook:
    header = found.table.header[0]
    started = since_1970(float(header["server_started"]))
    return ServerLook(
        table_id=bytes(header["table_id"]).decode(),
        pid=found.pid,
        started=started,
        command=command_of(found.pid, started),
        workers=int(header["workers"]),
        num_pages=int(header["num_pages"]),
        pages_per_block=int(header["pages_per_block"]),
        numbers=read_numbers(found.table),
    )
