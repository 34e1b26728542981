"""A store as a tool sees it that only looks: no lock, no membership, no file made or changed.

Everything is read by system calls, not through mappings: a file that is cut short or a sector that
cannot be read is then an answer, where a mapping would be SIGBUS. What is read may change
meanwhile; `Snapshot` is one shard at about one moment, and whoever suspects something looks again
under the shard's lock.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from light_mem.engine import foreign, reindex, shard_header
from light_mem.engine.opening import describe
from light_mem.errors import StoreBusyError, StoreFormatError
from light_mem.index import description, recovery
from light_mem.index import file as index_file
from light_mem.index import format as fmt
from light_mem.index.description import Geometry
from light_mem.index.file import IndexFile, IndexUnusable
from light_mem.index.locks import LOCK_TIMEOUT_SECONDS, PathLock, lock_path
from light_mem.index.recovery import Table
from light_mem.index.runs import Run, slots_needed
from light_mem.maintenance.report import Finding

_FOREIGN = "belongs to another store or shard"


class Snapshot(NamedTuple):
    """One shard: copies of what the index and the slots file say."""

    shard: int
    entries: Table  # ENTRY [slots], as they are: `used` is when a block was stored
    heads: Table  # uint32 [buckets]
    control: Table  # CONTROL [1]
    records: Table  # RECORD [slots]

    @property
    def dirty(self) -> bool:
        """Whether someone is, or died, changing the shard."""
        return bool(self.control["dirty"][0])


class Store:
    """An existing store, looked at from outside. Any thread; holds no descriptor."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        """Raises StoreFormatError when there is no store of this format, or a symlink in it."""
        self.directory = Path(directory)
        geometry = describe(self.directory) if self.directory.is_dir() else None
        if geometry is None:
            raise description.no_store(
                self.directory, "a description, or shards that describe themselves"
            )
        foreign.refuse_links(self.directory)
        self.geometry: Geometry = geometry
        self.described = description.load(self.directory) is not None
        self.index_path = self.directory / index_file.NAME
        self.index_problem = self._index_problem()
        self._index_identity = self._identity()

    @property
    def usable(self) -> bool:
        """Whether the index can be used."""
        return not self.index_problem

    def _index_problem(self) -> str:
        try:
            file = IndexFile(self.index_path, self.geometry, writable=False)
        except FileNotFoundError:
            return "it is missing"
        except IndexUnusable as error:
            return str(error)
        self.trustworthy = file.trustworthy
        self.looked_up = (int(file.header["lookups"][0]), int(file.header["hits"][0]))
        file.close()
        return ""

    def _identity(self) -> tuple[int, int] | None:
        try:
            found = self.index_path.stat()
        except FileNotFoundError:
            return None
        return found.st_dev, found.st_ino

    def require_unchanged(self) -> None:
        """Raise StoreBusyError when the index was replaced since: what was read is another's."""
        if self._identity() != self._index_identity:
            raise StoreBusyError(
                f"the index of {self.directory} was replaced meanwhile; try again", owners=[]
            )

    def snapshot(self, shard: int) -> Snapshot:
        """One shard, read without a lock; zeros for what cannot be read."""
        g = self.geometry
        layout = fmt.index_layout(g.shards, g.slots)
        buckets = fmt.buckets_for(g.slots)
        return Snapshot(
            shard,
            self._read(fmt.ENTRY, layout.entries, g.slots * shard, g.slots),
            self._read(np.dtype("<u4"), layout.heads, buckets * shard, buckets),
            self._read(fmt.CONTROL, layout.control, shard, 1),
            reindex.read_records(self.directory, g, shard),
        )

    def _read(self, kind: np.dtype[Any], section: int, first: int, count: int) -> npt.NDArray[Any]:
        """Items of a section of the index file, which begins at byte `section`."""
        return reindex.read_items(self.index_path, kind, section, first, count)

    def control(self) -> Table:
        """The control pages of all shards now, CONTROL [shards]; zeros for what cannot be read."""
        g = self.geometry
        return self._read(fmt.CONTROL, fmt.index_layout(g.shards, g.slots).control, 0, g.shards)

    def entries(self, shard: int) -> Table:
        """The entries of a shard now, ENTRY [slots], with their last use as `used`; zeros for what
        cannot be read."""
        return self._entries(self.geometry.slots * shard, self.geometry.slots)

    def entry(self, shard: int, slot: int) -> Table:
        """One entry now, ENTRY [1]."""
        return self._entries(self.geometry.slots * shard + slot, 1)

    def _entries(self, first: int, count: int) -> Table:
        layout = fmt.index_layout(self.geometry.shards, self.geometry.slots)
        entries = self._read(fmt.ENTRY, layout.entries, first, count)
        entries["used"] = self._read(np.dtype("<u8"), layout.uses, first, count)
        return entries

    def still_lists(self, shard: int, slot: int, entry: np.void) -> bool:
        """Whether the block of this entry is where it was: ask after reading its bytes. Without an
        index that can be used, the records say so: servers of another version may use it."""
        fields = ["low", "high", "checksum", "nbytes", "run", "next_run"]
        if self.usable:
            now = self.entry(shard, slot)
            fields.append("tag")
        else:
            path = shard_header.slots_path(self.directory, shard)
            now = reindex.read_items(path, fmt.RECORD, fmt.SHARD_HEADER_BYTES, slot, 1)
            if recovery.states_of(now)[0] != fmt.LIVE:
                return False
        return all(int(now[f][0]) == int(entry[f]) for f in fields)

    @property
    def index_version(self) -> int | None:
        """The version that the header of the index names; None: there is no such header."""
        header = reindex.index_header(self.index_path)
        return None if header is None else int(header["version"][0])

    def table(self, shard: int) -> Table:
        """What lists the blocks of a shard: its entries, or its sound records without an index."""
        if self.usable:
            return self.entries(shard)
        return reindex.plan_shard(
            self.directory, self.geometry, shard, reindex.OldIndex(self.index_path, self.geometry)
        ).entries

    @contextmanager
    def held(self, shard: int, timeout: float = LOCK_TIMEOUT_SECONDS) -> Iterator[None]:
        """Keep a shard from changing; raises LockTimeoutError. Changes nothing itself."""
        path = lock_path(self.directory, f"shard-{shard:03}")
        if not path.exists() or not os.access(path, os.R_OK):
            yield  # nobody has ever changed it, or this process may not even look
            return
        with PathLock(path).hold(timeout):
            yield

    def file_findings(self) -> list[Finding]:
        """What is wrong with files, seen from outside."""
        found: list[Finding] = []
        if not self.described:
            problem = "store.json is missing or damaged; the shards' headers say what it said"
            found.append(Finding("description", -1, -1, "", problem))
        if self.index_problem:
            found.append(Finding("index", -1, -1, "", f"the index: {self.index_problem}"))
        g = self.geometry
        for shard in range(g.shards):
            for path, magic, size in (
                (
                    shard_header.data_path(self.directory, shard),
                    fmt.DATA_MAGIC,
                    fmt.data_file_bytes(g.slots, g.page_bytes),
                ),
                (
                    shard_header.slots_path(self.directory, shard),
                    fmt.SLOTS_MAGIC,
                    fmt.slots_file_bytes(g.slots),
                ),
            ):
                problem = _file_problem(path, shard_header.header_bytes(magic, g, shard), size)
                if problem:
                    kind = "foreign" if problem == _FOREIGN else "file"
                    found.append(Finding(kind, shard, -1, "", f"{path.name} {problem}"))
        return found

    def refuse_foreign(self) -> None:
        """Raise StoreFormatError when a shard's file is another store's: whoever put it there, or
        its right one back, must decide."""
        for finding in self.file_findings():
            if finding.kind == "foreign":
                raise StoreFormatError(
                    f"{self.directory}: {finding.problem}; nothing was changed",
                    path=str(self.directory),
                    field="header",
                    found="another store or shard",
                    expected=self.geometry.store_id,
                )


def _file_problem(path: Path, header: bytes, size: int) -> str:
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        return "is missing"
    if found < size:
        return f"has {found} of {size} bytes"
    if bytes(reindex.read_at(path, 0, len(header))) == header:
        return ""
    if shard_header.read_header(path) is None:
        return "has a damaged header"
    return _FOREIGN


def as_words(table: Table) -> npt.NDArray[np.uint64]:
    """Entries or records as their eight 64-bit words, uint64 [n, 8]; no copy."""
    return np.asarray(table).view("<u8").reshape(len(table), -1)


def blocks_in(table: Table, page_bytes: int) -> tuple[recovery.Ints, dict[int, list[Run]]]:
    """First slots of all LIVE blocks that make sense, by place, and the runs of those that have
    several."""
    states = recovery.states_of(table)
    heads = np.flatnonzero(states == fmt.LIVE)
    run = table["run"][heads].astype(np.int64)
    # Float: a length out of a garbage entry may not fit int64.
    pages = slots_needed(table["nbytes"][heads].astype(np.float64), page_bytes)
    fits = (run > 0) & (heads + run <= len(table))
    single = fits & (table["next_run"][heads] == 0) & (pages == run)
    several: dict[int, list[Run]] = {}
    for head in heads[fits & (table["next_run"][heads] != 0)].tolist():
        runs = recovery.follow_runs(table, states, head)
        needed = slots_needed(int(table["nbytes"][head]), page_bytes)
        if runs is not None and sum(n for _, n in runs) == needed:
            several[head] = runs
    good = np.concatenate([heads[single], np.array(list(several), np.int64)])
    return np.sort(good), several


def runs_of(several: dict[int, list[Run]], slot: int, run: int) -> list[Run]:
    """The runs of a block at `slot` that `blocks_in` found; `run`: the length of its first one."""
    return several.get(slot) or [(slot, int(run))]
