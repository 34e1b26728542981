"""LightMem's copies and checksums without all else: what bounds it."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from benchmark.plan import Plan
from benchmark.rivals import BARE
from benchmark.rivals.base import Pages, Rival
from benchmark.rivals.own_files import OwnFiles
from light_mem.engine import page_cache
from light_mem.engine.copy import new_checksum
from light_mem.engine.direct_reads import DirectReads
from light_mem.engine.first_touch import FirstTouch
from light_mem.engine.gather import Gatherer
from light_mem.engine.groups import groups
from light_mem.engine.mapped_writes import MappedWrites
from light_mem.engine.pieces import is_put_straight
from light_mem.engine.places import Rows
from light_mem.engine.program import COPY_TUNABLES
from light_mem.engine.read_ahead import Span, open_direct
from light_mem.engine.scatter import Scatterer


class Bare(Rival):
    """Every block has its place in one of as many mapped files as LightMem has shards, each
    process its own; its sum is kept in memory.

    The ways of a worker: what is not dirty is written by `pwrite`, what is not in the page cache is
    read past it; all else goes through the mapping.
    """

    name = BARE
    how = "a process a worker; a worker's copies and checksums into mapped files, in place"
    lacks = "no index, no eviction, no states, no tasks, nothing safe from a kill"
    in_place = True

    @classmethod
    def environment(cls, plan: Plan) -> dict[str, str]:
        return {"GLIBC_TUNABLES": COPY_TUNABLES}

    def open(self) -> None:
        plan = self.setup.plan
        files = self._files = OwnFiles(self.setup)
        mappings = [mmap.mmap(descriptor, files.nbytes) for descriptor in files.descriptors]
        self._bytes = [np.frombuffer(mapping, np.uint8) for mapping in mappings]
        self._direct = [
            open_direct(*each) for each in zip(files.paths, files.descriptors, strict=True)
        ]
        self._gatherer, self._scatterer, self._touch = Gatherer(), Scatterer(), FirstTouch()
        self._past = DirectReads(plan.shape.page_bytes)
        self._writes = [
            MappedWrites(*each, 0, files.slots, files.block)
            for each in zip(mappings, files.descriptors, strict=True)
        ]
        self._was_read = False
        self._sums: dict[str, int] = {}

    def write(self, hashes: list[Any], pages: Pages) -> None:
        places = [Rows(self.memory, rows) for rows in pages]
        for group in self._groups(hashes):
            self._touch.before_copies([places[n] for n in group], is_put_straight)
            planned = []
            # As `engine/filling.py`: all is planned, then each file's blocks are copied in turn.
            for file, same in groupby(group, lambda n: self._files.place(hashes[n])[0]):
                mine, writes = list(same), self._writes[file]
                slots = [self._files.place(hashes[n])[1] for n in mine]
                writes.begin(time.monotonic())
                sinks = [writes.sink(slot, 1) for slot in slots]
                blocks = [
                    (slot, file, [(places[n], sink)])
                    for n, slot, sink in zip(mine, slots, sinks, strict=True)
                ]
                planned.append((writes, mine, slots, sinks, self._gatherer.plan(blocks)))
            for writes, mine, slots, sinks, copies in planned:
                writes.start()
                sums = copies.run()
                for n, slot, sink, found in zip(mine, slots, sinks, sums, strict=True):
                    writes.was_put(slot, 1, sink)
                    self._sums[hashes[n]] = found

    def read(self, hashes: list[Any], pages: Pages) -> None:
        read = list(self._groups(hashes))
        cold = self._cold([hashes[n] for group in read for n in group])
        self._past.plan(list(cold.values()))  # in the order in which they are read
        places = [Rows(self.memory, rows) for rows in pages]
        for group in read:
            names = [hashes[n] for n in group]
            found = [self._files.place(name) for name in names]
            checksums = [new_checksum(slot, file) for file, slot in found]
            moves = []
            for n, name, (file, slot), checksum in zip(group, names, found, checksums, strict=True):
                if name in cold:
                    self._touch.before_copies([places[n]])
                    self._past.read(cold[name], self._scatterer, places[n], checksum, None)
                else:
                    at = slot * self._files.block
                    slots = self._bytes[file][at : at + self._files.block]
                    moves.append((places[n], slots, checksum))
            self._scatterer.scatter(moves)
            for name, checksum in zip(names, checksums, strict=True):
                wanted = self._sums.get(name)
                if wanted is not None and checksum.intdigest() != wanted:
                    # None: written before the last open
                    raise OSError("another checksum than that of what was written")

    def _groups(self, names: list[Any]) -> Iterator[Sequence[int]]:
        """Blocks that are copied together, each file's side by side, as in a worker's batch."""
        for group in groups(range(len(names)), [self._files.block] * len(names)):
            yield sorted(group, key=lambda n: self._files.place(names[n])[0])

    def _cold(self, names: list[Any]) -> dict[Any, Span]:
        """Those that are not in the page cache. After the first read of an open store all are
        there, or came past it: then nobody asks."""
        if min(self._direct) < 0 or self._was_read:
            return {}
        self._was_read = True
        cold, block = {}, self._files.block
        for name in names:
            file, slot = self._files.place(name)
            if not page_cache.holds(self._bytes[file].ctypes.data + (slot + 1) * block - 1, 1):
                cold[name] = Span(self._direct[file], slot * block, block)
        return cold

    def close(self) -> None:
        self._past.close()
        self._files.close()
        for descriptor in self._direct:
            if descriptor >= 0:
                os.close(descriptor)
        del self._bytes
