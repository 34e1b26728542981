"""The lock of the queue: who has the queue in hand, and how that ends when the queue is closed.

A signal's handler or a finalizer may run in the middle of any step, in the thread that has the
queue in hand: it can wait for that thread neither to queue nor to close.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from light_mem.engine.task_table import TaskTable
from light_mem.errors import LockTimeoutError, ServiceClosedError
from light_mem.index.locks import LOCK_TIMEOUT_SECONDS, RangeLock

QUEUE_BYTE = 0  # byte of the table's memory object that is the queue's lock


class QueueLock:
    """Keeps apart the threads of this process, and it from the others. Any thread."""

    def __init__(self, table: TaskTable, lock: RangeLock) -> None:
        self._table = table
        self._lock = lock
        self._threads: Any = threading.RLock()
        self._holder = 0  # the thread that has the queue in hand
        self._again: list[Callable[[], None]] = []  # steps for the end of that
        self._closed = False

    @contextmanager
    def held(self, timeout: float | None = None) -> Iterator[None]:
        """Hold the queue; raises LockTimeoutError when its holder is stopped, and at once in the
        middle of another hold of this very thread.

        `timeout`: seconds to wait for it, LOCK_TIMEOUT_SECONDS as a rule.
        """
        timeout = LOCK_TIMEOUT_SECONDS if timeout is None else min(timeout, threading.TIMEOUT_MAX)
        deadline = time.monotonic() + timeout  # for both: threads wait together
        mine = self._threads._is_owned()  # further out
        try:
            if not self._threads.acquire(timeout=timeout):
                raise LockTimeoutError(
                    f"the queue was not free within {timeout:g} s: its holder is stopped",
                    path=self._lock.path,
                    byte=QUEUE_BYTE,
                    timeout=timeout,
                )
        except BaseException:
            if not mine and self._threads._is_owned():  # a signal's, once it was taken
                self._threads.release()
            raise
        try:
            if self._holder:
                raise LockTimeoutError(
                    "this very thread has the queue in hand",
                    path=self._lock.path,
                    byte=QUEUE_BYTE,
                    timeout=0.0,
                )
            # Before the look: `close` in the middle of this leaves the lock to a holder.
            self._holder = threading.get_ident()
            try:
                if self._closed:
                    raise ServiceClosedError("the service is closed")
                # Within: a signal may raise when the byte is taken and `lock` has not come back. To
                # free what is not held does nothing; no other thread of this process can hold it.
                try:
                    try:
                        self._lock.lock(QUEUE_BYTE, max(0.0, deadline - time.monotonic()))
                    except LockTimeoutError:
                        self._again.clear()  # no more in hand than it was: nothing undoes them
                        raise
                    yield
                finally:
                    try:
                        while self._again:
                            self._again.pop()()
                        self._lock.unlock(QUEUE_BYTE)
                    except BaseException:  # a signal's, before the lock was free: twice is as once
                        self._lock.unlock(QUEUE_BYTE)
                        raise
            finally:
                self._holder = 0
        finally:
            self._threads.release()
            if self._closed:
                self._close_if_free()

    @property
    def is_mine(self) -> bool:
        """Whether this thread has the queue in hand, further out: nobody claims meanwhile."""
        return self._holder == threading.get_ident()

    def do(self, step: Callable[[], None]) -> None:
        """Make a step that may be made twice with the queue in hand; raises LockTimeoutError. Does
        nothing once the queue is closed."""
        if not self.is_mine:
            try:
                with self.held():
                    step()
            except ServiceClosedError:
                pass
            return
        # The interrupted code may undo the step, so it is repeated.
        self._again.append(step)
        # It may also still be waiting for the byte, which a worker holds during a claim.
        self._lock.lock(QUEUE_BYTE)
        step()
        if self._table.shutdown:
            # Nobody queues or claims any more: workers that wait for the lock are to see that.
            self._lock.unlock(QUEUE_BYTE)

    def close(self) -> None:
        """Let go of the lock; whoever comes later gets ServiceClosedError. Who has the queue in
        hand, maybe this very thread, goes on, and lets go of the lock at the end."""
        self._closed = True
        self._close_if_free()

    def _close_if_free(self) -> None:
        # Each side looks after it has made its mark (closed; let go): one of them finds it free.
        if self._threads.acquire(blocking=False):
            try:
                if not self._holder:
                    self._lock.close()
            finally:
                self._threads.release()
