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
from light_mem.engine.cold_reads import ColdReads
from light_mem.engine.copy import (
    Copier,
    FileSink,
    MappedSink,
    Sink,
    is_one_piece,
    new_checksum,
)
from light_mem.engine.dirty_pages import DirtyPages
from light_mem.engine.first_touch import FirstTouch
from light_mem.engine.places import Rows
from light_mem.engine.program import environment
from light_mem.engine.read_ahead import Span


def _never() -> bool:
    return False


class Bare(Rival):
    """Block n lies at n times the block's size in one mapped file; its sum is kept in memory.

    The ways of a worker: what is not dirty is written by `pwrite`, the first read after an open is
    `preadv`; all else goes through the mapping.
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
        self._copier, self._cold, self._touch = Copier(), ColdReads(), FirstTouch()
        self._written: dict[int, float] = {}  # see DirtyPages
        self._dirty = DirtyPages()
        self._was_read: set[int] = set()
        self._sums: dict[str, int] = {}

    def write(self, hashes: list[Any], pages: Pages) -> None:
        for name, rows in zip(hashes, pages, strict=True):
            at = int(name[16:], 16) * self._block
            place, now = Rows(self.memory, rows), time.monotonic()
            written = self._written.get(at, 0.0)
            if self._dirty.need_no_fault(self._file, at, self._block, written, now):
                sink: Sink = MappedSink(self._bytes[at : at + self._block])
            else:
                sink = FileSink(self._file, at)
            if is_one_piece(place):
                self._sums[name] = self._copier.gather_whole(at, 0, place, sink)
            else:
                checksum = new_checksum(at, 0)
                self._copier.gather(place, sink, checksum, _never)
                self._sums[name] = checksum.intdigest()
            self._written[at] = -now if sink.reads_first else now

    def read(self, hashes: list[Any], pages: Pages) -> None:
        for name, rows in zip(hashes, pages, strict=True):
            at = int(name[16:], 16) * self._block
            checksum = new_checksum(at, 0)
            place, slots = Rows(self.memory, rows), self._bytes[at : at + self._block]
            if at in self._was_read:
                self._copier.scatter(slots, place, checksum, _never)
            else:
                self._was_read.add(at)
                self._touch.before_stores([place])
                self._cold.read(Span(self._file, at, self._block), place, _never)
                checksum.update(slots.data)
            found, wanted = checksum.intdigest(), self._sums.get(name)
            if wanted is not None and found != wanted:  # None: written before the last open
                raise OSError("another checksum than that of what was written")

    def close(self) -> None:
        os.close(self._file)
        del self._bytes
