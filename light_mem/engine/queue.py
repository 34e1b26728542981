"""TaskQueue: the blocks that wait for a worker.

Two rings of cell numbers in the task table, one for reads, one for writes, behind one lock that
the kernel frees when its holder dies. The rings are hints, the cells the truth: a cell is claimed
only while it is INITIAL and of the ring's mode, so an entry that is there twice, or for a block
aborted since whose cell another task has by now, does no harm, and a holder may die between any
two stores:

push    ring entries -> tail -> states of the cells
claim   worker and state of the cells -> head

A cell may be claimed before others that came earlier: it says which worker had better do it, its
home (see `claiming` and `dealing`). The head is the first entry that may wait.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from light_mem.engine.claiming import Chooser
from light_mem.engine.queue_lock import QUEUE_BYTE, QueueLock
from light_mem.engine.table_layout import (
    ABORTED,
    COPIED,
    FINISHED,
    INITIAL,
    READ,
    WORKING,
    WRITE,
)
from light_mem.engine.task_table import TaskTable
from light_mem.errors import InvalidArgumentError, LockTimeoutError, ServiceClosedError
from light_mem.index.locks import RangeLock

LANE_BYTE = QUEUE_BYTE + 1  # the first of the lanes' locks, in the same memory object
# Reads make a user wait, writes do not. At every WRITE_TURN-th claim writes go first; during a
# batch of writes a worker does up to WRITE_TURN - 1 full batches of reads.
WRITE_TURN = 3
MAX_ATTEMPTS = 3  # a block whose workers die this often is aborted

Cells: TypeAlias = "Sequence[int] | npt.NDArray[np.uint32]"  # numbers of cells


class TaskQueue(QueueLock):
    """The queue as one process sees it. Thread-safe; each process makes its own object."""

    def __init__(self, table: TaskTable, lock: RangeLock) -> None:
        super().__init__(table, lock)
        self._turn = 0
        self._between = 0.0  # full batches of reads since the last one of writes was claimed
        self._chooser = Chooser(table)
        # With no more cores than workers, the kernel runs a woken worker on this core at once, and
        # the thread that queues is stopped until that worker sleeps again: 3 ms of `create`.
        self._has_cores = _cores() > table.num_workers
        self._states, self._workers = table.states.data, table.cells["worker"].data

    def push(self, cells: Cells, mode: int, publish: Callable[[], object]) -> None:
        """Queue cells of one mode, in this order, and wake as many workers as can help; or one,
        who wakes the others.

        `publish` makes them INITIAL; it runs while nobody can claim or abort them. Raises
        ServiceClosedError when there will be no worker for them.
        """
        count = len(cells)
        try:
            with self.held():
                if self._table.shutdown:  # under the lock: who shuts down aborts what is queued
                    raise ServiceClosedError("the service is closed")
                self._append(cells, mode)
                publish()
                if bool(self._table.header["shutdown"][0]):
                    # The service was shut down without waiting for this hold to end: no worker will
                    # do these blocks.
                    self._abort_waiting(None)
                if not self._has_cores:
                    self._table.to_wake, count = max(self._table.to_wake, count - 1), 1
        finally:  # a signal may raise once they are queued
            self._table.futex.wake(self._table.work_word, count)

    def wake_others(self) -> None:
        """Wake the other workers: whoever queued blocks may have woken only this one, and left the
        others to it."""
        count = self._table.to_wake
        if count:
            # A number that is stored between the two is lost: its task has the worker that was
            # woken for it, and those who are up.
            self._table.to_wake = 0
            self._table.futex.wake(self._table.work_word, count)

    def wake_all(self) -> None:
        """Wake all workers, if anything waits."""
        if self._table.depth(READ) or self._table.depth(WRITE):
            self._table.futex.wake(self._table.work_word)

    def _append(self, cells: Cells, mode: int) -> None:
        table = self._table
        ring, length, tail = table.rings[mode], table.ring_length, table.tail(mode)
        if table.depth(mode) + len(cells) > length:
            tail = self._compact(mode)
        at = tail % length
        first = min(len(cells), length - at)
        ring[at : at + first] = cells[:first]
        if first < len(cells):
            ring[: len(cells) - first] = cells[first:]
        table.move_tail(mode, tail + len(cells))
        table.count_work()

    def _compact(self, mode: int) -> int:
        """Drop the entries of blocks that nobody will claim, which abort leaves; the new tail."""
        table = self._table
        cells, waits = table.queued(mode)
        cells = cells[waits]
        _, first = np.unique(cells, return_index=True)
        cells = cells[np.sort(first)]
        head = table.head(mode)
        tail = head + len(cells)
        table.rings[mode][np.arange(head, tail) % table.ring_length] = cells
        table.move_tail(mode, tail)
        return tail

    def claim(self, worker: int, timeout: float | None = None) -> list[int]:
        """Cells of one mode for this worker to do, marked WORKING; empty: nothing waits.

        How many, says `Chooser.choose`. `timeout`: see `held`.
        """
        if not (self._table.depth(READ) or self._table.depth(WRITE)):
            return []
        self._turn += 1
        order = (WRITE, READ) if self._turn % WRITE_TURN == 0 else (READ, WRITE)
        with self.held(timeout):
            for mode in order:
                cells = self._take(worker, mode)
                if cells:
                    if mode == WRITE:
                        self._between = 0.0
                    return cells
        return []

    def claim_between(self, worker: int, timeout: float | None = None) -> list[int]:
        """Cells of reads for a worker in the middle of a batch of writes; empty: nothing waits, or
        these reads have had their turns, and the writes are to go on.
        """
        if not self._table.depth(READ) or self._between >= WRITE_TURN - 1:
            return []
        with self.held(timeout):
            cells = self._take(worker, READ)
        if cells:
            self._between += self._chooser.fullness(cells, READ)
            self._turn += 1
        return cells

    def claim_ahead(self, worker: int, timeout: float | None = None) -> list[int]:
        """Cells of reads for a worker that has other reads to do first: a whole batch, if as much
        waits for every other worker and it is not the turn of writes. Else empty: blocks that are
        claimed ahead wait for longer than if another worker took them.
        """
        table = self._table
        if not table.depth(READ) or ((self._turn + 1) % WRITE_TURN == 0 and table.depth(WRITE)):
            return []
        self._turn += 1
        with self.held(timeout):
            return self._take(worker, READ, ahead=True)

    def _take(self, worker: int, mode: int, ahead: bool = False) -> list[int]:
        """Claim what `Chooser.choose` says; empty: nothing waits, or it says nothing."""
        states, workers = self._states, self._workers
        while self._table.depth(mode):  # each look claims something or moves the head
            choice = self._chooser.choose(worker, mode, ahead)
            if choice is None:
                break
            for cell in choice.cells:
                workers[cell] = worker
                states[cell] = WORKING
            self._table.move_head(mode, choice.head)
            if choice.cells:
                return choice.cells
        return []

    def abort(
        self, table: TaskTable, start: int, end: int, row: int, generation: int, timeout: float
    ) -> None:
        """Abort a task: blocks nobody has begun at once, the others when their worker looks.

        Does nothing when the task's row has another generation by now. Raises
        InvalidArgumentError for a task of another table; LockTimeoutError when the queue is not
        free within `timeout` seconds.
        """
        if table is not self._table:
            raise InvalidArgumentError("the task belongs to another service")
        with self.held(timeout):
            # A row gets a new generation without this lock, but its cells get their states with it.
            if table.generations[row] != generation:
                return
            self._table.rows["abort"][row] = 1
            states = self._table.states[start:end]
            states[states == INITIAL] = ABORTED
        self._table.finish(row, 0)

    def abort_waiting(self, cells: slice | None = None) -> None:
        """Abort every block of these cells, or of all, that nobody has begun."""
        self.do(partial(self._abort_waiting, cells))

    def _abort_waiting(self, cells: slice | None) -> None:
        for part in self._table.used_cells() if cells is None else [cells]:
            states = self._table.states[part]
            states[states == INITIAL] = ABORTED
        self.tell_ready()

    def abort_all(self) -> None:
        """Abort every block of every task: the workers are gone, and the service is shut down.

        Where a stopped process holds the queue it is done all the same: nobody queues any more.
        Raises LockTimeoutError then, afterwards.
        """
        try:
            self.do(self._abort_all)
        except LockTimeoutError:
            self._abort_all()
            raise

    def _abort_all(self) -> None:
        for cells in self._table.used_cells():
            states = self._table.states[cells]
            states[(states != FINISHED)] = ABORTED
        self.tell_ready()

    def recover(self, worker: int, is_stored: Callable[[int, int, int], bool], again: bool) -> int:
        """Settle the blocks of a dead worker; returns how many there were.

        Copied ones are done if they can be found, else aborted: their pages may hold other bytes
        by now. The others go back to the queue (`again`), a few times at most.
        """
        table = self._table
        with self.held():
            lost = self._begun_by(worker)
            redo: dict[int, list[int]] = {READ: [], WRITE: []}
            for at in lost:
                cell = table.cells[at]
                if table.states[at] == COPIED:
                    stored = is_stored(int(cell["low"]), int(cell["high"]), int(cell["nbytes"]))
                    table.states[at] = FINISHED if stored else ABORTED
                    continue
                cell["attempts"] += 1
                spent = int(cell["attempts"]) >= MAX_ATTEMPTS or table.aborted(int(cell["row"]))
                if spent or not again:
                    table.states[at] = ABORTED
                else:
                    table.states[at] = INITIAL
                    redo[int(cell["mode"])].append(at)
            for mode, cells in redo.items():
                if cells:
                    self._append(np.array(cells, np.uint32), mode)
        table.futex.wake(table.work_word)
        self.tell_ready()
        return len(lost)

    def _begun_by(self, worker: int) -> list[int]:
        begun: list[int] = []
        for cells in self._table.used_cells():
            states = self._table.states[cells]
            mine = self._table.cells["worker"][cells] == worker
            found = np.flatnonzero(mine & ((states == WORKING) | (states == COPIED)))
            begun += (cells.start + found).tolist()
        return begun

    def tell_ready(self) -> None:
        """Report and count ready tasks that no worker has reported: because there are no workers,
        or because one has stored the last state but not reported it yet."""
        for row in self._table.active_rows():
            self._table.finish(row, 0)


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
