"""diskcache: SQLite for small values and the index, a file for each large value."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmark.rivals.base import NotInstalledError, Pages, Rival, gather, page_aligned


class DiskCache(Rival):
    """A FanoutCache of eight shards, as its documentation advises for several writers."""

    name = "diskcache"
    package = "diskcache"
    how = "a process a worker on one FanoutCache; a new file a block"
    lacks = "no checksum; its own eviction is not reached here"

    def open(self) -> None:
        try:
            import diskcache
        except ImportError as err:
            raise NotInstalledError(str(err)) from err
        shape = self.setup.plan.shape
        # The limit is split over the shards, and few large blocks may all fall on one of them.
        limit = 8 * (2 * self.setup.plan.nbytes + (64 << 20))
        self._cache = diskcache.FanoutCache(
            str(self.directory), shards=8, timeout=60, size_limit=limit
        )
        self._buffer = page_aligned(shape.block_bytes).reshape(shape.pages, shape.page_bytes)

    def write(self, hashes: list[Any], pages: Pages) -> None:
        for name, rows in zip(hashes, pages, strict=True):
            gather(self.memory, rows, self._buffer)
            if not self._cache.set(name, self._buffer.tobytes(), retry=True):
                raise RuntimeError("diskcache did not store a block")

    def read(self, hashes: list[Any], pages: Pages) -> None:
        for name, rows in zip(hashes, pages, strict=True):
            value = np.frombuffer(self._cache.get(name, retry=True), np.uint8)
            self.memory[rows] = value.reshape(len(rows), -1)

    def delete(self, hashes: list[Any]) -> None:
        for name in hashes:
            self._cache.delete(name, retry=True)

    def close(self) -> None:
        self._cache.close()
