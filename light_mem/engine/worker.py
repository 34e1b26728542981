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
from collections.abc import Sequence
from typing import Any

import numpy as np

from light_mem.engine.base import BlockIO, Bytes2D, Outcome
from light_mem.engine.kvmemory import MemorySource, attach
from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.program import die_with
from light_mem.engine.queue import TaskQueue
from light_mem.engine.task_table import (
    ABORTED,
    COPIED,
    FINISHED,
    READ,
    TaskTable,
)
from light_mem.errors import LockTimeoutError
from light_mem.index.locks import RangeLock
from light_mem.index.owners import process_start

log = logging.getLogger("light_mem")

# Read by the server and logged there: level, then the text.
LOG_FORMAT = "%(levelno)d %(message)s"
IDLE_SECONDS = 3600.0  # an idle worker wakes this often for no reason

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
        self._engine = engine
        self._me = table.workers[number : number + 1]

    def run(self) -> None:
        """Work until the service is closed."""
        table = self._table
        while True:
            seen = int(table.header["work_seq"][0])
            try:
                cells = self._queue.claim(self._number)
            except LockTimeoutError as error:  # a client is stopped with the queue in hand
                log.warning("worker %d waits: %s", self._number, str(error))
                continue
            if cells:
                self.do(cells)
            elif table.shutdown:
                return
            else:
                table.futex.wait(table.work_word, seen, IDLE_SECONDS)

    def do(self, cells: Sequence[int]) -> None:
        """Do one batch of claimed cells, all of one mode."""
        table, me = self._table, self._me
        batch: list[BlockIO] = []
        rows: list[int] = []
        for at in cells:
            low, high, first, count, row = table.cells[at].item()[:5]
            pages = table.pages[first : first + count].astype(np.intp)
            batch.append(BlockIO(low, high, self._memory, pages))
            rows.append(row)
        reading = int(table.cells["mode"][cells[0]]) == READ
        bytes_counter = "bytes_read" if reading else "bytes_written"

        def report(at: int, outcome: Outcome) -> None:
            if outcome is Outcome.COPIED:
                table.states[cells[at]] = COPIED
                return
            me[_COUNTERS[outcome]] += 1
            if outcome in (Outcome.LOADED, Outcome.STORED):
                me[bytes_counter] += batch[at].nbytes
            table.states[cells[at]] = FINISHED if outcome.success else ABORTED
            table.finish(rows[at], self._number)

        def stop(at: int) -> bool:
            return table.aborted(rows[at])

        started = time.perf_counter_ns()
        if reading:
            self._engine.read(batch, report, stop)
        else:
            self._engine.write(batch, report, stop)
        me["read_ns" if reading else "write_ns"] += time.perf_counter_ns() - started


def _allow_descriptors() -> None:
    """A mapped shard costs three descriptors; the usual soft limit of 1,024 is for select(2)."""
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
