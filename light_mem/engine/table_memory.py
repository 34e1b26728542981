"""The memory of a task table, as one process maps it, and the rings of blocks that wait in it."""

from __future__ import annotations

import mmap
import os
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from light_mem.engine import histogram
from light_mem.engine.futex import FutexWords
from light_mem.engine.histogram import Histograms
from light_mem.engine.table_layout import (
    CELL,
    CLIENT_LANES,
    HEADER,
    INITIAL,
    LANE,
    MAGIC,
    MAX_WORKERS,
    PAGES_PER_CELL,
    READ,
    ROW,
    WORKER,
    WRITE,
    words_of,
)
from light_mem.errors import ServiceClosedError
from light_mem.index.format import align

_HEADER = words_of(HEADER)
_HEADS = {READ: _HEADER["read_head"], WRITE: _HEADER["write_head"]}
_TO_WAKE = _HEADER["to_wake"]
_TAILS = {READ: _HEADER["read_tail"], WRITE: _HEADER["write_tail"]}


class Sizes(NamedTuple):
    """Capacities, a lane."""

    lanes: int
    rows: int
    cells: int
    pages: int

    @classmethod
    def for_blocks(cls, max_blocks: int) -> Sizes:
        """Sizes of a table whose processes may each have `max_blocks` blocks in tasks."""
        return cls(1 + CLIENT_LANES, max_blocks, max_blocks, max_blocks * PAGES_PER_CELL)


class TableMemory:
    """A mapped table. Layout: header, lanes, workers, rows, active, states, cells, pages, rings,
    latencies: a histogram a worker and mode, from `create` to ready."""

    def __init__(self, fd: int, sizes: Sizes | None, path: str = "", writable: bool = True) -> None:
        """`writable=False`: for those who only look; they can neither wait nor wake."""
        self.fd = fd
        self.path = path
        create = sizes is not None
        if sizes is None:
            with mmap.mmap(fd, align(HEADER.itemsize), access=mmap.ACCESS_READ) as first:
                header = np.frombuffer(bytes(first[: HEADER.itemsize]), HEADER)
            if bytes(header["magic"][0]) != MAGIC:
                raise ServiceClosedError("there is no task table at that address any more")
            sizes = Sizes(*(int(header[f][0]) for f in ("lanes", "rows", "cells", "pages")))
        self.sizes = sizes
        at = [0]

        def place(nbytes: int) -> int:
            start = at[0]
            at[0] = align(start + nbytes)
            return start

        lanes, rows, cells, pages = sizes
        self.ring_length = 2 * lanes * cells  # a cell may be queued again after a worker's death
        header_at, lanes_at = place(HEADER.itemsize), place(lanes * LANE.itemsize)
        workers_at, self.rows_at = (
            place(MAX_WORKERS * WORKER.itemsize),
            place(lanes * rows * ROW.itemsize),
        )
        self.active_at, self.states_at = place(lanes * rows), place(lanes * cells)
        self._cells_at, pages_at = place(lanes * cells * CELL.itemsize), place(lanes * pages * 4)
        read_at, write_at = place(self.ring_length * 4), place(self.ring_length * 4)
        latencies = MAX_WORKERS * 2 * histogram.WORDS * histogram.WORD_BYTES
        latencies_at = place(latencies)
        self.nbytes = at[0]
        if create and os.fstat(fd).st_size < self.nbytes:
            os.ftruncate(fd, self.nbytes)  # pages come when they are touched
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        self.map = mmap.mmap(fd, self.nbytes, access=access)
        self.header = np.frombuffer(self.map, HEADER, 1, header_at)
        self.lanes = np.frombuffer(self.map, LANE, lanes, lanes_at)
        self.workers = np.frombuffer(self.map, WORKER, MAX_WORKERS, workers_at)
        self.rows = np.frombuffer(self.map, ROW, lanes * rows, self.rows_at)
        self.states = np.frombuffer(self.map, np.uint8, lanes * cells, self.states_at)
        self.active = np.frombuffer(self.map, np.uint8, lanes * rows, self.active_at)
        self.cells = np.frombuffer(self.map, CELL, lanes * cells, self._cells_at)
        self.pages = np.frombuffer(self.map, "<u4", lanes * pages, pages_at)
        self.rings = {
            READ: np.frombuffer(self.map, "<u4", self.ring_length, read_at),
            WRITE: np.frombuffer(self.map, "<u4", self.ring_length, write_at),
        }
        if writable:
            self.futex = FutexWords(self.map)
        self.work_word = header_at + HEADER.fields["work_seq"][1]  # type: ignore[index]
        self.done_word = header_at + HEADER.fields["done_seq"][1]  # type: ignore[index]
        self._row_done = ROW.fields["done"][1]  # type: ignore[index]
        self._abort = self.rows["abort"]
        self._modes = self.cells["mode"]
        self.generations = self.rows["generation"]
        self._row_start, self._row_count = self.rows["start"], self.rows["count"]
        self._row_done_words, self._done_seq = self.rows["done"], self.header["done_seq"]
        self._worker_done = self.workers["done"]
        words = memoryview(self.map)
        shutdown_at = header_at + HEADER.fields["shutdown"][1]  # type: ignore[index]
        self._shutdown = words[shutdown_at : shutdown_at + 4].cast("I")
        self._worker_words = words[workers_at : workers_at + self.workers.nbytes].cast("Q")
        self._header_words = words[header_at : header_at + HEADER.itemsize].cast("Q")
        self.latencies = Histograms(words[latencies_at : latencies_at + latencies].cast("Q"))
        self._active_bytes = words[self.active_at : self.active_at + lanes * rows]
        rows_end = self.rows_at + lanes * rows * ROW.itemsize
        self._row_words = words[self.rows_at : rows_end].cast("Q")

    def depth(self, mode: int) -> int:
        """Entries of a mode's ring from the first on that waits for a worker: also of blocks that
        were aborted or claimed since. No lock, no system call."""
        return self.tail(mode) - self.head(mode)

    def head(self, mode: int) -> int:
        """Where a mode's ring begins: the first entry that may wait for a worker."""
        return int(self._header_words[_HEADS[mode]])

    def tail(self, mode: int) -> int:
        """Where the next entry of a mode's ring goes."""
        return int(self._header_words[_TAILS[mode]])

    def move_head(self, mode: int, head: int) -> None:
        """With the queue in hand."""
        self._header_words[_HEADS[mode]] = head

    def move_tail(self, mode: int, tail: int) -> None:
        """With the queue in hand."""
        self._header_words[_TAILS[mode]] = tail

    @property
    def to_wake(self) -> int:
        """How many workers the one that is woken is to wake."""
        return int(self._header_words[_TO_WAKE])

    @to_wake.setter
    def to_wake(self, count: int) -> None:
        self._header_words[_TO_WAKE] = count

    def queued(self, mode: int) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.bool_]]:
        """Entries of a mode's ring from its head on: cells, and whether each waits for a worker in
        this mode. An entry stays when its block is aborted, and the cell may be another task's by
        then. No lock, no system call."""
        cells = self.rings[mode][np.arange(self.head(mode), self.tail(mode)) % self.ring_length]
        return cells, (self.states[cells] == INITIAL) & (self._modes[cells] == mode)

    def waiting(self, mode: int) -> int:
        """Blocks of a mode that wait for a worker, about now. No lock, no system call."""
        return int(np.count_nonzero(self.queued(mode)[1]))
