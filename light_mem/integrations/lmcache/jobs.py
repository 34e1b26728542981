"""What passes between LMCache's threads and the thread that hands their jobs to the service."""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from light_mem.states import State
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
    # Set under the lock of UnderWay: task n has TASK_BLOCKS of the chosen from n times that on.
    tasks: list[CacheTask] = field(default_factory=list)
    left: int = 1  # tasks that are not over, and the thread while it hands them on
    given_up: bool = False
    spoiled: set[int] = field(default_factory=set)  # a load's: hashes that may be others' bytes

    def finished(self) -> list[int]:
        """Positions of the keys whose blocks are Finished, once all tasks are over: these have the
        first of the chosen."""
        states = [state for task in self.tasks for state in task.state()]
        chosen = zip(self.chosen, states, strict=False)
        return [at for at, state in chosen if state is State.Finished]


class Inbox:
    """Lines of the thread: loads first, then stores. Whoever puts something in waits for nobody."""

    def __init__(self) -> None:
        self._lines: tuple[deque[Job], deque[Job]] = (deque(), deque())
        self._tokens: queue.SimpleQueue[None] = queue.SimpleQueue()  # one a job, and one a wake

    def put(self, job: Job) -> None:
        """Queue a job. Returns at once. Any thread."""
        self._lines[0 if job.load else 1].append(job)
        self._tokens.put(None)

    def wake(self) -> None:
        """Let the thread look for a reason."""
        self._tokens.put(None)

    def get(self, timeout: float | None) -> Job | None:
        """Sleep until there is a job, at most `timeout` seconds; None: there is none. One
        thread."""
        try:
            self._tokens.get(timeout=timeout)
        except queue.Empty:
            return None
        return self._next()

    def drain(self) -> Iterator[Job]:
        """Take out all jobs, one by one. Any thread."""
        return iter(self._next, None)

    def _next(self) -> Job | None:
        for line in self._lines:
            try:
                return line.popleft()
            except IndexError:  # empty
                continue
        return None
