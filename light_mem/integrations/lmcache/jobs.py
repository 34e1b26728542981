"""What passes between LMCache's threads and the thread that hands their jobs to the service."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from light_mem.task import CacheTask


@dataclass(eq=False)
class Job:
    """One store or load of LMCache.

    keys     LMCache's keys, for whoever gets the job back
    objects  LMCache's objects, one a key
    hashes   of the keys
    regions  (offset, length) of each object; None: LightMem cannot reach it
    nbytes   bytes of the blocks in `chosen`
    chosen   positions of the keys that are handed on: within reach, and not dropped
    done     one a key, when the job is over: it was loaded, or is stored
    """

    number: int
    load: bool
    keys: Sequence[Any]
    objects: Sequence[Any]
    hashes: Sequence[int]
    regions: Sequence[tuple[int, int] | None]
    nbytes: int = 0
    chosen: list[int] = field(default_factory=list)
    done: list[bool] = field(default_factory=list)
    submitted: float = field(default_factory=time.monotonic)
    # Set under the lock of Transfers: task n has TASK_BLOCKS of the chosen from n times that on.
    tasks: list[CacheTask] = field(default_factory=list)
    left: int = 1  # tasks that are not over, and the thread while it hands them on
    given_up: bool = False


class Discard(NamedTuple):
    """Blocks that are not to stay."""

    hashes: list[int]


class Doubts:
    """Hashes of which it is not known yet whether what is stored under them may stay. Each is in
    doubt as often as it was added and not removed. Any thread; `in` takes no lock."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self._guard = threading.Lock()

    def __contains__(self, value: int) -> bool:
        return value in self._counts

    def add(self, hashes: Iterable[int]) -> None:
        """One doubt more of each."""
        with self._guard:
            for h in hashes:
                self._counts[h] = self._counts.get(h, 0) + 1

    def remove(self, hashes: Iterable[int]) -> None:
        """One doubt less of each."""
        with self._guard:
            for h in hashes:
                left = self._counts[h] - 1
                if left:
                    self._counts[h] = left
                else:
                    del self._counts[h]


Item = Job | Discard | None


class Inbox:
    """Lines of the thread: loads first, then stores, then the rest. Whoever puts something in
    waits for nobody."""

    def __init__(self) -> None:
        self._lines: tuple[deque[Item], ...] = (deque(), deque(), deque())
        self._tokens: queue.SimpleQueue[None] = queue.SimpleQueue()  # one an item

    def put(self, item: Item) -> None:
        """Queue an item; None only wakes the thread. Returns at once. Any thread."""
        self._lines[_line(item)].append(item)
        self._tokens.put(None)

    def get(self, timeout: float | None) -> Item:
        """Sleep until there is an item, at most `timeout` seconds; None: there is none. One
        thread."""
        try:
            self._tokens.get(timeout=timeout)
        except queue.Empty:
            return None
        return next(line.popleft() for line in self._lines if line)

    def discards(self) -> list[list[int]]:
        """What is left to discard, when there is no thread any more."""
        return [item.hashes for item in self._lines[-1] if isinstance(item, Discard)]


def _line(item: Item) -> int:
    if isinstance(item, Job):
        return 0 if item.load else 1
    return 2
