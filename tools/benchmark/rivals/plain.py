"""Plain `pwritev` and `preadv`, the least that one can do."""

from __future__ import annotations

import os
from typing import Any

from benchmark.rivals.base import Pages, Rival
from benchmark.rivals.own_files import OwnFiles

_IOV_MAX = 1024


class PlainFile(Rival):
    """Every block has its place in a preallocated file, straight from and to the pages."""

    name = "pwritev/preadv"
    how = "a process a worker; overwrites preallocated files in place, as many as LightMem has"
    lacks = "no index, no checksum, no eviction, no other block size, nothing safe from a kill"
    in_place = True

    def open(self) -> None:
        self._files = OwnFiles(self.setup)

    def write(self, hashes: list[Any], pages: Pages) -> None:
        self._each(os.pwritev, hashes, pages)

    def read(self, hashes: list[Any], pages: Pages) -> None:
        self._each(os.preadv, hashes, pages)

    def _each(self, call: Any, hashes: list[Any], pages: Pages) -> None:
        files = self._files
        for name, rows in zip(hashes, pages, strict=True):
            parts = [self.memory[row] for row in rows[:_IOV_MAX]]
            file, slot = files.place(name)
            if call(files.descriptors[file], parts, slot * files.block) != files.block:
                raise OSError(f"a short {call.__name__}")

    def close(self) -> None:
        self._files.close()
