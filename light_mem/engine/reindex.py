"""A store's index made anew from its slots files, in the order of use that the old one knew.

What the blocks are is said by the records alone: each carries a crc. The index that was there until
now, whole or not, is only asked when each block was last used: it is believed about a block when
its entry, at the same slot, names the same key and checksum, which no garbage does by chance. A
block that it does not know keeps the time of its writing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from light_mem.engine import shard_header
from light_mem.index import format as fmt
from light_mem.index import recovery, store_files
from light_mem.index.description import Geometry
from light_mem.index.file import IndexFile
from light_mem.index.recovery import Table
from light_mem.index.retention import pinned_among

# A clock set back since explains a time in the future up to this far; one beyond it is garbage, and
# would keep its block from eviction for good.
_CLOCK_SLACK_NS = 24 * 3600 * 10**9
_VERSIONS = (2, fmt.INDEX_VERSION)  # in 2 `used` of an entry was its last use, and nothing follows
_SECTOR = 4096
_TAG_AT = fmt.RECORD.fields["tag"][1]  # type: ignore[index]
_COUNTERS = ("evictions", "inserts", "removals", "damaged")


class ShardPlan(NamedTuple):
    """What a shard's new entries will be."""

    entries: Table  # ENTRY [slots], chains not linked
    kept_order: int  # blocks whose last use is known from the old index
    dropped: int  # records of blocks that were not believed: wrong crc, overlap, older twin, cut


def read_at(path: Path, at: int, size: int) -> bytearray:
    """`size` bytes of a file from `at` on; zeros for what it does not have, or cannot give."""
    raw = bytearray(size)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:  # any other failure may pass: not a reason to list no blocks
        return raw
    try:
        view, done, piece = memoryview(raw), 0, 1 << 24
        while done < size:
            try:
                count = os.preadv(descriptor, [view[done : done + piece]], at + done)
            except OSError:  # an unreadable sector: go round it
                done += _SECTOR if piece == _SECTOR else 0
                piece = _SECTOR
                continue
            if not count:
                break
            done += count
    finally:
        os.close(descriptor)
    return raw


def read_items(
    path: Path, kind: np.dtype[Any], section: int, first: int, count: int
) -> npt.NDArray[Any]:
    """Items of a section of a file, which begins at byte `section`; see `read_at`."""
    return np.frombuffer(
        read_at(path, section + kind.itemsize * first, kind.itemsize * count), kind
    )


def index_header(path: Path) -> Table | None:
    """The header of an index file of any version, INDEX_HEADER [1]; None: there is none, or it is
    damaged."""
    header = read_items(path, fmt.INDEX_HEADER, 0, 0, 1)
    is_one = bytes(header["magic"][0]) == fmt.INDEX_MAGIC
    fits = int(header["crc"][0]) == fmt.header_crc(header, fmt.INDEX_HEADER_CRC)
    return header if is_one and fits else None


def read_records(directory: Path, geometry: Geometry, shard: int) -> Table:
    """A copy of a shard's records, RECORD [slots]; FREE for those that the file does not have."""
    path = shard_header.slots_path(directory, shard)
    raw = read_at(path, fmt.SHARD_HEADER_BYTES, fmt.RECORD.itemsize * geometry.slots)
    return np.frombuffer(raw, fmt.RECORD)


class OldIndex:
    """Entries of an index file that need not be whole, nor of the size that is wanted."""

    def __init__(self, path: Path, geometry: Geometry) -> None:
        """`geometry` is what the store has, or will have."""
        self._path = path
        self._shards = geometry.shards
        self._slots = geometry.slots
        header = index_header(path)
        self.sound = bool(
            header is not None
            and int(header["version"][0]) in _VERSIONS
            and bytes(header["store_id"][0]).hex() == geometry.store_id
            and int(header["shards"][0]) == geometry.shards
        )
        # Else the size that the store has: only the header may be damaged.
        if header is not None and self.sound:
            self._slots = int(header["slots"][0])

    def entries(self, shard: int) -> Table:
        """A copy of a shard's entries, as far as there are any; `used` is their last use."""
        layout, slots = fmt.index_layout(self._shards, self._slots), self._slots
        entries = read_items(self._path, fmt.ENTRY, layout.entries, slots * shard, slots)
        uses = read_items(self._path, np.dtype("<u8"), layout.uses, slots * shard, slots)
        # No block was used before it was stored: an earlier time, as after a power cut, is that of
        # the slot's block before, and none of an index that has no uses, or lost them.
        entries["used"] = np.maximum(entries["used"], uses)
        return entries

    def counter(self, shard: int, name: str) -> int:
        """One of the counters of a shard that only ever grow; 0 when it cannot be believed."""
        if not self.sound:
            return 0
        raw = read_at(self._path, fmt.BLOCK_ALIGN * (1 + shard), fmt.BLOCK_ALIGN)
        return int(np.frombuffer(raw, fmt.CONTROL)[name][0])

    def looked_up(self) -> tuple[int, int]:
        """Look-ups and hits ever."""
        if not self.sound:
            return 0, 0
        raw = read_at(self._path, 0, fmt.INDEX_HEADER.itemsize)
        header = np.frombuffer(raw, fmt.INDEX_HEADER)
        return int(header["lookups"][0]), int(header["hits"][0])


def plan_shard(directory: Path, geometry: Geometry, shard: int, old: OldIndex | None) -> ShardPlan:
    """The new entries of a shard; changes nothing."""
    records = read_records(directory, geometry, shard)
    listed = np.count_nonzero(recovery.states_of(records) == fmt.LIVE)
    within = _slots_within(directory, geometry, shard)
    entries = np.zeros(geometry.slots, fmt.ENTRY)
    entries[:within] = recovery.entries_of(records[:within], geometry.page_bytes)
    live = np.flatnonzero(recovery.states_of(entries) == fmt.LIVE)
    kept = 0
    if old is not None:
        kept = _keep_order(entries, live, old.entries(shard))
    return ShardPlan(entries, kept, int(listed - live.size))


def pinned_slots(directory: Path, geometry: Geometry, shard: int) -> int:
    """Slots of a shard's pinned blocks, as its records say."""
    entries = plan_shard(directory, geometry, shard, None).entries
    return pinned_among(entries, geometry.page_bytes)[1]


def _slots_within(directory: Path, geometry: Geometry, shard: int) -> int:
    """Slots that the data file really has: a file that was cut short has lost the others."""
    try:
        size = shard_header.data_path(directory, shard).stat().st_size
    except FileNotFoundError:
        return 0
    return max(0, min(geometry.slots, (size - fmt.SHARD_HEADER_BYTES) // geometry.page_bytes))


def same_block(a: Table, b: Table) -> npt.NDArray[np.bool_]:
    """Where two tables of entries or records, of one length, tell of the same stored block."""
    same = (recovery.states_of(a) == fmt.LIVE) & (recovery.states_of(b) == fmt.LIVE)
    for name in ("low", "high", "checksum", "nbytes", "run", "next_run"):
        same &= a[name] == b[name]
    return np.asarray(same)


def _keep_order(entries: Table, live: npt.NDArray[np.intp], old: Table) -> int:
    live = live[live < len(old)]
    live = live[same_block(entries[live], old[live])]
    used = old["used"][live]  # an imported block was last used before it was written here
    known = (used > 0) & (used <= np.uint64(time.time_ns() + _CLOCK_SLACK_NS))
    entries["used"][live[known]] = used[known]
    return int(np.count_nonzero(known))


def fill(file: IndexFile, plans: Iterable[ShardPlan], old: OldIndex | None) -> int:
    """Fill a new index, one plan a shard; returns its blocks."""
    blocks = 0
    for shard, plan in enumerate(plans):
        blocks += recovery.fill_shard(file, shard, plan.entries)
        if old is not None:
            for name in _COUNTERS:
                file.control[name][shard] = old.counter(shard, name)
    if old is not None:
        file.header["lookups"][0], file.header["hits"][0] = old.looked_up()
    return blocks


def clear_unlisted(directory: Path, file: IndexFile, shard: int) -> None:
    """Clear the records of a shard that its new index does not list.

    Others will write over their slots, and may be gone in their turn when another new index is
    made: it must not come upon these then.
    """
    records = read_records(directory, file.geometry, shard)
    free = recovery.states_of(file.of_shard(shard).entries) == fmt.FREE
    unlisted = np.flatnonzero(free & (recovery.states_of(records) != fmt.FREE))
    clear_records(directory, shard, unlisted)


def clear_records(directory: Path, shard: int, slots: npt.NDArray[np.intp]) -> None:
    """Make the records of these slots FREE; the slots file need not be mapped, nor be there when
    there is none to clear."""
    if not slots.size:
        return
    descriptor = store_files.open_file(shard_header.slots_path(directory, shard), os.O_WRONLY)
    try:
        for slot in slots.tolist():
            at = fmt.SHARD_HEADER_BYTES + slot * fmt.RECORD.itemsize + _TAG_AT
            os.pwrite(descriptor, bytes(8), at)  # a tag is FREE
    finally:
        os.close(descriptor)
