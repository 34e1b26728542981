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
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from light_mem.engine.affinity import bind
from light_mem.engine.base import BlockIO
from light_mem.engine.batch_report import BatchReport, Stopwatch
from light_mem.engine.kvmemory import MemorySource, attach
from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.map_ahead import MapAhead
from light_mem.engine.places import Bytes2D, Regions, Rows
from light_mem.engine.program import die_with, name_process
from light_mem.engine.queue import TaskQueue
from light_mem.engine.settings import EngineSettings
from light_mem.engine.store_identity import StoreIdentity
from light_mem.engine.table_layout import READ, WORDS_PER_REGION, Cells
from light_mem.engine.task_table import TaskTable
from light_mem.errors import LightMemError, LockTimeoutError
from light_mem.index.locks import RangeLock
from light_mem.index.owners import process_start
from light_mem.logs import Limited

log = logging.getLogger("light_mem")

# Read by the server and logged there: level, then the text.
LOG_FORMAT = "%(levelno)d %(message)s"
PROCESS_NAME = "lightmem-worker"
IDLE_SECONDS = 3600.0  # an idle worker wakes this often for no reason
BUSY_QUEUE_SECONDS = 0.01  # how long what was begun waits for the queue, which takes microseconds
QUIET_SECONDS = 0.1  # longer than most batches take that come from a device


class Worker:
    """One worker over a task table, the KV memory and a store. One thread; the engine's threads,
    which wait for a device, ask it whether a task was aborted."""

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
        self._ahead = MapAhead(memory)
        self._limited = Limited()
        self._stopwatch = Stopwatch()
        self._read, self._read_at = 0, 0.0  # time that all workers spent reading, when it changed

    def run(self) -> None:
        """Work until the service is closed."""
        table, engine = self._table, self._engine
        while True:
            seen = table.work_seq
            has_begun = engine.has_begun_reads or engine.has_begun_writes
            claim = self._queue.claim_ahead if engine.has_begun_reads else self._queue.claim
            try:
                cells = claim(self._number, BUSY_QUEUE_SECONDS if has_begun else None)
            except LockTimeoutError as error:  # a client is stopped with the queue in hand
                if not has_begun:
                    self._limited.warning("worker %d waits: %s", self._number, str(error))
                engine.finish_reads()
                engine.finish_writes()
                continue  # not to sleep: what waits may have come before the last look
            if cells:
                self.do(cells)
            elif engine.finish_reads() or engine.finish_writes():
                pass
            elif table.shutdown:
                return
            elif engine.rest() or self._ahead.step():
                pass
            elif engine.has_later and self._nobody_reads():
                engine.bring_in()
            else:
                idle = QUIET_SECONDS if engine.has_later else IDLE_SECONDS
                table.futex.wait(table.work_word, seen, idle)
                self._queue.wake_others()

    def _nobody_reads(self) -> bool:
        """Whether no worker of the service has reported a read for QUIET_SECONDS, and no read
        waits: bringing in must not compete with reads for the device."""
        now, read = time.monotonic(), int(self._table.workers["read_ns"].sum())
        if read != self._read or self._table.depth(READ):
            self._read, self._read_at = read, now
        return now - self._read_at >= QUIET_SECONDS

    def do(self, cells: Sequence[int]) -> None:
        """Do one batch of claimed cells, all of one mode. Where blocks wait for a device, their
        outcomes are told when the next batch has been begun, or by the engine's `finish_reads` and
        `finish_writes`."""
        table, engine = self._table, self._engine
        if not (engine.has_begun_reads or engine.has_begun_writes):
            self._stopwatch.start()
        records = table.read(cells)
        if records.mode[0] == READ:
            self._begin_read(cells, records)
            engine.finish_writes()
        else:
            report = BatchReport(table, self._number, cells, records, self._stopwatch)
            again = any(records.attempts)
            stop = Aborted(table, records.row, partial(self._read_between, report, again))
            engine.begin_write(self._blocks(records), report, stop, records.mixed, again)

    def _begin_read(self, cells: Sequence[int], records: Cells, by_calls: bool = False) -> None:
        table = self._table
        report = BatchReport(table, self._number, cells, records, self._stopwatch)
        stop = Aborted(table, records.row)
        entries = [listed - 1 for listed in records.listed]
        # Any block that a dead worker was reading may have killed it, by an unreadable mapped page.
        # Read by calls, such a page is an error of that block alone, and nothing dies again.
        by_calls = by_calls or any(records.attempts)
        self._engine.begin_read(self._blocks(records), report, stop, entries, by_calls)

    def _read_between(self, writes: BatchReport, by_calls: bool) -> None:
        """In the middle of a batch of writes: do waiting reads, up to two full batches, since users
        wait for reads but not for writes. Reads that need a device are only begun, because this
        worker holds slots and must not wait (except briefly, to take out a damaged block). They are
        completed when the device has delivered, when the writes have ended, or before the rest of
        the writes waits for a lock or for room."""
        engine = self._engine
        if engine.has_begun_reads:
            if not engine.reads_have_landed:
                return
            writes.count()  # so far the time was theirs
            engine.finish_reads()
        while not engine.has_begun_reads:
            try:
                cells = self._queue.claim_between(self._number, BUSY_QUEUE_SECONDS)
            except LockTimeoutError:  # asked again a few MiB later
                return
            if not cells:
                return
            writes.count()
            self._begin_read(cells, self._table.read(cells), by_calls)

    def _blocks(self, records: Cells) -> list[BlockIO]:
        """What to move for the cells of a batch."""
        blocks: list[BlockIO] = []
        for low, high, first, count, in_regions in zip(
            records.low,
            records.high,
            records.pages,
            records.places,
            records.regions,
            strict=True,
        ):
            place = self._regions(first, count) if in_regions else self._rows(first, count)
            blocks.append(BlockIO(low, high, place))
        return blocks

    def _rows(self, first: int, count: int) -> Rows:
        return Rows(self._memory, self._table.pages[first : first + count].astype(np.intp))

    def _regions(self, first: int, count: int) -> Regions:
        words = self._table.pages[first : first + count * WORDS_PER_REGION].copy()
        table = words.view(np.uint64)
        pairs = zip(table[::2].tolist(), table[1::2].tolist(), strict=True)
        return Regions(self._flat, list(pairs))


class Aborted:
    """Whether blocks of a batch were aborted, by their positions: as the tasks of their rows are.
    Any thread."""

    def __init__(
        self,
        table: TaskTable,
        rows: Sequence[int],
        between: Callable[[], None] | None = None,
    ) -> None:
        """`between` is called by whoever copies the batch, every few MiB."""
        self._table, self._rows, self._between = table, rows, between

    def __call__(self, at: int) -> bool:
        return self._table.aborted(self._rows[at])

    def any_of(self, positions: Sequence[int]) -> Callable[[], bool]:
        """Whether any of them was, by now. For the thread that copies them, between two copies."""
        aborted, rows, between = self._table.aborted, self._rows, self._between
        tasks = {rows[at] for at in positions}

        def any_was() -> bool:
            if between is not None:
                between()
            return any(map(aborted, tasks))

        return any_was


def _allow_descriptors() -> None:
    """A shard costs up to five descriptors; the usual soft limit of 1,024 is for select(2)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main(config: dict[str, Any]) -> None:
    """Run one worker; `config` is what `worker_processes.py` wrote."""
    # A Ctrl-C in the terminal goes to the whole group; the server decides when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # it was started deaf to it
    name_process(PROCESS_NAME)
    table: TaskTable | None = None

    def server_is_gone() -> None:
        if table is not None:
            table.tell_that_server_is_gone()

    try:
        die_with(config["parent"], sys.stderr.fileno(), server_is_gone)
    except ProcessLookupError:
        return
    _allow_descriptors()
    logging.basicConfig(stream=sys.stderr, level=config["log_level"], format=LOG_FORMAT)
    if config["cpus"]:
        bind(config["cpus"])  # before any memory is used: it then comes from the worker's node
    number = config["number"]
    doing = "map the server's memory"
    try:
        table = TaskTable(config["table_fd"], None)
        source = MemorySource(**config["memory"])
        page_bytes = int(table.header["page_bytes"][0])
        memory = attach(source).reshape(-1, page_bytes)
        # A descriptor of its own: the inherited one shares its locks with the server and all
        # workers.
        lock = RangeLock(config["table_path"] or f"/proc/self/fd/{config['table_fd']}")
        doing = "open the store"
        engine = LocalStorageEngine(
            os.fsdecode(bytes(table.header["store"][0])),
            kind="worker",
            settings=EngineSettings(**config["engine"]),
            expected=StoreIdentity.in_table(table.header),
        )
    except (LightMemError, OSError) as error:  # of the machine or the store, not of the program
        log.error("worker %d cannot %s: %s", number, doing, str(error))
        sys.exit(1)
    me = table.workers[number : number + 1]
    me["pid"], me["started"] = os.getpid(), process_start(os.getpid())
    me["ready"] = 1
    table.futex.wake(table.done_word)
    Worker(number, table, TaskQueue(table, lock), memory, engine).run()
    engine.close()
