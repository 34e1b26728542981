"""LightMem's copies and checksums without all else: what bounds it."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from benchmark.plan import Plan
from benchmark.rivals import BARE
from benchmark.rivals.base import Pages, Rival
from light_mem.engine import page_cache
from light_mem.engine.copy import new_checksum
from light_mem.engine.direct_reads import DirectReads
from light_mem.engine.first_touch import FirstTouch
from light_mem.engine.gather import Gatherer
from light_mem.engine.groups import groups
from light_mem.engine.mapped_writes import MappedWrites
from light_mem.engine.pieces import is_put_straight
from light_mem.engine.places import Rows
from light_mem.engine.program import environment
from light_mem.engine.read_ahead import Span, open_direct
from light_mem.engine.scatter import Scatterer


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
        self._gatherer, self._scatterer, self._touch = Gatherer(), Scatterer(), FirstTouch()
        self._past = DirectReads(plan.shape.page_bytes)
        blocks = plan.nbytes // self._block
        self._writes = MappedWrites(mapping, self._file, 0, blocks, self._block)
        self._was_read = False
        self._sums: dict[str, int] = {}

    def write(self, hashes: list[Any], pages: Pages) -> None:
        writes = self._writes
        places = [Rows(self.memory, rows) for rows in pages]
        for group in self._groups(len(hashes)):
            self._touch.before_copies([places[n] for n in group], is_put_straight)
            numbers = [self._start_of(hashes[n]) // self._block for n in group]
            writes.begin(time.monotonic())
            sinks = [writes.sink(number, 1) for number in numbers]
            planned = self._gatherer.plan(
                [
                    (number, 0, [(places[n], sink)])
                    for n, number, sink in zip(group, numbers, sinks, strict=True)
                ]
            )
            writes.start()
            sums = planned.run()
            for n, number, sink, found in zip(group, numbers, sinks, sums, strict=True):
                writes.was_put(number, 1, sink)
                self._sums[hashes[n]] = found

    def read(self, hashes: list[Any], pages: Pages) -> None:
        cold = self._cold(hashes)
        self._past.plan(list(cold.values()))
        places = [Rows(self.memory, rows) for rows in pages]
        for group in self._groups(len(hashes)):
            names = [hashes[n] for n in group]
            starts = [self._start_of(name) for name in names]
            checksums = [new_checksum(at // self._block, 0) for at in starts]
            moves = []
            for n, name, at, checksum in zip(group, names, starts, checksums, strict=True):
                if name in cold:
                    self._touch.before_copies([places[n]])
                    self._past.read(cold[name], self._scatterer, places[n], checksum, None)
                else:
                    slots = self._bytes[at : at + self._block]
                    moves.append((places[n], slots, checksum))
            self._scatterer.scatter(moves)
            for name, checksum in zip(names, checksums, strict=True):
                wanted = self._sums.get(name)
                if wanted is not None and checksum.intdigest() != wanted:
                    # None: written before the last open
                    raise OSError("another checksum than that of what was written")

    def _groups(self, count: int) -> Iterator[Sequence[int]]:
        return groups(range(count), [self._block] * count)

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
