"""The memory of a task table, as one process maps it, and the rings of blocks that wait in it."""

from __future__ import annotations

import mmap
import os
import struct
from itertools import accumulate
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
    SERVER_GONE,
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
ROW_WORDS = ROW.itemsize // 8
CREATED_WORD = words_of(ROW)["created"]
# The fields of a ROW that a task begins with, which follow each other.
_BEGIN, _BEGIN_AT = struct.Struct("<3I"), ROW.fields["abort"][1]  # type: ignore[index]
assert [ROW.fields[name][1] - _BEGIN_AT for name in ("abort", "start", "count")] == [0, 4, 8]  # type: ignore[index]


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


class Sections(NamedTuple):
    """Byte offsets of the sections of a table, in this order, and its size."""

    header: int
    lanes: int
    workers: int
    rows: int
    active: int
    states: int
    cells: int
    pages: int
    reads: int  # the ring of blocks to read
    writes: int  # ... and to write
    latencies: int  # a histogram a worker and mode, from `create` to ready
    end: int

    @classmethod
    def of(cls, sizes: Sizes) -> Sections:
        """Those of a table of these sizes."""
        lanes, rows, cells, pages = sizes
        ring = ring_length(sizes) * 4
        lengths = (
            HEADER.itemsize,
            lanes * LANE.itemsize,
            MAX_WORKERS * WORKER.itemsize,
            lanes * rows * ROW.itemsize,
            lanes * rows,
            lanes * cells,
            lanes * cells * CELL.itemsize,
            lanes * pages * 4,
            ring,
            ring,
            MAX_WORKERS * 2 * histogram.WORDS * histogram.WORD_BYTES,
        )
        return cls(*accumulate(lengths, lambda at, nbytes: align(at + nbytes), initial=0))


def ring_length(sizes: Sizes) -> int:
    """Entries of a ring: a cell may be queued again after a worker's death."""
    return 2 * sizes.lanes * sizes.cells


class TableMemory:
    """A mapped table: arrays over its `Sections`, and words for scalar access."""

    def __init__(self, fd: int, sizes: Sizes | None, path: str = "", writable: bool = True) -> None:
        """`sizes`: of a table to be made; None: there is one. `writable=False`: for those who only
        look; they can neither wait nor wake. Raises ServiceClosedError when there is no table."""
        self.fd = fd
        self.path = path
        self.sizes = sizes or _read_sizes(fd)
        self.ring_length = ring_length(self.sizes)
        self.sections = Sections.of(self.sizes)
        self.nbytes = self.sections.end
        if sizes is not None and os.fstat(fd).st_size < self.nbytes:
            os.ftruncate(fd, self.nbytes)  # pages come when they are touched
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        self.map = mmap.mmap(fd, self.nbytes, access=access)
        self._map_arrays()
        self._map_words()
        if writable:
            self.futex = FutexWords(self.map)

    def _map_arrays(self) -> None:
        at, (lanes, rows, cells, pages) = self.sections, self.sizes
        self.header = np.frombuffer(self.map, HEADER, 1, at.header)
        self.lanes = np.frombuffer(self.map, LANE, lanes, at.lanes)
        self.workers = np.frombuffer(self.map, WORKER, MAX_WORKERS, at.workers)
        self.rows = np.frombuffer(self.map, ROW, lanes * rows, at.rows)
        self.states = np.frombuffer(self.map, np.uint8, lanes * cells, at.states)
        self.active = np.frombuffer(self.map, np.uint8, lanes * rows, at.active)
        self.cells = np.frombuffer(self.map, CELL, lanes * cells, at.cells)
        self.pages = np.frombuffer(self.map, "<u4", lanes * pages, at.pages)
        self.rings = {
            READ: np.frombuffer(self.map, "<u4", self.ring_length, at.reads),
            WRITE: np.frombuffer(self.map, "<u4", self.ring_length, at.writes),
        }
        self.generations = self.rows["generation"]
        self._abort = self.rows["abort"]
        self._modes = self.cells["mode"]
        self._row_start, self._row_count = self.rows["start"], self.rows["count"]
        self._row_done_words, self._done_seq = self.rows["done"], self.header["done_seq"]
        self._worker_done = self.workers["done"]

    def _map_words(self) -> None:
        at, words = self.sections, memoryview(self.map)
        self.work_word = at.header + HEADER.fields["work_seq"][1]  # type: ignore[index]
        self.done_word = at.header + HEADER.fields["done_seq"][1]  # type: ignore[index]
        self._row_done = ROW.fields["done"][1]  # type: ignore[index]
        shutdown_at = at.header + HEADER.fields["shutdown"][1]  # type: ignore[index]
        self._shutdown = words[shutdown_at : shutdown_at + 4].cast("I")
        workers_at = at.header + HEADER.fields["workers"][1]  # type: ignore[index]
        self._workers = words[workers_at : workers_at + 4].cast("I")
        self._work_seq = words[self.work_word : self.work_word + 4].cast("I")
        self._worker_words = words[at.workers : at.workers + self.workers.nbytes].cast("Q")
        self._header_words = words[at.header : at.header + HEADER.itemsize].cast("Q")
        self._active_bytes = words[at.active : at.active + self.active.nbytes]
        self._row_words = words[at.rows : at.rows + self.rows.nbytes].cast("Q")
        latencies_end = at.latencies + MAX_WORKERS * 2 * histogram.WORDS * histogram.WORD_BYTES
        self.latencies = Histograms(words[at.latencies : latencies_end].cast("Q"))

    @property
    def num_workers(self) -> int:
        """Workers of the service."""
        return self._workers[0]

    @property
    def work_seq(self) -> int:
        """The word at `work_word`."""
        return int(self._work_seq[0])

    def count_work(self) -> None:
        """Blocks were queued: who is about to sleep at `work_word` does not. With the queue in
        hand."""
        self._work_seq[0] = (self._work_seq[0] + 1) & 0xFFFFFFFF

    def fill(
        self,
        row: int,
        created: int,
        start: int,
        cells: bytes,
        first: int,
        words: npt.NDArray[np.uint32],
    ) -> None:
        """Put a task's blocks in its room, which is no other task's; `begin` brings it to life.

        created   when, monotonic ns
        start     its first cell
        cells     CELL [blocks]
        first     its first page index
        words     its page indices or regions
        """
        self._row_words[row * ROW_WORDS + CREATED_WORD] = created
        self.pages[first : first + len(words)] = words
        at = self.sections.cells + start * CELL.itemsize
        self.map[at : at + len(cells)] = cells

    def begin(self, row: int, start: int, states: bytes, mode: int) -> None:
        """Bring the task of a row to life: from now on its blocks may be claimed. With the queue in
        hand."""
        _BEGIN.pack_into(
            self.map, self.sections.rows + row * ROW.itemsize + _BEGIN_AT, 0, start, len(states)
        )
        at = self.sections.states + start
        self.map[at : at + len(states)] = states
        self._active_bytes[row] = mode

    def tell_that_server_is_gone(self) -> None:
        """For a worker whose server has ended, or has become another program: it then lives on for
        all who look at its pid."""
        self._shutdown[0] = SERVER_GONE
        self._done_seq[0] += 1
        self.futex.wake(self.done_word)

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


def _read_sizes(fd: int) -> Sizes:
    """Sizes of a table that there is; raises ServiceClosedError when there is none."""
    with mmap.mmap(fd, align(HEADER.itemsize), access=mmap.ACCESS_READ) as first:
        header = np.frombuffer(bytes(first[: HEADER.itemsize]), HEADER)
    if bytes(header["magic"][0]) != MAGIC:
        raise ServiceClosedError("there is no task table at that address any more")
    return Sizes(*(int(header[f][0]) for f in ("lanes", "rows", "cells", "pages")))
