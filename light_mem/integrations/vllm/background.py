"""Background: the two threads that do the jobs of vLLM's scheduler.

One places jobs: it hashes keys and calls `create`, which takes the lock of the service's queue and
may wait for a stopped process there. The other settles them: it sleeps until a task of the service
becomes ready and makes the results, which the scheduler only picks up.

Both share the interpreter with the scheduler. A thread that wants the interpreter back waits for as
long as the one that has it runs, up to the switch interval (5 ms), so both work in slices of some
100 us and sleep between them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from itertools import islice
from typing import Any, NamedTuple

from light_mem.errors import LightMemError, LockTimeoutError
from light_mem.integrations.namespace import Namespace
from light_mem.integrations.vllm.jobs import Fence, Finished, Inbox, Item, Job, Stop, Touch
from light_mem.logs import Limited
from light_mem.service import CacheService
from light_mem.states import State

log = logging.getLogger("light_mem")

TASK_BLOCKS = 64  # of one `create`: a slice
_YIELD_SECONDS = 50e-6  # longer than a waiting thread needs to wake up and take the interpreter
_SCAN_JOBS = 64  # looked at in one slice
_RESCAN_SECONDS = 0.001  # to the next slice, when there are more
_LOOK_SECONDS = 0.1  # at the latest, while loads are under way: they may take too long
_STORE_SECONDS = 0.01  # between two looks when nobody waits: each takes the interpreter
_WARN_SECONDS = 30.0  # between two warnings of one kind
_DRAIN_WARN_SECONDS = 5.0
_JOIN_SECONDS = 30.0


class Result(NamedTuple):
    """What the scheduler picks up: what was made of `Finished`, and what a load did not find."""

    told: Any
    request: str
    missing: frozenset[bytes]


class Background:
    """Does jobs, touches and drains. `inbox`, `results`, `counters` and `settled` are read by one
    other thread, the scheduler's, without a lock.

    results   deque of Result: a job that is over each
    settled   blocks of stores that are over
    counters  by the names of the tier's metrics
    """

    def __init__(
        self,
        service: CacheService,
        namespace: Namespace,
        load_timeout: float,
        tell: Callable[[Finished], Any],
    ) -> None:
        self.inbox = Inbox()
        self.results: deque[Result] = deque()
        self.settled = 0
        self.counters: Counter[str] = Counter()
        # As text, all of it: an exception in a log record would keep its frames, and the memory.
        self.limited = Limited(each=1, seconds=_WARN_SECONDS)
        self.stopping = False
        self._service: CacheService | None = service
        self._namespace = namespace
        self._row_bytes = service.page_size()
        self._load_timeout = load_timeout
        self._tell = tell
        # Of the two threads and of whoever drains; the scheduler's calls never take it.
        self._changed = threading.Condition()
        self._flying: dict[int, Job] = {}  # by id(): those with tasks under way
        self._awaited = 0  # loads among them, and callers of `drain`
        self._threads = [
            threading.Thread(target=self._place_jobs, name="lightmem-vllm-place", daemon=True),
            threading.Thread(target=self._settle_jobs, name="lightmem-vllm-settle", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def drain(self, timeout: float | None) -> bool:
        """Wait until what was queued before is over and its results can be picked up."""
        deadline = None if timeout is None else time.monotonic() + timeout
        fence = Fence()
        self.inbox.put(fence, urgent=True)
        with self._changed:
            self._awaited += 1
            self._changed.notify_all()
            try:
                return self._wait_for(fence, deadline)
            finally:
                self._awaited -= 1

    def _wait_for(self, fence: Fence, deadline: float | None) -> bool:
        while not fence.passed or self._flying:
            left = _left(deadline)
            if left <= 0:
                return False
            if not all(thread.is_alive() for thread in self._threads):
                return not self._flying
            if not self._changed.wait(left) and deadline is None:
                log.warning("the vLLM tier waits for %d jobs", len(self._flying))
        return True

    def close(self) -> None:
        """End the threads, close the service, and make results of all that is left."""
        service = self._service
        if service is None:
            return
        self.stopping = True
        self.inbox.wake()
        with self._changed:
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(_JOIN_SECONDS)
        service.close()
        with self._changed:
            for job in list(self._flying.values()):
                self._settle(job)
        while (item := self.inbox.pop()) is not None:
            if isinstance(item, Job):
                self.finish(item)
        self._service = None

    # --- placing ---------------------------------------------------------------------------------

    def _place_jobs(self) -> None:
        while not self.stopping:
            item = self.inbox.get()
            if item is None:
                continue
            try:
                self._do(item)
            except Exception as error:  # the tier goes on; what was asked for has failed
                self.limited.warning("the vLLM tier: %s", str(error))
            if isinstance(item, Job):
                self._watch(item)
            elif isinstance(item, Fence):
                with self._changed:
                    item.passed = True
                    self._changed.notify_all()
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
                try:
                    service.abort(task, timeout=0.0)
                except LockTimeoutError:
                    pass  # a worker still copies: the task is under way until it lets go

    def _place(self, service: CacheService, job: Job) -> None:
        if job.dropped:
            service.count_dropped(job.dropped)
        for start in range(0, len(job.keys), TASK_BLOCKS):
            if start:
                time.sleep(_YIELD_SECONDS)
            part = slice(start, start + TASK_BLOCKS)
            hashes = self._namespace.hashes(job.keys[part])
            try:
                task = service.create("read" if job.load else "write", hashes, job.rows[part])
            except LightMemError as error:  # no room, a stopped holder of the queue, closed
                what = "load" if job.load else "store"
                self.limited.warning(f"a {what} is refused: %s", str(error))
                return
            job.tasks.append(task)

    def _watch(self, job: Job) -> None:
        # One hold: a task that was ready before is seen here, one that is ready later changes the
        # mark that the other thread waits on.
        with self._changed:
            self._flying[id(job)] = job
            self._awaited += job.load
            if not self._settle(job) and (job.load or len(self._flying) == 1):
                self._changed.notify_all()

    # --- settling --------------------------------------------------------------------------------

    def _settle_jobs(self) -> None:
        service = self._service
        assert service is not None
        while True:
            with self._changed:
                while not self._flying and not self.stopping:
                    self._changed.wait()
                if not self._awaited and not self.stopping:
                    self._changed.wait(_STORE_SECONDS)
                awaited = self._awaited > 0
            if self.stopping:
                return
            mark = service.ready_mark()
            more = self._look()
            if awaited:
                service.wait_ready(mark, _RESCAN_SECONDS if more else _LOOK_SECONDS)

    def _look(self) -> bool:
        """Settle what is over among the first jobs; whether there are more than those."""
        with self._changed:
            for job in list(islice(self._flying.values(), _SCAN_JOBS)):
                if not self._settle(job):  # to the end of the line
                    self._flying[id(job)] = self._flying.pop(id(job))
            return len(self._flying) > _SCAN_JOBS

    def _settle(self, job: Job) -> bool:
        """Whether the job is over; then it has a result. The lock is held."""
        try:
            if not all(task.ready() for task in job.tasks):
                self._check_time(job)
                return False
            self.finish(job)
        except Exception as error:  # it would be under way for ever
            self.limited.warning("the vLLM tier: %s", str(error))
            job.tasks.clear()
            self.finish(job)
        del self._flying[id(job)]
        self._awaited -= job.load
        if not self._flying:
            self._changed.notify_all()
        return True

    def _check_time(self, job: Job) -> None:
        late = job.load and time.monotonic() - job.submitted > self._load_timeout
        if late and not job.timed_out:
            job.timed_out = True
            self.limited.warning("a load takes longer than %g s", self._load_timeout)
            self.inbox.put(Stop(job.tasks), urgent=True)

    def finish(self, job: Job) -> None:
        """Make the result of a job whose tasks are all ready."""
        count = sum(task.count(State.Finished) for task in job.tasks)
        done = tuple(job.keys) if count == len(job.keys) else _done_keys(job)
        success = count == len(job.keys) and not job.dropped
        seconds = time.monotonic() - job.submitted
        finished = Finished(job.job_id, job.load, success, done, count * self._row_bytes, seconds)
        missing: frozenset[bytes] = frozenset()
        if job.load:
            missing = frozenset(job.keys).difference(done)
            self._note_load(job, len(done))
        else:
            self._note_store(job, count)
        self.results.append(Result(self._tell(finished), job.request, missing))

    def _note_store(self, job: Job, count: int) -> None:
        self.settled += len(job.keys)
        refused = max(0, len(job.keys) - TASK_BLOCKS * len(job.tasks))
        self.counters["stored_blocks"] += count
        self.counters["failed_store_blocks"] += len(job.keys) - count - refused
        if refused or job.dropped:
            self.counters["dropped_stores"] += 1
            self.counters["dropped_blocks"] += refused + job.dropped

    def _note_load(self, job: Job, done: int) -> None:
        self.counters["loaded_blocks"] += done
        missing = len(job.keys) - done
        if missing:
            self.counters["failed_load_blocks"] += missing
            self.limited.warning(
                "%d of %d blocks could not be loaded; vLLM computes them", missing, len(job.keys)
            )


def _done_keys(job: Job) -> tuple[bytes, ...]:
    states = [state for task in job.tasks for state in task.state()]
    return tuple(k for k, s in zip(job.keys, states, strict=False) if s is State.Finished)


def _left(deadline: float | None) -> float:
    if deadline is None:
        return _DRAIN_WARN_SECONDS
    return deadline - time.monotonic()
