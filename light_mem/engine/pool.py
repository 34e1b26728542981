"""Starts, watches and replaces the worker processes of one service.

One thread sleeps until it hears of the workers (`worker_processes.py`); every 30 s it looks for
what finalizers left to be done. A worker that dies gives up its locks to the kernel; this thread
settles the blocks that it had begun, has its slots given back, and starts another one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

from light_mem.engine.kvmemory import MemorySource
from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.one_thread import OneThread
from light_mem.engine.queue import TaskQueue
from light_mem.engine.restarts import Restarts
from light_mem.engine.settings import EngineSettings
from light_mem.engine.table_layout import CLOSED, WORKER_COUNTERS, WRITE
from light_mem.engine.task_table import TaskTable
from light_mem.engine.worker_processes import WorkerProcesses
from light_mem.errors import (
    LockTimeoutError,
    ServiceClosedError,
    StoreFormatError,
    WorkerStartError,
)
from light_mem.logs import Limited

log = logging.getLogger("light_mem")

START_SECONDS = 60.0
# A worker has at most two batches in hand when it is told to leave; then it is killed.
STOP_SECONDS = 10.0
MAX_EARLY_DEATHS = 3  # in a row, none was ever ready: where no other is, a try more will not help
_POLL_SECONDS = 0.5  # only where there are no pidfds
_ROUND_SECONDS = 30.0  # between two looks for what was dropped and waits to be ended


class WorkerPool:
    """`count` workers on one table. `start` and `stop` from any thread; the rest is its own.

    Only its own thread starts workers: no signal's handler runs there, which could close the
    service while a process is there already and not yet known.
    """

    def __init__(
        self,
        table: TaskTable,
        queue: TaskQueue,
        count: int,
        memory: MemorySource,
        *,
        settings: EngineSettings,
        cpus: Sequence[Sequence[int]] | None,
        engine: LocalStorageEngine,
        prepare: Callable[[], None],
    ) -> None:
        """`settings`, `cpus`: of the workers; `engine`: the server's own. `prepare` is called once,
        by the pool's thread."""
        self._table = table
        self._queue = queue
        self._count = count
        self._workers = WorkerProcesses(table, memory, settings, cpus)
        self._engine = engine
        self._prepare = prepare
        # Reentrant: a signal's handler may stop what its thread starts or stops.
        self._life = threading.RLock()
        self._stopping = False
        self._stopped = False  # ... and nothing is left
        self._not_waited_for = False  # `stop` gave up waiting for the thread
        self._thread = OneThread("lightmem-pool")
        self._early_deaths = 0
        self._restarts = Restarts()
        self._did: dict[int, int] = {}  # by worker: its counters' sum when it was last replaced
        self._limited = Limited()
        self.failure = ""  # why there are no workers any more

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers now."""
        return self._workers.pids

    def start(self) -> None:
        """Start all workers and return when they are ready; once.

        Raises WorkerStartError, and ServiceClosedError when another thread stops them meanwhile.
        """
        with self._life:
            if self._stopping:
                raise ServiceClosedError("the service is closed")
            self._thread.start(self._run)
        deadline = time.monotonic() + START_SECONDS
        workers = self._table.workers["ready"][1 : self._count + 1]
        while not workers.all():
            if self._stopping:
                raise ServiceClosedError("the service is closed")
            if time.monotonic() > deadline and not self.failure:
                self.failure = f"not ready within {START_SECONDS:g} s"
            if self.failure:
                self.stop()
                raise self.error("workers did not start")
            seen = int(self._table.header["done_seq"][0])
            self._table.futex.wait(self._table.done_word, seen, 0.02)

    def _spawn(self, number: int) -> None:
        self._workers.start(number)
        if self._not_waited_for:  # who stops may not have seen this one
            self._workers.end(STOP_SECONDS)
        self._restarts.started(number)

    # --- the watching thread ---------------------------------------------------------------------

    def _run(self) -> None:
        try:
            if self._start_all():
                self._watch()
        except Exception:
            if not self._stopped:
                raise
        finally:
            if self._stopped:  # by a finalizer in this very thread, maybe while it started a worker
                self._workers.end(STOP_SECONDS)

    def _start_all(self) -> bool:
        try:
            self._workers.open()
            for number in range(1, self._count + 1):
                if self._stopping:
                    return False
                self._spawn(number)
        except Exception as error:  # no such executable, no more processes or descriptors
            self.failure = str(error) or type(error).__name__
            return False
        return True

    def _watch(self) -> None:
        workers = self._workers
        round_seconds = _ROUND_SECONDS if workers.tell_of_their_deaths else _POLL_SECONDS
        self._tidy_up()  # after those who died before us
        self._prepare()
        while not self._stopping:
            workers.listen(self._restarts.wait(round_seconds))
            self._look_round()
            for number, pid, how in workers.dead():
                self._attempt(number, partial(self._replace, number, pid, how))
            for number in self._restarts.take():
                self._attempt(number, partial(self._fill_place, number))

    def _attempt(self, number: int, step: Callable[[], None]) -> None:
        """A step of replacing a worker; where it cannot be done the service ends."""
        if self._stopping:
            return
        try:
            step()
        except LockTimeoutError as error:
            # Whoever is stopped with the queue in hand (a debugged client) may go on later: the
            # dead worker is met again at once, and the lock waited for again.
            self._limited.warning("worker %d died and waits to be replaced: %s", number, str(error))
        except Exception as error:
            if self._stopped:
                return  # in the middle of the step
            log.exception("replacing worker %d failed", number)
            self._give_up(f"worker {number} could not be replaced: {error}")

    def _look_round(self) -> None:
        # The one worker that was woken for a task may have been stopped before it woke the others.
        self._queue.wake_all()
        try:
            self._engine.end_dropped()
        except Exception:  # dead workers are replaced all the same
            log.exception("what waits to be ended waits for longer")

    def _replace(self, number: int, pid: int, how: str) -> None:
        ready = bool(self._table.workers["ready"][number])
        early_deaths = 0 if ready else self._early_deaths + 1
        # Where the service ends nobody is left to do its blocks again, and it may leave in order.
        ends = bool(self.failure) or self._table.shutdown
        again = not ends and (early_deaths < MAX_EARLY_DEATHS or self._others_are_well(number))
        lost = self._queue.recover(number, self._engine.is_stored, again)
        self._early_deaths = early_deaths
        self._workers.forget(number)
        if ready:
            self._workers.forget_said()  # not why the next ones are never ready
        if ends:
            return
        self._tidy_up()
        pause = self._restarts.died(number, self._has_done(number) or lost > 0)
        then = "it is replaced"
        if not again:
            then = "no other one is started"
        elif pause:
            then = f"it did nothing, as those before it: the next one starts in {pause:g} s"
        held = f" with {lost} blocks in its hands" if lost else ""
        log.warning("worker %d (pid %d) %s%s; %s", number, pid, how, held, then)
        if not again:
            row = f"{MAX_EARLY_DEATHS} workers in a row died before they were ready"
            self._give_up(f"{row}, the last one {how}")

    def _others_are_well(self, number: int) -> bool:
        ready = self._table.workers["ready"][1 : self._count + 1]
        return int(ready.sum()) > int(ready[number - 1])

    def _has_done(self, number: int) -> bool:
        """Whether a worker has ended blocks since this was asked last."""
        record = self._table.workers[number]
        before = self._did.get(number, 0)
        self._did[number] = sum(int(record[name]) for name in WORKER_COUNTERS)
        return self._did[number] != before

    def _tidy_up(self) -> None:
        try:
            self._engine.recover()
        except (LockTimeoutError, OSError, StoreFormatError) as error:
            # A write that finds no room, and the next open, will do it.
            log.warning("slots that dead processes were filling stay taken: %s", str(error))

    def _fill_place(self, number: int) -> None:
        """Start a worker in the place of a dead one. Want of descriptors or memory may pass, and
        the other places do not wait for it."""
        if self.failure or self._table.shutdown:
            return
        if not self._restarts.failed_last(number):
            self._table.header["restarts"] += 1
        try:
            if not self._stopping:
                self._spawn(number)
        except OSError as error:
            pause = self._restarts.failed(number, not self._others_are_well(number))
            if pause is None:
                raise
            why = str(error)
            log.warning("worker %d cannot be started: %s; next try in %g s", number, why, pause)

    def _give_up(self, reason: str) -> None:
        """Workers that live finish what they have in hand and leave; the rest is aborted."""
        self.failure = reason
        log.error("the service stops: %s", reason)
        self._shut_down()

    def error(self, what: str) -> WorkerStartError:
        """`what`, and why: the service's failure, and what its workers said of it."""
        said = self._workers.said
        quoted = f"; the last that they said: {said}" if said else ""
        return WorkerStartError(
            f"{what}: {self.failure}{quoted}; restart the server", reason=self.failure, log=said
        )

    # --- the end ---------------------------------------------------------------------------------

    def stop(self) -> None:
        """Let the workers finish what they have in hand and leave; kill those who do not. None is
        left when this returns, whoever called it first.

        Each step may be made again: after a call that was broken off, and in the middle of one of
        the same thread, by a signal's handler.
        """
        self._stopping = True  # before it waits: the thread that starts workers looks at it
        with self._life:
            if self._stopped:
                return
            self._shut_down()
            if not self._thread.end(self._workers.wake, STOP_SECONDS):
                # It starts no worker any more, and ends one that it is starting.
                self._not_waited_for = True
                log.warning("the thread that starts workers is busy and ends later")
            self._workers.end(STOP_SECONDS)
            try:
                self._queue.abort_all()
            except LockTimeoutError as error:
                log.warning("a client is stopped, and its tasks are not aborted: %s", str(error))
            self._workers.close()
            self._stopped = True

    def _shut_down(self) -> None:
        """From now on nothing is queued, what waits is aborted, and idle workers leave."""
        table = self._table
        if unwritten := table.waiting(WRITE):
            log.warning(
                "%d blocks that waited to be written are not stored: the service %s",
                unwritten,
                "has no workers any more" if self.failure else "is closed",
            )
        table.header["shutdown"] = CLOSED
        table.header["done_seq"] += 1  # whoever waits for a task to be ready looks again
        table.futex.wake(table.done_word)
        try:
            self._queue.abort_waiting()
        except LockTimeoutError as error:
            # A worker that is stopped holds the queue: `stop` kills it and aborts the rest.
            log.warning("%s", str(error))
        table.count_work()
        table.futex.wake(table.work_word)
