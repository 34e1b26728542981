"""The index file, mapped: arrays over its sections, shared by all processes of the store.

One file holds the index of every shard, so that a look-up of many keys walks one set of arrays
whatever shards they belong to; each shard has its own control page, heads and entries in it, and
its own lock. The file is expendable: `recovery.py` makes it anew from the slots files.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from light_mem.index import format as fmt
from light_mem.index import store_files
from light_mem.index.description import Geometry, sync_directory
from light_mem.index.room import allocate

NAME = "index"
_LOOKUPS_WORD, _HITS_WORD = (fmt.INDEX_HEADER.fields[f][1] // 8 for f in ("lookups", "hits"))  # type: ignore[index]


def boot_id() -> bytes:
    """16 bytes that name this run of the kernel; zeros where there is none (macOS)."""
    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_text()
        return bytes.fromhex(text.strip().replace("-", ""))
    except (OSError, ValueError):
        return bytes(16)


class ShardSections(NamedTuple):
    """What one shard has of the index file: not copies."""

    control: npt.NDArray[np.void]  # CONTROL [1]
    heads: npt.NDArray[np.uint32]  # [buckets]
    entries: npt.NDArray[np.void]  # ENTRY [slots]
    uses: npt.NDArray[np.uint64]  # [slots]


class IndexFile:
    """The mapped file. Single aligned stores are atomic; everything else is under a shard's lock.

    heads    uint32 [shards * buckets]: first slot + 1 of a bucket's chain, 0: empty
    entries  ENTRY [shards * slots]: the entry of a block is the one of its first slot
    uses     uint64 [shards * slots]: when the block of that entry was last used, ns since 1970
    words32, words64: the whole file as machine words, for scalar access from Python
    """

    def __init__(self, path: Path, geometry: Geometry, writable: bool = True) -> None:
        """Map it; raises FileNotFoundError, IndexUnusable, StoreFormatError (a symlink). Tools that
        only look do not write."""
        g = geometry
        self.path = path
        self.geometry = g
        self.shards = g.shards
        self.slots = g.slots
        self.buckets = fmt.buckets_for(g.slots)
        layout = fmt.index_layout(g.shards, g.slots)
        descriptor = store_files.open_file(path, os.O_RDWR if writable else os.O_RDONLY)
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        try:
            size = os.fstat(descriptor).st_size
            if size < fmt.BLOCK_ALIGN:
                raise IndexUnusable(f"{path} is shorter than a header")
            self.map = mmap.mmap(descriptor, min(size, layout.size), access=access)
        finally:
            os.close(descriptor)
        self.header = np.frombuffer(self.map, fmt.INDEX_HEADER, 1)
        self._check_header()
        if size < layout.size:
            raise IndexUnusable(f"{path} is shorter than its {layout.size} bytes")
        self.control = np.frombuffer(self.map, fmt.CONTROL, g.shards, layout.control)
        self.heads = np.frombuffer(self.map, "<u4", g.shards * self.buckets, layout.heads)
        self.entries = np.frombuffer(self.map, fmt.ENTRY, g.shards * g.slots, layout.entries)
        self.uses = np.frombuffer(self.map, "<u8", g.shards * g.slots, layout.uses)
        view = memoryview(self.map)
        self.words32 = view.cast("I")
        self.words64 = view.cast("Q")
        self.unlinks_word = (layout.control + fmt.CONTROL.fields["unlinks"][1]) // 8  # type: ignore[index]
        self.heads_word = layout.heads // 4
        self.entries_word32 = layout.entries // 4
        self.entries_word64 = layout.entries // 8
        self.uses_word = layout.uses // 8

    def of_shard(self, shard: int) -> ShardSections:
        """The sections, as far as they are one shard's."""
        slots = slice(shard * self.slots, (shard + 1) * self.slots)
        buckets = slice(shard * self.buckets, (shard + 1) * self.buckets)
        control = self.control[shard : shard + 1]
        return ShardSections(control, self.heads[buckets], self.entries[slots], self.uses[slots])

    def _check_header(self) -> None:
        header, g = self.header, self.geometry
        if bytes(header["magic"][0]) != fmt.INDEX_MAGIC:
            raise IndexUnusable(f"{self.path} does not begin like an index")
        if int(header["version"][0]) != fmt.INDEX_VERSION:
            raise IndexUnusable(f"{self.path} has version {int(header['version'][0])}")
        if int(header["crc"][0]) != fmt.header_crc(header, fmt.INDEX_HEADER_CRC):
            raise IndexUnusable(f"{self.path} has a damaged header")
        found = (
            bytes(header["store_id"][0]),
            int(header["page_bytes"][0]),
            int(header["shards"][0]),
            int(header["slots"][0]),
            int(header["buckets"][0]),
        )
        wanted = (bytes.fromhex(g.store_id), g.page_bytes, g.shards, g.slots, self.buckets)
        if found != wanted:
            raise IndexUnusable(f"{self.path} is the index of another store or size")

    @property
    def trustworthy(self) -> bool:
        """Whether the kernel that last wrote this file still runs, or the file was synced.

        After a power cut the file may mix pages of different times.
        """
        return bool(self.header["clean"][0]) or (
            bytes(self.header["boot_id"][0]) == boot_id() != bytes(16)
        )

    def mark_open(self) -> None:
        """Pages of this file may from now on be newer in memory than on the device."""
        if self.header["clean"][0] or bytes(self.header["boot_id"][0]) != boot_id():
            self.header["boot_id"][0] = boot_id()
            self.header["clean"][0] = 0
            self.map.flush(0, fmt.BLOCK_ALIGN)

    def mark_clean(self) -> None:
        """The last owner leaves: sync the file, then mark it clean."""
        self.map.flush()
        self.header["clean"][0] = 1
        self.map.flush(0, fmt.BLOCK_ALIGN)

    def count(self, lookups: int, hits: int) -> None:
        """Add to the statistics of look-ups; two processes at once may lose an addition."""
        words = self.words64  # damage may have left any number there
        words[_LOOKUPS_WORD] = words[_LOOKUPS_WORD] + lookups & fmt.WORD_MASK
        words[_HITS_WORD] = words[_HITS_WORD] + hits & fmt.WORD_MASK

    def close(self) -> None:
        """Let go of the mapping once nobody holds an array over it."""
        self.words32.release()
        self.words64.release()


class IndexUnusable(Exception):
    """Internal: the index must be made anew; never leaves the package."""


def temporary_path(directory: Path) -> Path:
    """Where this process makes an index; what a killed one left there goes at the next open."""
    return directory / f"{NAME}.{os.getpid()}.tmp"


def create(directory: Path, geometry: Geometry) -> Path:
    """Make an empty index under a temporary name; `publish` gives it its own.

    Room is allocated, so that a store to the mapping cannot die of a full disk (SIGBUS).
    """
    temporary = temporary_path(directory)
    size = fmt.index_layout(geometry.shards, geometry.slots).size
    header = np.zeros(1, fmt.INDEX_HEADER)
    header["magic"] = fmt.INDEX_MAGIC
    header["version"] = fmt.INDEX_VERSION
    header["store_id"] = bytes.fromhex(geometry.store_id)
    header["page_bytes"] = geometry.page_bytes
    header["shards"] = geometry.shards
    header["slots"] = geometry.slots
    header["buckets"] = fmt.buckets_for(geometry.slots)
    header["crc"] = fmt.header_crc(header, fmt.INDEX_HEADER_CRC)
    header["boot_id"] = boot_id()
    descriptor = store_files.make(temporary)
    try:
        allocate(descriptor, temporary, size)
        os.pwrite(descriptor, header.tobytes(), 0)
    except BaseException:
        os.unlink(temporary)
        raise
    finally:
        os.close(descriptor)
    return temporary


def publish(directory: Path, temporary: Path) -> None:
    """Put a finished index in its place, in one step."""
    os.replace(temporary, directory / NAME)
    sync_directory(directory)
