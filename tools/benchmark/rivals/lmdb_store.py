"""lmdb: a B+ tree in a mapped file, one writer at a time."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmark.rivals.base import NotInstalledError, Pages, Rival, gather, page_aligned

_BATCH_BYTES = 32 << 20  # a transaction


class Lmdb(Rival):
    """Values are whole blocks; what is replaced is deleted, so that its pages are used again."""

    name = "lmdb"
    package = "lmdb"
    how = "a process a worker on one environment (sync=False, writemap=True); reuses its pages"
    lacks = "no checksum, no eviction, one writer at a time"
    in_place = True

    def open(self) -> None:
        try:
            import lmdb
        except ImportError as err:
            raise NotInstalledError(str(err)) from err
        shape = self.setup.plan.shape
        # Room for two generations: pages that a transaction frees are used by later ones.
        size = 3 * self.setup.plan.nbytes + (256 << 20)
        self._env = lmdb.open(
            str(self.directory), map_size=size, sync=False, metasync=False, writemap=True
        )
        self._buffer = page_aligned(shape.block_bytes).reshape(shape.pages, shape.page_bytes)
        self._batch = max(1, _BATCH_BYTES // shape.block_bytes)

    def write(self, hashes: list[Any], pages: Pages) -> None:
        for at in range(0, len(hashes), self._batch):
            with self._env.begin(write=True) as transaction:
                for name, rows in zip(
                    hashes[at : at + self._batch], pages[at : at + self._batch], strict=True
                ):
                    gather(self.memory, rows, self._buffer)
                    transaction.put(bytes.fromhex(name), self._buffer.data)

    def read(self, hashes: list[Any], pages: Pages) -> None:
        with self._env.begin(buffers=True) as transaction:
            for name, rows in zip(hashes, pages, strict=True):
                value = np.frombuffer(transaction.get(bytes.fromhex(name)), np.uint8)
                self.memory[rows] = value.reshape(len(rows), -1)

    def delete(self, hashes: list[Any]) -> None:
        with self._env.begin(write=True) as transaction:
            for name in hashes:
                transaction.delete(bytes.fromhex(name))

    def close(self) -> None:
        self._env.close()
