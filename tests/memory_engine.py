"""MemoryStorageEngine: the promises of a storage engine in one process's memory, in a page of code.

A second implementation of `StorageEngine`, which tests compare the local one with.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from light_mem.engine.base import (
    BlockIO,
    Outcome,
    Report,
    Stop,
    StorageEngine,
    check_places,
    never,
)
from light_mem.engine.places import Bytes1D
from light_mem.index.keys import KeyArray
from light_mem.index.runs import slots_needed

Key = tuple[int, int]  # low, high


class MemoryStorageEngine(StorageEngine):
    """Blocks in a dictionary, the least recently used first; exact.

    page_bytes, pages   what the store holds: `pages` pages of `page_bytes` bytes

    What it leaves out: other processes, and everything that outlives this one. Nothing here is
    damaged or lost, so no block has a checksum. Any method, any thread: one lock guards the
    dictionary and is not held while bytes are copied, as blocks are never changed once they are
    stored.
    """

    def __init__(self, page_bytes: int, pages: int) -> None:
        self._page_bytes = page_bytes
        self._pages = pages
        self._guard = threading.Lock()
        self._blocks: OrderedDict[Key, Bytes1D] = OrderedDict()
        self._used = 0
        self._counters = {"evictions": 0, "inserts": 0, "removals": 0}

    def find(
        self, keys: KeyArray, touch: bool = True, nbytes: npt.NDArray[np.int64] | None = None
    ) -> npt.NDArray[np.bool_]:
        with self._guard:
            stored = [self._get(key, touch) for key in map(tuple, keys.tolist())]
        lengths = [-1 if s is None else s.nbytes for s in stored]
        wanted = lengths if nbytes is None else nbytes.tolist()
        return np.array(
            [has >= 0 and has == want for has, want in zip(lengths, wanted, strict=True)], np.bool_
        )

    def write(self, batch: Sequence[BlockIO], report: Report, stop: Stop = never) -> None:
        check_places(batch, self._page_bytes)
        for at, block in enumerate(batch):
            report([at], self._write_one(at, block, report, stop))

    def _write_one(self, at: int, block: BlockIO, report: Report, stop: Stop) -> Outcome:
        key = block.low, block.high
        with self._guard:
            if self._has(block):
                return Outcome.PRESENT
        if self._pages_of(block.nbytes) > self._pages:
            return Outcome.NO_ROOM
        stored = np.empty(block.nbytes, np.uint8)
        if not _copy(block, stored, at, stop, to_memory=False):
            return Outcome.STOPPED
        report([at], Outcome.COPIED)
        with self._guard:
            if self._has(block):
                return Outcome.PRESENT
            if key in self._blocks:  # of another length
                self._remove([key])
            while self._used + self._pages_of(len(stored)) > self._pages:
                self._used -= self._pages_of(len(self._blocks.popitem(last=False)[1]))
                self._counters["evictions"] += 1
            self._blocks[key] = stored
            self._used += self._pages_of(len(stored))
            self._counters["inserts"] += 1
        return Outcome.STORED

    def read(self, batch: Sequence[BlockIO], report: Report, stop: Stop = never) -> None:
        check_places(batch, self._page_bytes)
        for at, block in enumerate(batch):
            with self._guard:
                stored = self._get((block.low, block.high), touch=True)
            if stored is None or len(stored) != block.nbytes:
                outcome = Outcome.MISSING
            elif _copy(block, stored, at, stop, to_memory=True):
                outcome = Outcome.LOADED
            else:
                outcome = Outcome.STOPPED
            report([at], outcome)

    def delete(self, keys: KeyArray) -> int:
        wanted = set(map(tuple, keys.tolist()))
        with self._guard:
            return self._remove([key for key in self._blocks if key in wanted])

    def clear(self) -> int:
        with self._guard:
            return self._remove(list(self._blocks))

    def stats(self) -> dict[str, int]:
        with self._guard:
            blocks, used = len(self._blocks), self._used
            return {"blocks": blocks, "used_slots": used, "slots": self._pages, **self._counters}

    def close(self) -> None:
        """Nothing to let go of: what is stored stays, for as long as this object does."""

    def _pages_of(self, nbytes: int) -> int:
        return slots_needed(nbytes, self._page_bytes)

    def _get(self, key: Key, touch: bool) -> Bytes1D | None:
        stored = self._blocks.get(key)
        if stored is not None and touch:
            self._blocks.move_to_end(key)
        return stored

    def _has(self, block: BlockIO) -> bool:
        stored = self._get((block.low, block.high), touch=False)
        return stored is not None and len(stored) == block.nbytes

    def _remove(self, stored: list[Key]) -> int:
        for key in stored:
            self._used -= self._pages_of(len(self._blocks.pop(key)))
        self._counters["removals"] += len(stored)
        return len(stored)


def _copy(block: BlockIO, stored: Bytes1D, at: int, stop: Stop, to_memory: bool) -> bool:
    """Copy between a block's place and its stored bytes; False: stopped between two parts."""
    done = 0
    for part in block.place.slices():
        if stop(at):
            return False
        bytes_there = stored[done : done + len(part)]
        if to_memory:
            part[:] = bytes_there
        else:
            bytes_there[:] = part
        done += len(part)
    return True
