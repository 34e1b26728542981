"""TierTransfers: jobs between vLLM's primary tier and the store, without blocking the scheduler.

The scheduler's thread looks keys up, queues jobs and polls; each costs it microseconds. A thread
of its own hashes keys and calls `create`, which takes the lock of the service's queue and may wait
for a stopped process there. A job's tasks then come back to the scheduler, which polls them: that
is a look at a few bytes, and no thread has to wake for a load to be noticed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Collection
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from light_mem.errors import LightMemError
from light_mem.integrations.vllm.jobs import Fence, Inbox, Item, Job, Stop, Touch
from light_mem.integrations.vllm.namespace import Namespace
from light_mem.logs import Limited
from light_mem.service import CacheService
from light_mem.task import State

log = logging.getLogger("light_mem")

TASK_BLOCKS = 1024  # a larger job is several tasks: one that finds no room loses less
MAX_WAITING_TOUCHES = 256
MAX_UNLOADABLE = 4096  # requests
_WARN_SECONDS = 30.0  # between two warnings of one kind
_DRAIN_WARN_SECONDS = 5.0
_JOIN_SECONDS = 30.0


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


class TierTransfers:
    """The logic of the tier, free of vLLM's types.

    Calls come from one thread at a time, the scheduler's. Only `drain` and `close` wait.

    service       a running service whose pages are the rows of the primary tier
    max_queued    blocks of stores that may be under way; what a store has beyond is dropped
    load_timeout  seconds after which a load gives up the blocks that nobody has begun
    """

    def __init__(
        self,
        service: CacheService,
        namespace: Namespace,
        *,
        max_queued: int,
        load_timeout: float,
    ) -> None:
        self._service: CacheService | None = service
        self._namespace = namespace
        self._row_bytes = service.page_size()
        self._max_queued = max_queued
        self._load_timeout = load_timeout
        self._inbox = Inbox()
        self._placed: deque[Job] = deque()  # from the thread, not yet seen by the scheduler
        self._flying: list[Job] = []
        self._over: list[Finished] = []  # to be told at the next poll
        self._storing = 0  # blocks of stores that are under way
        self._unloadable: dict[str, set[bytes]] = {}  # by request
        # As text, all of it: an exception in a log record would keep its frames, and the memory.
        self._limited = Limited(each=1, seconds=_WARN_SECONDS)
        self._stopping = False
        self.counters: Counter[str] = Counter()
        self._thread = threading.Thread(target=self._run, name="lightmem-vllm", daemon=True)
        self._thread.start()

    # --- the scheduler's side --------------------------------------------------------------------

    def lookup(self, key: bytes, request: str) -> bool:
        """Whether the key is stored. No lock. A key that this request could not load counts as
        missing to it, else it would try again for ever."""
        unloadable = self._unloadable.get(request)
        if self._service is None or (unloadable is not None and key in unloadable):
            return False
        try:
            found: bool = self._service.query(self._namespace.hash(key))
        except LightMemError as error:  # closed, or without workers
            self._limited.warning("look-ups fail: %s", str(error))
            return False
        return found

    def store(
        self, job_id: int, keys: Collection[bytes], rows: npt.NDArray[np.int64], request: str
    ) -> None:
        """Queue a store. Blocks for which the queue has no room are dropped and counted."""
        job = Job(job_id, False, list(keys), np.asarray(rows), request)
        room = max(0, self._max_queued - self._storing)
        if len(job.keys) > room:
            job.dropped = len(job.keys) - room
            job.keys, job.rows = job.keys[:room], job.rows[:room]
            self._limited.warning(
                "%d blocks of a store of %d are dropped: at most %d may be under way",
                job.dropped,
                job.dropped + room,
                self._max_queued,
            )
        self._storing += len(job.keys)
        self._submit(job)

    def load(
        self, job_id: int, keys: Collection[bytes], rows: npt.NDArray[np.int64], request: str
    ) -> None:
        """Queue a load. The primary tier bounds how many there are: each block has its own row."""
        self._submit(Job(job_id, True, list(keys), np.asarray(rows), request))

    def finished(self) -> list[Finished]:
        """Jobs that are over since the last call, each once."""
        while self._placed:
            self._flying.append(self._placed.popleft())
        if self._flying:
            now = time.monotonic()
            self._flying = [job for job in self._flying if not self._settle(job, now)]
        over, self._over = self._over, []
        return over

    def touch(self, keys: Collection[bytes]) -> None:
        """Count the keys as used, soon; left out when the thread is behind."""
        if self._inbox.waiting() < MAX_WAITING_TOUCHES and not self._stopping:
            self._inbox.put(Touch(list(keys)))

    def forget(self, request: str) -> None:
        """The request is over."""
        self._unloadable.pop(request, None)

    def drain(self, timeout: float | None = None) -> bool:
        """Wait until no job touches the primary tier; their results come with the next poll.

        False: not within `timeout` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        fence = threading.Event()
        self._inbox.put(Fence(fence))
        while not fence.wait(_left(deadline)):
            if not self._thread.is_alive():
                return True
            if deadline is not None and time.monotonic() >= deadline:
                return False
            log.warning("the vLLM tier waits for its thread")
        while self._placed:
            self._flying.append(self._placed.popleft())
        for task in [task for job in self._flying for task in job.tasks]:
            while not task.wait(_left(deadline)):
                if deadline is not None and time.monotonic() >= deadline:
                    return False
                log.warning("the vLLM tier waits for %s", task)
        return True

    def queued(self) -> int:
        """Blocks of stores that are under way."""
        return self._storing

    def close(self, timeout: float) -> None:
        """Finish what is under way for at most `timeout` seconds, then give up the rest, and let
        go of the service, its workers and the memory. Calling it again does nothing."""
        service = self._service
        if service is None:
            return
        if not self._stopping and not self.drain(timeout):
            log.warning("the vLLM tier closes with jobs under way: they are given up")
        self._stopping = True
        self._inbox.put(Touch([]))  # wakes the thread
        self._thread.join(_JOIN_SECONDS)
        service.close()
        self.finished()
        self._service = None

    def _submit(self, job: Job) -> None:
        if self._stopping or not job.keys:
            self._placed.append(job)  # without tasks: over, without success
        else:
            self._inbox.put(job)

    def _settle(self, job: Job, now: float) -> bool:
        """Whether the job is over; then it is in `_over`."""
        if not all(task.ready() for task in job.tasks):
            if job.load and not job.timed_out and now - job.submitted > self._load_timeout:
                job.timed_out = True
                self._limited.warning("a load takes longer than %g s", self._load_timeout)
                self._inbox.put(Stop(job.tasks))
            return False
        count = sum(task.count(State.Finished) for task in job.tasks)
        success = count == len(job.keys) and not job.dropped
        done = tuple(job.keys) if count == len(job.keys) else _done_keys(job)
        if job.load:
            self._note_load(job, done)
        else:
            self._note_store(job, count)
        self._over.append(
            Finished(
                job.job_id, job.load, success, done, count * self._row_bytes, now - job.submitted
            )
        )
        return True

    def _note_store(self, job: Job, count: int) -> None:
        self._storing -= len(job.keys)
        refused = max(0, len(job.keys) - TASK_BLOCKS * len(job.tasks))
        self.counters["stored_blocks"] += count
        self.counters["failed_store_blocks"] += len(job.keys) - count - refused
        if refused or job.dropped:
            self.counters["dropped_stores"] += 1
            self.counters["dropped_blocks"] += refused + job.dropped

    def _note_load(self, job: Job, done: tuple[bytes, ...]) -> None:
        self.counters["loaded_blocks"] += len(done)
        missing = len(job.keys) - len(done)
        if missing:
            self.counters["failed_load_blocks"] += missing
            self._unloadable.setdefault(job.request, set()).update(set(job.keys).difference(done))
            if len(self._unloadable) > MAX_UNLOADABLE:  # loads that ended after their request
                del self._unloadable[next(iter(self._unloadable))]
            self._limited.warning(
                "%d of %d blocks could not be loaded; vLLM computes them", missing, len(job.keys)
            )

    # --- the thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            item = self._inbox.get()
            if self._stopping:
                return
            try:
                self._do(item)
            except Exception as error:  # the tier goes on; what was asked for has failed
                self._limited.warning("the vLLM tier: %s", str(error))
            finally:
                if isinstance(item, Job):
                    self._placed.append(item)
                elif isinstance(item, Fence):
                    item.passed.set()
            del item  # the memory of its job

    def _do(self, item: Item) -> None:
        service = self._service
        assert service is not None
        if isinstance(item, Job):
            self._place(service, item)
        elif isinstance(item, Touch):
            service.touch(self._namespace.hashes(item.keys))
        elif isinstance(item, Stop):
            for task in item.tasks:
                service.abort(task)

    def _place(self, service: CacheService, job: Job) -> None:
        for start in range(0, len(job.keys), TASK_BLOCKS):
            part = slice(start, start + TASK_BLOCKS)
            hashes = self._namespace.hashes(job.keys[part])
            try:
                task = service.create("read" if job.load else "write", hashes, job.rows[part])
            except LightMemError as error:  # no room, a stopped holder of the queue, closed
                what = "load" if job.load else "store"
                self._limited.warning(f"a {what} is refused: %s", str(error))
                return
            job.tasks.append(task)


def _done_keys(job: Job) -> tuple[bytes, ...]:
    states = [state for task in job.tasks for state in task.state()]
    return tuple(k for k, s in zip(job.keys, states, strict=False) if s is State.Finished)


def _left(deadline: float | None) -> float:
    if deadline is None:
        return _DRAIN_WARN_SECONDS
    return max(0.0, min(_DRAIN_WARN_SECONDS, deadline - time.monotonic()))
