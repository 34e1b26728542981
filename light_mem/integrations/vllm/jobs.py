"""What passes between vLLM's scheduler and the threads that do its jobs."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from light_mem.task import CacheTask

# Between two looks for stores while there are some now and then, and how long that goes on after
# the last one. Then the thread sleeps until it is woken.
_NAP_SECONDS = 0.01
_LINGER_SECONDS = 1.0


@dataclass(eq=False, slots=True)
class Job:
    """One load or store: row `rows[i]` of the primary tier holds, or shall hold, `keys[i]`."""

    job_id: int
    load: bool
    keys: list[bytes]
    rows: npt.NDArray[np.int64]
    request: str
    dropped: int = 0  # blocks of the scheduler's job that are not in `keys`
    submitted: float = field(default_factory=time.monotonic)
    # Set by the thread that places jobs. Task n has TASK_BLOCKS keys from n times that on; the
    # keys behind the last task were refused.
    tasks: list[CacheTask] = field(default_factory=list)
    timed_out: bool = False


class Finished(NamedTuple):
    """One job that is over.

    done     keys that were loaded, or are stored now; all of the job's, if `success`
    nbytes   bytes of these keys
    seconds  since the scheduler submitted it
    """

    job_id: int
    load: bool
    success: bool
    done: tuple[bytes, ...]
    nbytes: int
    seconds: float


class Touch(NamedTuple):
    """Keys that count as used."""

    keys: list[bytes]


class Stop(NamedTuple):
    """Tasks that take too long: what nobody has begun is not to be begun."""

    tasks: Sequence[CacheTask]


@dataclass(eq=False)
class Fence:
    """`passed` when everything queued before is with the service."""

    passed: bool = False


Item = Job | Touch | Stop | Fence


class Inbox:
    """Queues of the thread that places jobs: stops first, then loads, stores, and the rest.

    No lock is ever held while Python code runs, so whoever puts something in waits for nobody.
    To wake a sleeper is a system call that costs the caller its processor when another thread
    wants it, and so up to some milliseconds: only what is urgent does that. The rest is found by
    the thread itself, within a nap.
    """

    def __init__(self) -> None:
        self._lines: tuple[deque[Item], ...] = (deque(), deque(), deque(), deque())
        self._wake: SimpleQueue[None] = SimpleQueue()
        self._napping = False
        self._asleep = False
        self._busy_until = 0.0

    def put(self, item: Item, urgent: bool = False) -> None:
        """Queue an item; returns at once. Any thread."""
        self._lines[_line(item)].append(item)
        if self._asleep or (urgent and self._napping):
            self._wake.put(None)

    def wake(self) -> None:
        """Let `get` return soon."""
        self._wake.put(None)

    def get(self) -> Item | None:
        """The most urgent item; sleeps until there is one. None: woken without one. One thread."""
        while True:
            item = self.pop()
            if item is not None:
                self._busy_until = time.monotonic() + _LINGER_SECONDS
                return item
            if self._doze():
                return self.pop()

    def pop(self) -> Item | None:
        """The most urgent item, if there is one."""
        for line in self._lines:
            if line:
                return line.popleft()
        return None

    def waiting(self) -> int:
        """Items in the line of those that may wait."""
        return len(self._lines[-1])

    def _doze(self) -> bool:
        """Sleep for a nap, or until woken where nothing came for long; whether it was woken."""
        long = time.monotonic() > self._busy_until
        self._napping, self._asleep = True, long
        try:
            # After the flags: what was put in before they were seen is found now.
            if any(self._lines):
                return False
            self._wake.get(timeout=None if long else _NAP_SECONDS)
        except Empty:
            return False
        finally:
            self._napping = self._asleep = False
        while not self._wake.empty():
            self._wake.get()
        return True


def _line(item: Item) -> int:
    if isinstance(item, Job):
        return 1 if item.load else 2
    return 0 if isinstance(item, Stop) else 3
