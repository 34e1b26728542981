"""The shared task table: the states of all blocks of all tasks, in memory that every process maps.

A memory object without a name (memfd): it goes when the last process that maps it goes. Workers
inherit its descriptor; another process of the server opens it through /proc/<pid>/fd.

The table has *lanes*. A lane belongs to one process, lane 0 to the server, the others to clients;
only its owner places tasks in it, so placing needs no lock between processes. A task takes a
*row*, a range of *cells* (one a block) and a range of page indices. The state of a cell is one
byte; who polls compares bytes and makes no system call.
"""

from __future__ import annotations

import errno
import os
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from light_mem.descriptors import keep_standard_numbers, memory_object
from light_mem.engine.process import DeathWatch, is_alive, is_shown
from light_mem.engine.store_identity import StoreIdentity
from light_mem.engine.table_layout import (
    ABORTED,
    CELL,
    CELL_FIELDS,
    FINISHED,
    MAGIC,
    NAME,
    READ,
    ROW,
    SERVER_GONE,
    WORKER,
    Cells,
    is_final,
)
from light_mem.engine.table_memory import CREATED_WORD, ROW_WORDS, Sizes, TableMemory
from light_mem.errors import InvalidArgumentError, ServiceClosedError
from light_mem.index.owners import process_start

OWN_DESCRIPTORS = "/proc/self/fd"
_WORKER_WORDS = WORKER.itemsize // 8


class TableAddress(NamedTuple):
    """How another process of this machine finds a table; picklable."""

    table_id: str
    pid: int
    started: float
    fd: int
    path: str  # only where there is no /proc


class TaskTable(TableMemory):
    """The states of all blocks, found by others, changed and told of."""

    # Of the server; None in the server itself and in its workers, which die with it.
    _server: DeathWatch | None = None

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
        identity: StoreIdentity | None = None,
    ) -> TaskTable:
        """A new table of this process, the server; `identity`: of the store that it has open."""
        keep_standard_numbers()
        path = ""
        # Without a name it is found through /proc alone, by this very process's locks too.
        has_proc = os.path.isdir(OWN_DESCRIPTORS)
        fd = memory_object(NAME) if has_proc else -1
        if fd < 0:
            import tempfile

            fd, path = tempfile.mkstemp(prefix=f"{NAME}-")
            if has_proc:  # else a killed server would leave it
                os.unlink(path)
                path = ""
        try:
            table = cls(fd, sizes, path)
        except (OSError, ValueError, OverflowError, MemoryError) as error:
            os.close(fd)
            if path:
                os.unlink(path)
            limited = isinstance(error, OSError) and error.errno == errno.EFBIG
            remedy = "raise RLIMIT_FSIZE (ulimit -f), or " if limited else ""
            raise InvalidArgumentError(
                f"no memory for a task table of {sizes.cells} blocks ({error}): {remedy}lower "
                "max_blocks",
                max_blocks=sizes.cells,
            ) from error
        h = table.header
        h["table_id"], h["store"] = os.urandom(16).hex().encode(), os.fsencode(store)
        h["server_fd"] = fd
        h["server_pid"], h["server_started"] = os.getpid(), process_start(os.getpid())
        h["lanes"], h["rows"], h["cells"], h["pages"] = sizes
        h["workers"], h["page_bytes"], h["num_pages"] = workers, page_bytes, num_pages
        h["pages_per_block"] = pages_per_block
        if identity is not None:
            identity.put_in(h)
        h["magic"] = MAGIC  # last: whoever sees it sees the rest
        _tables[table.address().table_id] = table
        return table

    @classmethod
    def attach(cls, address: TableAddress) -> TaskTable:
        """The table at `address`; the same object for all callers of one process.

        Raises ServiceClosedError when the server is gone, or is none that this process may look at.
        """
        with _attach_guard:
            known = _tables.get(address.table_id)
            if known is None:
                made = cls._attach(address)
                known = _tables.setdefault(address.table_id, made)  # a handler's, meanwhile
            return known

    @classmethod
    def _attach(cls, address: TableAddress) -> TaskTable:
        pid = address.pid
        path = address.path or f"/proc/{pid}/fd/{address.fd}"
        server = f"the server of this task (pid {pid})"
        gone = ServiceClosedError(f"{server} has closed its service or is gone", pid=pid)
        barred = ServiceClosedError(
            f"{server} lives, and {path} cannot be reached: this process is of another user, "
            "container or PID namespace than the server",
            pid=pid,
        )
        if not is_alive(pid, address.started):
            if is_shown(pid, address.started):
                raise barred
            # Below a /proc of its own a process cannot tell the one from the other.
            unseen = "is gone, or is in another container or PID namespace than this process"
            raise ServiceClosedError(f"{server} {unseen}", pid=pid)
        keep_standard_numbers()
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except PermissionError:
            raise barred from None
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
        """Whether the server is gone: nobody works on tasks any more. No system call."""
        server = self._server
        return server is not None and (server.dead or self._shutdown[0] == SERVER_GONE)

    @property
    def shutdown(self) -> bool:
        """Whether the service is closed."""
        return bool(self._shutdown[0])

    def read(self, cells: Sequence[int]) -> Cells:
        """The fields of cells that stay what they are, at least one: those that a worker does."""
        start, size, unpack = self.sections.cells, CELL.itemsize, CELL_FIELDS.unpack_from
        columns = zip(*[unpack(self.map, start + cell * size) for cell in cells], strict=True)
        return Cells(*columns)

    def lock_path(self) -> str:
        """A path that opens the table's memory object anew, for locks of its own."""
        return self.path or f"{OWN_DESCRIPTORS}/{self.fd}"

    def snapshot(self, start: int, end: int) -> bytes:
        """States of cells `[start, end)`. No lock, no system call."""
        return self.map[self.sections.states + start : self.sections.states + end]

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
            start = self.sections.active + lane * self.sizes.rows
            count += self.map[start : start + int(self.lanes["rows_top"][lane])].count(mode)
        return count

    @property
    def is_busy(self) -> bool:
        """Whether any block of any task is to be done. (`active_tasks` may miss a task: a worker
        that is late to tell of the one before it in its row clears its mark.)"""
        final = (FINISHED, ABORTED)
        return any(not np.isin(self.states[cells], final).all() for cells in self.used_cells())

    def row_word(self, row: int) -> int:
        """Offset of a row's `done` word, for `futex`."""
        return self.sections.rows + row * ROW.itemsize + self._row_done

    def finish(self, row: int, worker: int) -> None:
        """Tell waiters when all blocks of the task are final; `worker` is 0 for the server.

        The words get values that no other process writes (its number in the low byte), so that
        two workers that finish at a time cannot hide a change from a waiter.
        """
        start, count = int(self._row_start[row]), int(self._row_count[row])
        if not is_final(self.snapshot(start, start + count)):
            return
        mode = self._active_bytes[row]
        if mode:  # else another worker, with the task's last block at the same time, was first
            # Count before marking it as reported: after that nobody would.
            created = self._row_words[row * ROW_WORDS + CREATED_WORD]
            self.latencies.add(latency_at(worker, mode), time.monotonic_ns() - created)
        self._active_bytes[row] = 0
        counter = int(self._worker_done[worker]) + 1
        self._worker_done[worker] = counter
        value = (counter << 8 | worker) & 0xFFFFFFFF
        self._row_done_words[row] = value
        self._done_seq[0] = value
        self.futex.wake(self.row_word(row))
        self.futex.wake(self.done_word)

    def worker_words(self, worker: int) -> memoryview:
        """A worker's WORKER as words, 0 the server's: an array's item costs ten times as much."""
        return self._worker_words[worker * _WORKER_WORDS : (worker + 1) * _WORKER_WORDS]

    def close(self) -> None:
        """Close the descriptor: nobody can attach any more. The mapping stays for task objects."""
        _tables.pop(self.address().table_id, None)
        fd, self.fd = self.fd, -1  # first: closed twice, the number may be another file's
        if fd >= 0:
            os.close(fd)
        if self.path and int(self.header["server_pid"][0]) == os.getpid():
            path, self.path = self.path, ""
            with suppress(FileNotFoundError):  # temporary directories are tidied up by others too
                os.unlink(path)


_tables: weakref.WeakValueDictionary[str, TaskTable] = weakref.WeakValueDictionary()
_attach_guard = threading.RLock()  # a signal's handler may be the next to attach


def _after_fork_in_child() -> None:
    # A client that the child is handed attaches anew: it needs its own watch over the server.
    global _attach_guard
    _tables.clear()
    _attach_guard = threading.RLock()


os.register_at_fork(after_in_child=_after_fork_in_child)


def latency_at(worker: int, mode: int) -> int:
    """Where the table's histograms have that of this worker, 0 the server, and mode."""
    return 2 * worker + mode - READ
