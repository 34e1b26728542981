"""LightMem's copies and checksums without all else: what bounds it."""

from __future__ import annotations

import mmap
import os
import time
from typing import Any

import numpy as np

from benchmark.plan import Plan
from benchmark.rivals import BARE
from benchmark.rivals.base import Pages, Rival
from light_mem.engine import page_cache
from light_mem.engine.copy import Copier, new_checksum
from light_mem.engine.direct_reads import DirectReads
from light_mem.engine.first_touch import FirstTouch
from light_mem.engine.mapped_writes import MappedWrites
from light_mem.engine.pieces import is_one_piece, is_put_straight
from light_mem.engine.places import Rows
from light_mem.engine.program import environment
from light_mem.engine.read_ahead import Span, open_direct


def _never() -> bool:
    return False


class Bare(Rival):
    """Block n lies at n times the block's size in one mapped file; its sum is kept in memory.

    The ways of a worker: what is not dirty is written by `pwrite`, what is not in the page cache is
    read past it; all else goes through the mapping.
    """

    name = BARE
    how = "a process a worker; a worker's copies and checksums into one mapped file, in place"
    lacks = "no index, no eviction, no states, no tasks, nothing safe from a kill"

    @classmethod
    def environment(cls, plan: Plan) -> dict[str, str]:
        tunables = environment({})["GLIBC_TUNABLES"]
        return {"GLIBC_TUNABLES": tunables}

    def open(self) -> None:
        plan = self.setup.plan
        self._block = plan.shape.block_bytes
        self._file = os.open(self.directory / "file", os.O_RDWR | os.O_CREAT, 0o600)
        os.posix_fallocate(self._file, 0, plan.nbytes)
        mapping = mmap.mmap(self._file, plan.nbytes)
        self._bytes = np.frombuffer(mapping, np.uint8)
        self._address = self._bytes.ctypes.data
        self._direct = open_direct(self.directory / "file", self._file)
        self._copier, self._touch = Copier(), FirstTouch()
        self._past = DirectReads(plan.shape.page_bytes)
        blocks = plan.nbytes // self._block
        self._writes = MappedWrites(mapping, self._file, 0, blocks, self._block)
        self._was_read = False
        self._sums: dict[str, int] = {}

    def write(self, hashes: list[Any], pages: Pages) -> None:
        for name, rows in zip(hashes, pages, strict=True):
            at = self._start_of(name)
            place, now = Rows(self.memory, rows), time.monotonic()
            sink = self._writes.sink(at // self._block, 1, now)
            if is_put_straight(place):
                self._touch.before_copies([place])
            if is_one_piece(place):
                self._sums[name] = self._copier.gather_whole(at, 0, place, sink)
            else:
                checksum = new_checksum(at, 0)
                self._copier.gather(place, sink, checksum, _never)
                self._sums[name] = checksum.intdigest()
            self._writes.was_put(at // self._block, 1, now, sink)

    def read(self, hashes: list[Any], pages: Pages) -> None:
        cold = self._cold(hashes)
        self._past.plan(list(cold.values()))
        for name, rows in zip(hashes, pages, strict=True):
            at = self._start_of(name)
            checksum, place = new_checksum(at, 0), Rows(self.memory, rows)
            if name in cold:
                self._touch.before_copies([place])
                self._past.read(cold[name], self._copier, place, checksum, _never)
            else:
                slots = self._bytes[at : at + self._block]
                self._copier.scatter(slots, place, checksum, _never)
            found, wanted = checksum.intdigest(), self._sums.get(name)
            if wanted is not None and found != wanted:  # None: written before the last open
                raise OSError("another checksum than that of what was written")

    def _start_of(self, name: str) -> int:
        return int(name[16:], 16) * self._block

    def _cold(self, names: list[Any]) -> dict[Any, Span]:
        """Those that are not in the page cache. After the first read of an open store all are
        there, or came past it: then nobody asks."""
        if self._direct < 0 or self._was_read:
            return {}
        self._was_read = True
        starts = {name: self._start_of(name) for name in names}
        return {
            name: Span(self._direct, at, self._block)
            for name, at in starts.items()
            if not page_cache.holds(self._address + at + self._block - 1, 1)
        }

    def close(self) -> None:
        self._past.close()
        for descriptor in (self._file, self._direct):
            if descriptor >= 0:
                os.close(descriptor)
        del self._bytes
