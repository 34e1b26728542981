"""What a batch shares with other processes: holds of locks, system calls, cache lines it changes.

A worker is run in this process, and watched while it does one batch at a time. Python tells of each
call of a C function, which system calls made from Python are; the futex wakes of the library go
through ctypes and are counted where they are made. Changed cache lines are found by comparing all
shared memory but the blocks' own bytes before and after: a line that is stored to ten times counts
once, as it does between CPUs while nobody else wants it.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt

import light_mem
from light_mem.engine.futex import FutexWords
from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.queue import TaskQueue
from light_mem.engine.task_table import TaskTable
from light_mem.engine.worker import Worker
from light_mem.index import file as index_file
from light_mem.index.file import IndexFile
from light_mem.index.locks import PathLock, RangeLock

LINE = 64
PAGE_BYTES = 4096
CALLS = frozenset(
    "open close read write pread preadv pwrite pwritev stat fstat lseek flock fcntl lockf "
    "ftruncate posix_fadvise fsync fdatasync getpid kill sleep flush madvise".split()
)


class Watched(light_mem.LocalCacheService):
    """A service whose worker runs in this process, one batch at a time."""

    def __init__(self, directory: Path, kv: Any, slots: int, shards: int) -> None:
        # A small table: all of it is compared.
        super().__init__(directory, slots * PAGE_BYTES, shards, kv, 1, max_blocks=512)
        table = self.table
        self._worker_engine = LocalStorageEngine(directory, kind="worker")
        self._worker_lock = RangeLock(table.lock_path())
        self._worker_queue = TaskQueue(table, self._worker_lock)
        self._worker = Worker(1, table, self._worker_queue, kv.numpy(), self._worker_engine)
        self.index = IndexFile(directory / index_file.NAME, self._worker_engine.geometry)

    @property
    def table(self) -> TaskTable:
        """Its task table."""
        return self._session.table

    def work(self) -> int:
        """Claim a batch and do it; how many blocks it had."""
        cells = self._worker_queue.claim(1)
        if cells:
            self._worker.do(cells)
        return len(cells)

    def areas(self) -> dict[str, npt.NDArray[Any]]:
        """Shared memory by who else may want the line at the same time."""
        table, index = self.table, self.index
        found: dict[str, npt.NDArray[Any]] = {
            # of all processes of this server
            "table: header": table.header,
            "table: rings": np.concatenate([_bytes(ring) for ring in table.rings.values()]),
            "table: states": table.states,
            # of the task's creator and its workers
            "table: cells": table.cells,
            "table: tasks": np.concatenate([_bytes(table.rows), _bytes(table.active)]),
            "table: page numbers": table.pages,
            # of one process each
            "table: own counters": np.concatenate([_bytes(table.workers), _bytes(table.lanes)]),
            "owners: own record": np.fromfile(index.path.parent / "owners", np.uint8),
            # of all processes of all servers
            "index: header": index.header,
            # of whoever holds the shard's lock, and of look-ups that find a block there
            "index: control": index.control,
            "index: chains": index.heads,
            "index: entries": index.entries,
            "index: uses": index.uses,
        }
        records = [
            self._worker_engine.file(shard).records
            for shard in range(self._worker_engine.geometry.shards)
        ]
        found["records"] = np.concatenate([_bytes(each) for each in records])
        return {name: _bytes(area).copy() for name, area in found.items()}

    def close(self) -> None:
        if not self._closed:
            self._worker_lock.close()
            self._worker_engine.close()
        super().close()


def _bytes(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(array).view(np.uint8).reshape(-1)


class Counts:
    """What happened inside `watch`."""

    def __init__(self) -> None:
        self.shard_locks = 0
        self.queue_locks = 0
        self.calls: Counter[str] = Counter()
        self.lines: dict[str, int] = {}


@contextmanager
def watch(service: Watched) -> Iterator[Counts]:
    """Count what this thread does inside."""
    counts = Counts()
    acquire, held, wake = PathLock.acquire, TaskQueue.held, FutexWords.wake

    def counted_acquire(self: PathLock, *arguments: Any, **options: Any) -> Any:
        counts.shard_locks += 1
        return acquire(self, *arguments, **options)

    def counted_held(self: TaskQueue, *arguments: Any) -> Any:
        counts.queue_locks += 1
        return held(self, *arguments)

    def counted_wake(self: FutexWords, *arguments: Any) -> None:
        counts.calls["futex"] += 1
        wake(self, *arguments)

    def look(frame: Any, event: str, function: Any) -> None:
        if event == "c_call" and function.__name__ in CALLS:
            counts.calls[function.__name__] += 1

    before = service.areas()
    with (
        mock.patch.object(PathLock, "acquire", counted_acquire),
        mock.patch.object(TaskQueue, "held", counted_held),
        mock.patch.object(FutexWords, "wake", counted_wake),
    ):
        sys.setprofile(look)
        try:
            yield counts
        finally:
            sys.setprofile(None)
    after = service.areas()
    for name, area in before.items():
        changed = np.unique(np.flatnonzero(area != after[name]) // LINE)
        counts.lines[name] = len(changed)


def measure(blocks: int, shards: int = 1, slots: int = 512) -> dict[str, Counts]:
    """A full store that evicts, warm: what one batch of `blocks` blocks costs, by what is done."""
    found: dict[str, Counts] = {}
    with tempfile.TemporaryDirectory(prefix="light-mem-sharing-") as name:
        kv = light_mem.allocate_kvcache(max(blocks, 64), PAGE_BYTES)
        with Watched(Path(name) / "store", kv, slots, shards) as service:
            generation = 0

            def hashes(count: int = blocks) -> list[int]:
                return [(generation << 64) + n for n in range(count)]

            def all_of_it(mode: str, count: int) -> None:
                task = service.create(mode, hashes(count), range(count))
                while not task.ready():
                    service.work()

            while service.stats(ages=False)["evictions"] < slots:
                generation += 1
                all_of_it("write", 64)
            generation += 1
            all_of_it("write", blocks)
            all_of_it("read", blocks)  # the files are mapped, the locks open
            done: dict[str, Callable[[], object]] = {
                "look-up": lambda: service.query(hashes()),
                "create": lambda: tasks.append(service.create("read", hashes(), range(blocks))),
                "read": service.work,
                "create ": lambda: tasks.append(service.create("write", hashes(), range(blocks))),
                "write": service.work,
                "poll": lambda: [task.ready() for task in tasks],
            }
            tasks: list[Any] = []
            for what, call in done.items():
                if what == "create ":
                    generation += 1
                with watch(service) as counts:
                    call()
                found[what.strip() + (" (write)" if what == "create " else "")] = counts
            if not all(task.ready() for task in tasks):
                raise RuntimeError(f"{blocks} blocks are more than one batch")
    return found
