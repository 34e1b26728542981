"""What passes between vLLM's scheduler and the thread that hands its jobs to the service."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Event
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from light_mem.task import CacheTask


@dataclass(eq=False)
class Job:
    """One load or store: row `rows[i]` of the primary tier holds, or shall hold, `keys[i]`."""

    job_id: int
    load: bool
    keys: list[bytes]
    rows: npt.NDArray[np.int64]
    request: str
    dropped: int = 0  # blocks of the scheduler's job that are not in `keys`
    submitted: float = field(default_factory=time.monotonic)
    # Set by the thread before it hands the job back. Task n has TASK_BLOCKS keys from n times
    # that on; the keys behind the last task were refused.
    tasks: list[CacheTask] = field(default_factory=list)
    timed_out: bool = False


class Touch(NamedTuple):
    """Keys that count as used."""

    keys: list[bytes]


class Stop(NamedTuple):
    """Tasks that take too long: what nobody has begun is not to be begun."""

    tasks: Sequence[CacheTask]


class Fence(NamedTuple):
    """`passed` is set when everything queued before is with the service."""

    passed: Event


Item = Job | Touch | Stop | Fence


class Inbox:
    """Queues of the thread: stops first, then loads, stores, and the rest. No lock is ever held
    while Python code runs, so whoever puts something in waits for nobody."""

    def __init__(self) -> None:
        self._lines: tuple[deque[Item], ...] = (deque(), deque(), deque(), deque())
        self._tokens: SimpleQueue[None] = SimpleQueue()  # one an item

    def put(self, item: Item) -> None:
        """Queue an item; returns at once. Any thread."""
        self._lines[_line(item)].append(item)
        self._tokens.put(None)

    def get(self) -> Item:
        """Sleep until there is an item; the most urgent one. One thread."""
        self._tokens.get()
        return next(line.popleft() for line in self._lines if line)

    def waiting(self) -> int:
        """Items in the line of those that may wait."""
        return len(self._lines[-1])


def _line(item: Item) -> int:
    if isinstance(item, Stop):
        return 0
    if isinstance(item, Job):
        return 1 if item.load else 2
    return 3
