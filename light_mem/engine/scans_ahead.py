"""The scans that a write in the caller's thread must not make, made ahead of it by another thread.

Such a write takes what free space and which blocks to evict are known; where that is not enough it
is left to the workers, and its shard is scanned for the next one. A shard in which nobody makes
such writes is never scanned. Where scans do not help (others change its free space all the time)
they become rare.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from queue import SimpleQueue

from light_mem.engine.one_thread import OneThread
from light_mem.errors import LockTimeoutError, ServiceClosedError, StoreFormatError
from light_mem.index.locks import LOCK_TIMEOUT_SECONDS

# Seconds between two scans of a shard: so many times what one took, at least; and at most, of a
# shard in which nothing was written since the last one.
PART, MOST_SECONDS = 10, 60.0

log = logging.getLogger("light_mem")

Scan = Callable[[], object]


class ScansAhead:
    """Sees to the shards of one engine. `refused` and `wrote` from the thread that writes, `start`
    and `close` from any, in signals' handlers and finalizers too.

    Its thread sleeps until a shard is wanted. A forked child has none, and may write nothing.
    """

    def __init__(self, prepare: Callable[[int], object]) -> None:
        """`prepare` makes all scans of a shard, some of them under its lock."""
        self._prepare = prepare
        self._wanted: set[int] = set()  # those in the queue, and the one that is being scanned
        # Its `put` may be interrupted by another one.
        self._queue: SimpleQueue[tuple[int, Scan | None]] = SimpleQueue()
        self._written: set[int] = set()  # shards written to since they were scanned
        self._not_before: dict[int, float] = {}
        self._pauses: dict[int, float] = {}
        self._thread = OneThread("lightmem-scan")
        self._closed = False

    def start(self) -> None:
        """Begin to scan, once."""
        self._thread.start(self._run)

    def refused(self, shard: int, scan: Scan | None = None) -> None:
        """A block was not written for want of a scan; `scan`: it does for the next ones, as
        `ShardIndex.sorting` without the lock."""
        if shard not in self._wanted and time.monotonic() >= self._not_before.get(shard, 0):
            self._wanted.add(shard)
            self._queue.put((shard, scan))

    def wrote(self, shard: int, scan: Scan | None = None) -> None:
        """A block was written; `scan`: what the next ones will want."""
        self._written.add(shard)
        if scan is not None:
            self.refused(shard, scan)

    def _run(self) -> None:
        queue = self._queue  # `close` replaces it
        while True:
            if self._is_over():  # closed by this very thread, in a finalizer: nobody wakes it
                return
            shard, scan = queue.get()
            if self._is_over():
                return
            started = time.monotonic()
            try:
                if scan is None:
                    self._prepare(shard)
                else:
                    scan()
            except (LockTimeoutError, OSError, StoreFormatError, ServiceClosedError):
                pass  # the worker that writes the block says what is wrong
            except Exception as error:  # the next shards are scanned all the same
                log.warning("shard %d could not be scanned: %r", shard, error)
            scan = None  # it holds the mapped index
            ended = time.monotonic()
            pause = PART * (ended - started)
            if shard not in self._written:
                pause = min(max(pause, 2 * self._pauses.get(shard, 0)), MOST_SECONDS)
            self._pauses[shard] = pause
            self._not_before[shard] = ended + pause
            self._written.discard(shard)
            self._wanted.discard(shard)  # last: now it may be wanted again

    def _is_over(self) -> bool:
        return self._closed

    def close(self) -> None:
        """When this returns the thread has ended; unless it needs what the caller holds further
        up, for as long as LOCK_TIMEOUT_SECONDS: it ends later then, and scans nothing more."""
        self._closed = True
        queue = self._queue
        self._thread.end(lambda: queue.put((-1, None)), LOCK_TIMEOUT_SECONDS)
        self._queue = SimpleQueue()  # what is left there holds the mapped index
