"""One process's place in the task table: it puts tasks there and takes their room back.

The server has lane 0; every other process of the server takes a lane of its own, held by a lock
that the kernel frees when the process dies.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from light_mem.engine.queue import LANE_BYTE, TaskQueue
from light_mem.engine.table_layout import (
    COPIED,
    INITIAL,
    LANE,
    WORKING,
    words_of,
)
from light_mem.engine.task_table import TaskTable
from light_mem.errors import (
    InvalidArgumentError,
    LockTimeoutError,
    ServiceClosedError,
    TaskExpiredError,
    TaskTableFullError,
)
from light_mem.index.locks import RangeLock
from light_mem.index.owners import process_start
from light_mem.lane_room import LaneRoom, Room
from light_mem.new_blocks import NewBlocks
from light_mem.task import CacheTask
from light_mem.waiting import not_run

_FULL_PAUSE = 0.001  # between two looks for room in a full table
_LANE_SECONDS = 5.0  # for a worker to finish what a dead client had queued
_COUNTER_WORDS = words_of(LANE)


class Session:
    """Places tasks in one lane. Any thread."""

    def __init__(self, table: TaskTable, lane: int, lock: RangeLock, queue: TaskQueue) -> None:
        self.table = table
        self.queue = queue
        self._lock = lock  # holds the lane
        self._guard: Any = threading.RLock()  # of `_lane_room`
        self._lane = lane
        self._lane_room = LaneRoom(table, lane)
        # By row. No guard: each use is one step, and a signal's handler may come with another.
        self._tasks: weakref.WeakValueDictionary[int, CacheTask] = weakref.WeakValueDictionary()
        self.counters = table.lanes[lane : lane + 1]
        self.counters["pid"], self.counters["started"] = _identity()
        self._words = self.counters.view(np.uint64).data  # an array's item costs ten times this

    @classmethod
    def open(cls, table: TaskTable, path: str) -> Session:
        """Take a free lane (lane 0 when it is free: the server comes first)."""
        lock = RangeLock(path)
        queue = TaskQueue(table, lock)
        try:
            for patience in (0.0, _LANE_SECONDS):
                for lane in range(table.sizes.lanes):
                    if lock.try_lock(LANE_BYTE + lane):
                        if table.shutdown:  # lane 0 is free then, its tasks are still asked for
                            raise ServiceClosedError("the service is closed")
                        if _clean(table, lane, queue, patience):
                            return cls(table, lane, lock, queue)
                        lock.unlock(LANE_BYTE + lane)
        except BaseException:
            lock.close()
            raise
        lock.close()
        raise TaskTableFullError(
            f"all {table.sizes.lanes - 1} client lanes of the service are taken",
            blocks=0,
            capacity=table.sizes.lanes,
            timeout=0.0,
        )

    def count(self, name: str, n: int) -> None:
        """Add to a statistic of this lane; two threads at once may lose an addition."""
        self._words[_COUNTER_WORDS[name]] += n

    def place(
        self, new: NewBlocks, words: npt.NDArray[np.uint32], timeout: float, held: list[Room]
    ) -> Room:
        """Put a task in the table; `submit` brings it to life.

        new       its blocks, dealt to the workers
        words     their page indices or regions
        held      gets the room: if this or anything up to the end of `submit` raises, the caller
                  is to release what is in it

        Raises InvalidArgumentError for a task larger than the table, TaskTableFullError when
        there is no room within `timeout` seconds.
        """
        created = time.monotonic_ns()
        room = self._wait_for_room(new.count, len(words), timeout, held)
        self.table.fill(room.row, created, room.start, new.cells(room), room.pages, words)
        return room

    def submit(self, task: CacheTask, room: Room, new: NewBlocks, mode: int) -> None:
        """Queue the blocks of a placed task that are not done already, at least one.

        Raises ServiceClosedError, LockTimeoutError; then nothing is queued.
        """
        publish = partial(self.table.begin, room.row, room.start, new.states(), mode)
        self.queue.push(new.queue(room), mode, publish)
        self._tasks[room.row] = task  # to take its room back early when the table is full

    def release(self, room: Room) -> None:
        """The task object is gone or knows its final states, or `create` has failed: the room may
        be used again once the task is ready. Called from finalisers: takes no lock. Twice is as
        once."""
        self._lane_room.release(room)

    def close(self) -> None:
        """Give the lane back."""
        try:
            self.queue.abort_waiting(self._own_cells())
        except LockTimeoutError:
            pass  # whoever gets the lane next, or the server when it closes, aborts them
        finally:
            self.queue.close()

    def _own_cells(self) -> slice:
        start = self._lane * self.table.sizes.cells
        return slice(start, start + int(self.counters["cells_top"][0]))

    def _wait_for_room(self, count: int, pages: int, timeout: float, held: list[Room]) -> Room:
        sizes = self.table.sizes
        for need, capacity, what in (
            (count, sizes.cells, "blocks"),
            (pages, sizes.pages, "page indices"),
        ):
            if need > capacity:
                raise InvalidArgumentError(
                    f"one task has at most {capacity} {what}, not {need}: raise max_blocks",
                    needed=need,
                    capacity=capacity,
                )
        deadline = time.monotonic() + timeout
        is_late = False
        while True:
            room = self._take(count, pages, held)
            if room is not None:
                return room
            if self.table.shutdown or self.table.orphaned:
                raise ServiceClosedError("the service is closed or its server is gone")
            if is_late:
                remedy = not_run(self.table) or "wait for tasks, or raise max_blocks"
                raise TaskTableFullError(
                    f"no room for {count} blocks in the task table within {timeout:g} s: all "
                    f"{sizes.cells} blocks or {sizes.rows} tasks are in use; {remedy}",
                    blocks=count,
                    capacity=sizes.cells,
                    timeout=timeout,
                )
            self._notice_ready()
            is_late = time.monotonic() >= deadline  # one look more: for what was just given back
            if not is_late:
                time.sleep(_FULL_PAUSE)

    def _take(self, count: int, pages: int, held: list[Room]) -> Room | None:
        if self._guard._is_owned():  # a signal's handler, that creates a task in a create
            raise LockTimeoutError(
                "this very thread is finding room for another task", what="task", timeout=0.0
            )
        with self._guard:
            return self._lane_room.take(count, pages, held)

    def _notice_ready(self) -> None:
        for reference in self._tasks.valuerefs():
            task = reference()
            # A ready task knows its states and gives its room back. One whose `create` has failed
            # since it was noted is in some traceback only, and its room may be another's by now.
            with suppress(TaskExpiredError):
                if task is not None:
                    task.ready()


def _identity() -> tuple[int, float]:
    return os.getpid(), process_start(os.getpid())


def _clean(table: TaskTable, lane: int, queue: TaskQueue, patience: float) -> bool:
    """Empty a lane whose owner died: nobody waits for its tasks any more.

    False: a worker is still at it after `patience` seconds; it is stopped, or dead and not yet
    replaced.
    """
    start = lane * table.sizes.cells
    cells = slice(start, start + int(table.lanes["cells_top"][lane]))
    deadline = time.monotonic() + patience
    while True:
        states = table.states[cells].copy()
        if (states == INITIAL).any():
            queue.abort_waiting(cells)  # more than once: blocks of a dead worker are queued again
        elif not np.isin(states, (WORKING, COPIED)).any():
            break
        elif time.monotonic() >= deadline:
            return False
        else:
            time.sleep(_FULL_PAUSE)
    # Copies of its tasks, in other processes, find out: their cells will be other tasks'.
    first = lane * table.sizes.rows
    table.generations[first : first + int(table.lanes["rows_top"][lane])] += 1
    return True
