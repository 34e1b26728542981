"""Waiting for tasks: one thread tells all who wait for tasks of one table, and whether the server
is still there."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import NamedTuple, Protocol

from light_mem.engine.process import is_alive
from light_mem.engine.task_table import TaskTable
from light_mem.errors import ServiceClosedError, TaskExpiredError

# How often a waiter looks whether the server still lives.
LIVENESS_SECONDS = 0.5
NO_RUN_SECONDS = 10.0  # so long a wait for workers that were never started is a mistake

log = logging.getLogger("light_mem")

_told: weakref.WeakSet[TaskTable] = weakref.WeakSet()  # the tables of services without run()


class Task(Protocol):
    """What is waited for."""

    def ready(self) -> bool:
        """Whether it is; raises TaskExpiredError, ServiceClosedError."""


def check_server(table: TaskTable, since: int | None = None) -> None:
    """Raise ServiceClosedError when the process that runs the workers is gone; warn, once a table,
    when somebody has waited long `since` then (monotonic ns), and workers were never started."""
    header = table.header
    pid, started = int(header["server_pid"][0]), float(header["server_started"][0])
    if table.orphaned or (
        pid != os.getpid() and (not is_alive(pid, started) or _has_let_go(table, pid))
    ):
        raise server_is_gone(table)
    if since is None or time.monotonic_ns() - since < NO_RUN_SECONDS * 1e9 or table in _told:
        return
    if why := not_run(table):
        _told.add(table)
        log.warning("a task has waited for %g s: %s", NO_RUN_SECONDS, why)


def not_run(table: TaskTable) -> str:
    """Why nobody does any task, where no worker was ever ready; "": one was."""
    pids = table.workers["pid"][1 : table.num_workers + 1]
    return "" if pids.any() else "run() has not been called, or has not returned"


def _has_let_go(table: TaskTable, pid: int) -> bool:
    """Whether a server that lives has its table open no longer: it has become another program,
    which has its pid and start, or has closed the service."""
    if table.path:
        return False  # a file with a name, where there is no /proc
    try:
        there = os.stat(f"/proc/{pid}/fd/{int(table.header['server_fd'][0])}")
        return not os.path.samestat(there, os.fstat(table.fd))
    except FileNotFoundError:
        return True
    except OSError:  # nothing that this process could see
        return False


def server_is_gone(table: TaskTable) -> ServiceClosedError:
    """What those get who wait for a server that has died."""
    pid = int(table.header["server_pid"][0])
    return ServiceClosedError(f"the server (pid {pid}) is gone", pid=pid)


class Waiting(NamedTuple):
    """Somebody who is to be told of a task, unless not `wanted()` any more."""

    task: Task
    settle: Callable[[Settled], None]
    wanted: Callable[[], bool]


class Notifier:
    """Tells of the ready tasks of one table: one thread, which lives while somebody waits."""

    def __init__(self, table: TaskTable) -> None:
        self._table = weakref.ref(table)
        self._guard = threading.RLock()  # a signal's handler may add one in the middle of `add`
        self._numbers = itertools.count()
        self._waiting: dict[int, Waiting] = {}
        self._running = False
        self._looked = 0.0  # when the server was last seen alive
        self._began = 0  # when somebody began to wait, after nobody had

    def add(self, waiting: Waiting) -> None:
        """Tell this one too; raises RuntimeError when there is no thread to be had."""
        number = next(self._numbers)
        with self._guard:
            self._waiting[number] = waiting
            if not self._running:
                try:
                    threading.Thread(target=self._run, name="lightmem-await", daemon=True).start()
                except RuntimeError:  # no more threads: the next one to wait tries again
                    del self._waiting[number]
                    raise
                self._running, self._began = True, time.monotonic_ns()
        # The thread reads the word that it sleeps on before it looks who waits: a task that gets
        # ready after this line wakes it, one that is ready by now may have done so too early.
        outcome = outcome_of(waiting.task)
        if outcome is not None:
            self._settle(number, outcome)

    def _settle(self, number: int, outcome: Settled) -> None:
        with self._guard:
            waiting = self._waiting.pop(number, None)
        if waiting is not None:
            waiting.settle(outcome)

    def _run(self) -> None:
        try:
            while self._tell():
                pass
        except BaseException:
            with self._guard:
                self._running = False  # the next one to wait starts another thread
            raise

    def _tell(self) -> bool:
        """Tell of what is ready now, or sleep; False: nobody waits any more."""
        table = self._table()
        seen = 0 if table is None else int(table.header["done_seq"][0])
        with self._guard:
            if table is None or not self._waiting:
                self._running = False
                return False
            waiting = list(self._waiting.items())
        gone = self._gone(table)
        settled = False
        for number, each in waiting:
            outcome = outcome_of(each.task) or gone
            if outcome is not None or not each.wanted():
                self._settle(number, outcome or True)
                settled = True
        waiting.clear()
        if not settled:
            table.futex.wait(table.done_word, seen, LIVENESS_SECONDS / 10)
        return True

    def _gone(self, table: TaskTable) -> ServiceClosedError | None:
        now = time.monotonic()
        if now - self._looked < LIVENESS_SECONDS:
            return None
        self._looked = now
        try:
            check_server(table, self._began)
        except ServiceClosedError as error:
            return error
        return None


Settled = Exception | bool  # True: ready; else what the one who waits gets raised


def outcome_of(task: Task) -> Settled | None:
    """None: not ready, and nothing is wrong."""
    try:
        return task.ready() or None
    except (TaskExpiredError, ServiceClosedError) as error:
        return error


def complete(future: asyncio.Future[None], outcome: Settled) -> None:
    """Settle a future from another thread than its loop's."""

    def settle() -> None:
        if not future.done():
            if isinstance(outcome, Exception):
                future.set_exception(outcome)
            else:
                future.set_result(None)

    try:
        future.get_loop().call_soon_threadsafe(settle)
    except RuntimeError:
        pass  # the loop was closed: nobody awaits any more


_notifiers: weakref.WeakKeyDictionary[TaskTable, Notifier] = weakref.WeakKeyDictionary()
_notifiers_guard = threading.RLock()


def notifier_of(table: TaskTable) -> Notifier:
    """The one who tells of a table's tasks in this process."""
    with _notifiers_guard:
        return _notifiers.setdefault(table, Notifier(table))


def _after_fork_in_child() -> None:
    # The threads that tell are the parent's.
    global _notifiers_guard
    _notifiers_guard = threading.RLock()
    _notifiers.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
