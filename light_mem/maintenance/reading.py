"""The bytes of stored blocks, read from outside without a lock: for `dump` and `export`."""

from __future__ import annotations

from typing import NamedTuple

from light_mem.engine import shard_header
from light_mem.maintenance.data import block_at
from light_mem.maintenance.data_file import DataFile
from light_mem.maintenance.inspecting import Listed
from light_mem.maintenance.store import Store


class BlockBytes(NamedTuple):
    """A block's bytes, or why there are none."""

    data: bytes
    problem: str  # "" when the bytes fit their checksum
    changed: bool  # it was taken out or replaced meanwhile: no damage


class BlockReader:
    """Reads blocks of one store; keeps its files open. One thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._files: dict[int, DataFile] = {}

    def read(self, part: Listed, n: int) -> BlockBytes:
        """The n-th block of a shard, checked."""
        slot, entry = int(part.heads[n]), part.rows[n]
        block = block_at(entry, slot, part.runs(n), self._store.geometry.page_bytes)
        try:
            data, problem = self._file(part.shard).load(block)
        except OSError as error:
            data, problem = b"", f"cannot be read: {error.strerror}"
        return BlockBytes(data, problem, not self._store.still_lists(part.shard, slot, entry))

    def _file(self, shard: int) -> DataFile:
        if shard not in self._files:
            path = shard_header.data_path(self._store.directory, shard)
            self._files[shard] = DataFile(path)
        return self._files[shard]

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()
        self._files.clear()
