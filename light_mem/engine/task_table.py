"""The shared task table: the states of all blocks of all tasks, in memory that every process maps.

A memory object without a name (memfd): it goes when the last process that maps it goes. Workers
inherit its descriptor; another process of the server opens it through /proc/<pid>/fd.

The table has *lanes*. A lane belongs to one process, lane 0 to the server, the others to clients;
only its owner places tasks in it, so placing needs no lock between processes. A task takes a
*row*, a range of *cells* (one a block) and a range of page indices. The state of a cell is one
byte; who polls compares bytes and makes no system call.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from light_mem.engine import histogram
from light_mem.engine.futex import FutexWords
from light_mem.engine.histogram import Histograms
from light_mem.engine.process import DeathWatch, is_alive
from light_mem.engine.table_layout import (
    CELL,
    CELL_FIELDS,
    CLIENT_LANES,
    HEADER,
    INITIAL,
    LANE,
    MAGIC,
    MAX_WORKERS,
    NAME,
    PAGES_PER_CELL,
    READ,
    ROW,
    WORKER,
    WRITE,
    Cells,
    is_final,
    words_of,
)
from light_mem.errors import InvalidArgumentError, ServiceClosedError
from light_mem.index.format import align
from light_mem.index.owners import process_start

_ROW_WORDS = ROW.itemsize // 8
_HEADER = words_of(HEADER)
_HEADS = {READ: _HEADER["read_head"], WRITE: _HEADER["write_head"]}
_TAILS = {READ: _HEADER["read_tail"], WRITE: _HEADER["write_tail"]}
_WORKER_WORDS = WORKER.itemsize // 8
_CREATED_WORD = ROW.fields["created"][1] // 8  # type: ignore[index]


class TableAddress(NamedTuple):
    """How another process of this machine finds a table; picklable."""

    table_id: str
    pid: int
    started: float
    fd: int
    path: str  # only where there is no /proc


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


class TaskTable:
    """A mapped table. Layout: header, lanes, workers, rows, active, states, cells, pages, rings,
    latencies: a histogram a worker and mode, from `create` to ready."""

    # Of the server; None in the server itself and in its workers, which die with it.
    _server: DeathWatch | None = None

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

    @classmethod
    def create(
        cls,
        sizes: Sizes,
        *,
        store: str,
        page_bytes: int,
        num_pages: int,
        pages_per_block: int,
        workers: int,
    ) -> TaskTable:
        """A new table of this process, the server."""
        path = ""
        if hasattr(os, "memfd_create"):
            fd = os.memfd_create(NAME, os.MFD_CLOEXEC)
        else:
            import tempfile

            fd, path = tempfile.mkstemp(prefix=f"{NAME}-")
        try:
            table = cls(fd, sizes, path)
        except (OSError, ValueError, OverflowError, MemoryError) as error:
            os.close(fd)
            raise InvalidArgumentError(
                f"no memory for a task table of {sizes.cells} blocks ({error}): lower max_blocks",
                max_blocks=sizes.cells,
            ) from error
        h = table.header
        h["table_id"], h["store"] = os.urandom(16).hex().encode(), os.fsencode(store)
        h["server_fd"] = fd
        h["server_pid"], h["server_started"] = os.getpid(), process_start(os.getpid())
        h["lanes"], h["rows"], h["cells"], h["pages"] = sizes
        h["workers"], h["page_bytes"], h["num_pages"] = workers, page_bytes, num_pages
        h["pages_per_block"] = pages_per_block
        h["magic"] = MAGIC  # last: whoever sees it sees the rest
        _tables[table.address().table_id] = table
        return table

    @classmethod
    def attach(cls, address: TableAddress) -> TaskTable:
        """The table at `address`; the same object for all callers of one process.

        Raises ServiceClosedError when the server is gone.
        """
        with _attach_guard:
            known = _tables.get(address.table_id)
            if known is None:
                known = _tables[address.table_id] = cls._attach(address)
            return known

    @classmethod
    def _attach(cls, address: TableAddress) -> TaskTable:
        gone = ServiceClosedError(
            f"the server of this task (pid {address.pid}) has closed its service or is gone",
            pid=address.pid,
        )
        if not is_alive(address.pid, address.started):
            raise gone
        try:
            fd = os.open(
                address.path or f"/proc/{address.pid}/fd/{address.fd}", os.O_RDWR | os.O_CLOEXEC
            )
        except OSError:
            raise gone from None
        try:
            table = cls(fd, None, address.path)
            if table.address() != address:
                raise gone
        except (ServiceClosedError, ValueError, OSError):
            os.close(fd)
            raise gone from None
        weakref.finalize(table, os.close, fd)
        if address.pid != os.getpid():
            table._server = DeathWatch(address.pid, address.started)
        return table

    def address(self) -> TableAddress:
        """Where others find this table: as its server, so also from a client."""
        h = self.header
        return TableAddress(
            bytes(h["table_id"][0]).decode(),
            int(h["server_pid"][0]),
            float(h["server_started"][0]),
            int(h["server_fd"][0]),
            self.path,
        )

    @property
    def orphaned(self) -> bool:
        """Whether the server has died: nobody works on tasks any more. No system call."""
        return self._server is not None and self._server.dead

    @property
    def shutdown(self) -> bool:
        """Whether the service is closed."""
        return bool(self._shutdown[0])

    def read(self, cells: Sequence[int]) -> Cells:
        """The fields of cells that stay what they are, at least one: those that a worker does."""
        start, size, unpack = self._cells_at, CELL.itemsize, CELL_FIELDS.unpack_from
        columns = zip(*[unpack(self.map, start + cell * size) for cell in cells], strict=True)
        return Cells(*columns)

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

    def queued(self, mode: int) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.bool_]]:
        """Entries of a mode's ring from its head on: cells, and whether each waits for a worker in
        this mode. An entry stays when its block is aborted, and the cell may be another task's by
        then. No lock, no system call."""
        cells = self.rings[mode][np.arange(self.head(mode), self.tail(mode)) % self.ring_length]
        return cells, (self.states[cells] == INITIAL) & (self._modes[cells] == mode)

    def waiting(self, mode: int) -> int:
        """Blocks of a mode that wait for a worker, about now. No lock, no system call."""
        return int(np.count_nonzero(self.queued(mode)[1]))

    def lock_path(self) -> str:
        """A path that opens the table's memory object anew, for locks of its own."""
        return self.path or f"/proc/self/fd/{self.fd}"

    def snapshot(self, start: int, end: int) -> bytes:
        """States of cells `[start, end)`. No lock, no system call."""
        return self.map[self.states_at + start : self.states_at + end]

    def aborted(self, row: int) -> bool:
        """Whether the task of this row was aborted."""
        return bool(self._abort[row])

    # Copies below: numpy's nonzero counts first and collects then, and raises RuntimeError when
    # another process changes the memory in between.

    def used_cells(self) -> Iterator[slice]:
        """The cells of each lane that were ever used."""
        for lane in np.flatnonzero(self.lanes["cells_top"].copy()).tolist():
            start = lane * self.sizes.cells
            yield slice(start, start + int(self.lanes["cells_top"][lane]))

    def active_rows(self) -> list[int]:
        """Rows of tasks that are not ready."""
        rows: list[int] = []
        for lane in np.flatnonzero(self.lanes["rows_top"].copy()).tolist():
            start = lane * self.sizes.rows
            top = start + int(self.lanes["rows_top"][lane])
            rows += (start + np.flatnonzero(self.active[start:top].copy())).tolist()
        return rows

    def active_tasks(self, mode: int) -> int:
        """Tasks of all lanes that are not ready. No lock, no system call."""
        count = 0
        for lane in np.flatnonzero(self.lanes["rows_top"].copy()).tolist():
            start = self.active_at + lane * self.sizes.rows
            count += self.map[start : start + int(self.lanes["rows_top"][lane])].count(mode)
        return count

    def row_word(self, row: int) -> int:
        """Offset of a row's `done` word, for `futex`."""
        return self.rows_at + row * ROW.itemsize + self._row_done

    def finish(self, row: int, worker: int) -> bool:
        """Tell waiters when all blocks of the task are final; `worker` is 0 for the server.

        The words get values that no other process writes (its number in the low byte), so that
        two workers that finish at a time cannot hide a change from a waiter.
        """
        start, count = int(self._row_start[row]), int(self._row_count[row])
        if not is_final(self.snapshot(start, start + count)):
            return False
        mode = self._active_bytes[row]
        self._active_bytes[row] = 0
        if mode:  # else another worker, with the task's last block at the same time, was first
            created = self._row_words[row * _ROW_WORDS + _CREATED_WORD]
            self.latencies.add(latency_at(worker, mode), time.monotonic_ns() - created)
        counter = int(self._worker_done[worker]) + 1
        self._worker_done[worker] = counter
        value = (counter << 8 | worker) & 0xFFFFFFFF
        self._row_done_words[row] = value
        self._done_seq[0] = value
        self.futex.wake(self.row_word(row))
        self.futex.wake(self.done_word)
        return True

    def worker_words(self, worker: int) -> memoryview:
        """A worker's WORKER as words, 0 the server's: an array's item costs ten times as much."""
        return self._worker_words[worker * _WORKER_WORDS : (worker + 1) * _WORKER_WORDS]

    def close(self) -> None:
        """Close the descriptor: nobody can attach any more. The mapping stays for task objects."""
        _tables.pop(self.address().table_id, None)
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        if self.path and int(self.header["server_pid"][0]) == os.getpid():
            os.unlink(self.path)
            self.path = ""


_tables: weakref.WeakValueDictionary[str, TaskTable] = weakref.WeakValueDictionary()
_attach_guard = threading.Lock()


def _after_fork_in_child() -> None:
    # A client that the child is handed attaches anew: it needs its own watch over the server.
    global _attach_guard
    _tables.clear()
    _attach_guard = threading.Lock()


os.register_at_fork(after_in_child=_after_fork_in_child)


def latency_at(worker: int, mode: int) -> int:
    """Where the table's histograms have that of this worker, 0 the server, and mode."""
    return 2 * worker + mode - READ
