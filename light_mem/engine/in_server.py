"""What the server's own process does of the workers' work.

To queue a block, to wake a worker and to be told by it takes several times as long as to move a
short block.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.table_layout import READ, WORKER, words_of
from light_mem.engine.task_table import TaskTable, latency_at
from light_mem.index.locks import LOCK_TIMEOUT_SECONDS

_WORDS = words_of(WORKER)


class InServer:
    """Blocks of one mode, READ or WRITE, moved by the thread that asks. Any thread; one at a time:
    the others are refused, and leave theirs to the workers."""

    def __init__(self, engine: LocalStorageEngine, table: TaskTable, mode: int) -> None:
        self._engine = engine
        # Numbers of worker 0, who stands for the server.
        self._numbers = table.worker_words(0)
        self._latencies, self._latency_at = table.latencies, latency_at(0, mode)
        reading = mode == READ
        self._blocks_word = _WORDS["blocks_read" if reading else "blocks_written"]
        self._bytes_word = _WORDS["bytes_read" if reading else "bytes_written"]
        self._time_word = _WORDS["read_ns" if reading else "write_ns"]
        # Reentrant: a signal handler or finalizer may call `close` in the middle of a block. If it
        # tries to move another block, it is refused like another thread.
        self._guard: Any = threading.RLock()
        self._busy = False
        self._closed = False

    @contextmanager
    def _turn(self) -> Iterator[bool]:
        """Have the turn; False: somebody has it, or it is closed."""
        mine = self._guard._is_owned()  # further out
        try:
            taken = self._guard.acquire(blocking=False)
        except BaseException:
            if not mine and self._guard._is_owned():  # a signal's, once it was taken
                self._guard.release()
            raise
        if not taken:
            yield False
            return
        try:
            if self._closed or self._busy:
                yield False
                return
            self._busy = True
            try:
                yield True
            finally:
                self._busy = False
        finally:
            self._guard.release()

    def _was_closed(self) -> bool:
        """Whether it was closed in the middle of the block, by this very thread, or by another one
        that did not wait any longer."""
        return self._closed

    def _count(self, blocks: int, nbytes: int, started: int) -> None:
        """Count blocks that were moved since `started`, ns."""
        spent = time.perf_counter_ns() - started
        numbers = self._numbers
        numbers[self._blocks_word] += blocks
        numbers[self._bytes_word] += nbytes
        numbers[self._time_word] += spent
        self._latencies.add(self._latency_at, spent)

    def close(self) -> None:
        """When this returns, no block is being moved here and none will be. Except: a block that
        the calling thread itself is in the middle of, and one in another thread that takes longer
        than LOCK_TIMEOUT_SECONDS (a device that hangs). These end later, and what became of them
        is discarded."""
        waited = self._guard.acquire(timeout=LOCK_TIMEOUT_SECONDS)
        self._closed = True
        if waited:
            self._guard.release()
