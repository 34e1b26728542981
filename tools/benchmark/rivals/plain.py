"""Plain `pwritev` and `preadv`, the least that one can do."""

from __future__ import annotations

import os
from typing import Any

from benchmark.rivals.base import Pages, Rival

_IOV_MAX = 1024


class PlainFile(Rival):
    """One preallocated file; block n lies at n times the block's size, straight from the pages."""

    name = "pwritev/preadv"
    how = "a process a worker; overwrites one preallocated file in place"
    lacks = "no index, no checksum, no eviction, no other block size, nothing safe from a kill"

    def open(self) -> None:
        self._file = os.open(self.directory / "file", os.O_RDWR | os.O_CREAT, 0o600)
        os.posix_fallocate(self._file, 0, self.setup.plan.nbytes)
        self._block = self.setup.plan.shape.block_bytes

    def _at(self, name: str) -> int:
        return int(name[16:], 16) * self._block

    def write(self, hashes: list[Any], pages: Pages) -> None:
        for name, rows in zip(hashes, pages, strict=True):
            parts = [self.memory[row] for row in rows[:_IOV_MAX]]
            if os.pwritev(self._file, parts, self._at(name)) != self._block:
                raise OSError("a short write")

    def read(self, hashes: list[Any], pages: Pages) -> None:
        for name, rows in zip(hashes, pages, strict=True):
            parts = [self.memory[row] for row in rows[:_IOV_MAX]]
            if os.preadv(self._file, parts, self._at(name)) != self._block:
                raise OSError("a short read")

    def close(self) -> None:
        os.close(self._file)
