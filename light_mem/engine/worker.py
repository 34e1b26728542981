"""The worker process: claims blocks, copies them, tells what became of them.

Started as its own program (not by `multiprocessing`, which would run the server's `__main__`
again) and importing neither torch nor psutil. It touches the KV tensor's memory, the task table
and the store's files, and nothing else. It waits for work on a word of the task table, so it uses
no CPU while idle; a thread waits for the server's death and then ends the process at once, which
is safe at any instruction: that is what the store's format is made for.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from light_mem.engine.base import BlockIO, Outcome
from light_mem.engine.kvmemory import MemorySource, attach
from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.places import Bytes2D, Regions, Rows
from light_mem.engine.program import die_with
from light_mem.engine.queue import TaskQueue
from light_mem.engine.task_table import (
    ABORTED,
    CELL,
    COPIED,
    FINISHED,
    READ,
    WORDS_PER_REGION,
    TaskTable,
)
from light_mem.errors import LockTimeoutError
from light_mem.index.locks import RangeLock
from light_mem.index.owners import process_start
from light_mem.logs import Limited

log = logging.getLogger("light_mem")

# Read by the server and logged there: level, then the text.
LOG_FORMAT = "%(levelno)d %(message)s"
IDLE_SECONDS = 3600.0  # an idle worker wakes this often for no reason

_LOW, _HIGH, _NBYTES, _PAGES, _COUNT, _ROW, _MODE, _REGIONS = (
    (CELL.names or ()).index(name)
    for name in "low high nbytes pages count row mode regions".split()
)

_COUNTERS = {
    Outcome.STORED: "blocks_written",
    Outcome.PRESENT: "blocks_present",
    Outcome.LOADED: "blocks_read",
    Outcome.MISSING: "missing",
    Outcome.LOST: "lost_races",
    Outcome.DAMAGED: "damaged",
    Outcome.NO_ROOM: "no_room",
    Outcome.STOPPED: "stopped",
    Outcome.FAILED: "failed",
}


class Worker:
    """One worker over a task table, the KV memory and a store. Single-threaded."""

    def __init__(
        self,
        number: int,
        table: TaskTable,
        queue: TaskQueue,
        memory: Bytes2D,
        engine: LocalStorageEngine,
    ) -> None:
        self._number = number
        self._table = table
        self._queue = queue
        self._memory = memory
        self._flat = memory.reshape(-1)
        self._engine = engine
        self._me = table.workers[number : number + 1]
        self._limited = Limited()

    def run(self) -> None:
        """Work until the service is closed."""
        table = self._table
        while True:
            seen = int(table.header["work_seq"][0])
            try:
                cells = self._queue.claim(self._number)
            except LockTimeoutError as error:  # a client is stopped with the queue in hand
                self._limited.warning("worker %d waits: %s", self._number, str(error))
                continue
            if cells:
                self.do(cells)
            elif table.shutdown:
                return
            else:
                table.futex.wait(table.work_word, seen, IDLE_SECONDS)

    def do(self, cells: Sequence[int]) -> None:
        """Do one batch of claimed cells, all of one mode."""
        table, number = self._table, self._number
        states_at, states = table.states_at, table.map
        listed = table.cells[cells].tolist()
        batch = [self._block(cell) for cell in listed]
        rows: list[int] = [cell[_ROW] for cell in listed]
        reading = listed[0][_MODE] == READ
        left = Counter(rows)  # a task may end before the batch does
        tally: dict[Outcome, int] = defaultdict(int)
        moved = 0

        me = self._me
        bytes_counter = "bytes_read" if reading else "bytes_written"
        time_counter = "read_ns" if reading else "write_ns"
        counted = time.perf_counter_ns()

        def count() -> None:
            nonlocal moved, counted
            now = time.perf_counter_ns()
            me[time_counter] += now - counted
            counted = now
            me[bytes_counter] += moved
            for outcome, blocks in tally.items():
                me[_COUNTERS[outcome]] += blocks
            moved = 0
            tally.clear()

        def report(at: int, outcome: Outcome) -> None:
            nonlocal moved
            if outcome is Outcome.COPIED:
                states[states_at + cells[at]] = COPIED
                return
            tally[outcome] += 1
            if outcome is Outcome.LOADED or outcome is Outcome.STORED:
                moved += listed[at][_NBYTES]
            row = rows[at]
            left[row] -= 1
            if not left[row]:
                count()  # before the last state: whoever sees the task ready sees its numbers
            states[states_at + cells[at]] = FINISHED if outcome.success else ABORTED
            if not left[row]:
                table.finish(row, number)

        def stop(at: int) -> bool:
            return table.aborted(rows[at])

        if reading:
            self._engine.read(batch, report, stop)
        else:
            self._engine.write(batch, report, stop)
        count()

    def _block(self, cell: tuple[int, ...]) -> BlockIO:
        low, high, first, count = cell[_LOW], cell[_HIGH], cell[_PAGES], cell[_COUNT]
        words = self._table.pages
        if cell[_REGIONS]:
            table = words[first : first + count * WORDS_PER_REGION].copy().view(np.uint64)
            regions = list(zip(table[::2].tolist(), table[1::2].tolist(), strict=True))
            return BlockIO(low, high, Regions(self._flat, regions))
        pages = words[first : first + count].astype(np.intp)
        return BlockIO(low, high, Rows(self._memory, pages))


def _allow_descriptors() -> None:
    """A mapped shard costs four descriptors; the usual soft limit of 1,024 is for select(2)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main(config: dict[str, Any]) -> None:
    """Run one worker; `config` is what `pool.py` wrote."""
    # A Ctrl-C in the terminal goes to the whole group; the server decides when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        die_with(config["parent"])
    except ProcessLookupError:
        return
    _allow_descriptors()
    logging.basicConfig(stream=sys.stderr, level=config["log_level"], format=LOG_FORMAT)
    table = TaskTable(config["table_fd"], None)
    source = MemorySource(**config["memory"])
    page_bytes = int(table.header["page_bytes"][0])
    memory = attach(source).reshape(-1, page_bytes)
    engine = LocalStorageEngine(
        os.fsdecode(bytes(table.header["store"][0])),
        kind="worker",
        verify=config["verify"],
        durability=config["durability"],
        time_to_live=config["time_to_live"],
    )
    # A descriptor of its own: the inherited one shares its locks with the server and all workers.
    lock = RangeLock(config["table_path"] or f"/proc/self/fd/{config['table_fd']}")
    number = config["number"]
    me = table.workers[number : number + 1]
    me["pid"], me["started"] = os.getpid(), process_start(os.getpid())
    me["ready"] = 1
    table.futex.wake(table.done_word)
    Worker(number, table, TaskQueue(table, lock), memory, engine).run()
    engine.close()
