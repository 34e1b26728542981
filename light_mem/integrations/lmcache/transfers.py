"""Transfers: stores and loads between LMCache's L1 pool and the store, without blocking LMCache.

LMCache's threads queue jobs; that costs them microseconds. A thread of our own calls `create`,
which takes the lock of the service's queue and may wait there for a stopped process. The thread
that tells of ready tasks hands each job back when its last task is over. Nobody polls; a thread
that has nothing to do sleeps without a time-out.

LMCache keeps the memory of a job's objects until the job is over, but not for ever: its locks have
a time to live (300 s for stores, 600 s for loads), and an operator may clear L1 by force. So a job
ends long before: what nobody has begun is given up. And what was stored from an object that LMCache
has let go of meanwhile, or too late, is taken out again: it may be another one's bytes. Until that
is known of a block, look-ups and loads of this server do not find it; it is in L1 then anyway.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from light_mem.errors import LightMemError, ServiceClosedError
from light_mem.integrations.lmcache.discards import Discards, Doubts
from light_mem.integrations.lmcache.jobs import Inbox, Job
from light_mem.integrations.lmcache.under_way import UnderWay
from light_mem.local_service import LocalCacheService
from light_mem.logs import Limited
from light_mem.task import CacheTask

log = logging.getLogger("light_mem")

TASK_BLOCKS = 1024  # a larger job is several tasks: one that finds no room loses less
_WARN_SECONDS = 30.0  # between two warnings of one kind
# For each of the steps of `close` that wait for others: the thread, workers, locks of shards.
_CLOSE_SECONDS = 30.0
_ABORT_SECONDS = 2.0  # a worker that lives answers in milliseconds


class Transfers:
    """The logic of the adapter, free of LMCache's types. Any thread; only `close` waits.

    service        a running service whose tensor is the L1 pool
    finished       called with each job that is over, once, from whichever thread; returns soon
    is_held        whether an object of LMCache still has its memory
    max_queued     bytes of stores that may be under way; what a store has beyond is dropped
    store_timeout  seconds after which a store is given up
    load_timeout   seconds after which a load gives up the blocks that nobody has begun
    """

    def __init__(
        self,
        service: LocalCacheService,
        finished: Callable[[Job], None],
        is_held: Callable[[Any], bool],
        *,
        max_queued: int,
        store_timeout: float,
        load_timeout: float,
    ) -> None:
        self._open: LocalCacheService | None = service
        self._finished = finished
        self._is_held = is_held
        self._under_way = UnderWay(max_queued, {True: load_timeout, False: store_timeout})
        self._inbox = Inbox()
        self._numbers = itertools.count()
        self._doubts = Doubts()
        self._discards = Discards(lambda hashes: self.service().delete(hashes), self._doubts)
        self._stopping = False
        self._closing = threading.RLock()  # a signal's handler may close what its thread closes
        self.counters: Counter[str] = Counter()
        # As text, all of it: an exception in a log record would keep its frames, and the memory.
        self._limited = Limited(each=1, seconds=_WARN_SECONDS)
        self._thread = threading.Thread(target=self._run, name="lightmem-lmcache", daemon=True)
        self._thread.start()

    # --- LMCache's side --------------------------------------------------------------------------

    def service(self) -> LocalCacheService:
        """The service, for all that is neither store nor load; ServiceClosedError after `close`."""
        service = self._open
        if service is None:
            raise ServiceClosedError("LMCache's adapter is closed")
        return service

    def find(self, hashes: Sequence[int]) -> list[bool]:
        """Which hashes are stored for certain; counts as use. No lock is waited for."""
        found: list[bool] = self.service().query(hashes)
        # After the query: what is sure by then has been seen whole, or is gone to the load.
        doubts = self._doubts
        return [hit and h not in doubts for hit, h in zip(found, hashes, strict=True)]

    def number(self) -> int:
        """A number that no other task has."""
        return next(self._numbers)

    def store(
        self,
        keys: Sequence[Any],
        objects: Sequence[Any],
        hashes: Sequence[int],
        regions: Sequence[tuple[int, int] | None],
    ) -> int:
        """Queue a store; returns the number of its job. What has no room is dropped from the end,
        for LMCache finds prefixes, and counted."""
        job = Job(self.number(), False, keys, objects, hashes, regions)
        dropped = self._under_way.choose(job)
        self._doubts.add(job.hashes[at] for at in job.chosen)
        if dropped:
            self._count_dropped(dropped)
            self._limited.warning(
                "%d objects of a store of %d are dropped: at most %d bytes may be under way",
                dropped,
                len(keys),
                self._under_way.max_queued,
            )
        self._submit(job)
        return job.number

    def load(
        self,
        keys: Sequence[Any],
        objects: Sequence[Any],
        hashes: Sequence[int],
        regions: Sequence[tuple[int, int] | None],
    ) -> int:
        """Queue a load; returns the number of its job. The pool bounds how many there are: each
        object has its own place there. What is in doubt is not loaded."""
        job = Job(self.number(), True, keys, objects, hashes, regions)
        job.chosen = [at for at, region in enumerate(regions) if region is not None]
        job.nbytes = sum(region[1] for region in regions if region is not None)
        self._submit(job)
        return job.number

    def queued_bytes(self) -> int:
        """Bytes of stores that are under way."""
        return self._under_way.queued_bytes

    def is_alive(self) -> bool:
        """Whether jobs are still taken, and done."""
        try:
            self.service().touch([])  # raises when the service has no workers any more
        except LightMemError:
            return False
        return self._thread.is_alive() and not self._under_way.closing

    def close(self, timeout: float) -> None:
        """Finish stores for at most `timeout` seconds, give up the rest, and close the service:
        no worker touches the pool any more when it returns. Calling it again does nothing, or ends
        what an exception has broken off."""
        with self._closing:
            if self._open is not None:
                self._close(self._open, timeout)

    def _close(self, service: LocalCacheService, timeout: float) -> None:
        """Each step may have been made before."""
        self._under_way.close()
        if not self._under_way.wait_idle(timeout):
            log.warning("LMCache's adapter closes with jobs under way: they are given up")
        self._stopping = True
        self._inbox.wake()
        self._thread.join(_CLOSE_SECONDS)
        for job in self._inbox.drain():
            self._try(self._over, job)
        self._abort_all()
        if not self._under_way.wait_idle(_ABORT_SECONDS):
            # A worker may still finish a block whose object is gone, and then nobody would look.
            self._try(service.end_workers)
            self._under_way.wait_idle(_ABORT_SECONDS)
            for job in self._under_way.stores():
                self._discards.add([job.hashes[at] for at in job.chosen])
        self._discards.close(_CLOSE_SECONDS)
        service.close()
        self._open = None

    def _abort_all(self) -> None:
        """Abort what is under way, without waiting for workers; for a bounded time."""
        end = time.monotonic() + _CLOSE_SECONDS
        for task in self._under_way.tasks():
            if time.monotonic() > end:  # a stopped process has the queue
                return
            try:
                self.service().abort(task, 0.0)
            except LightMemError:
                pass  # a worker holds a block: it is waited for together with the others

    def _submit(self, job: Job) -> None:
        if not self._under_way.begin(job, self._inbox.put):
            self._over(job)

    def _count_dropped(self, blocks: int) -> None:
        self.counters["dropped_blocks"] += blocks
        try:
            self.service().count_dropped(blocks)
        except LightMemError:
            pass  # closed: nobody reads its statistics

    # --- the end of a job ------------------------------------------------------------------------

    def _over(self, job: Job, _: CacheTask | None = None) -> None:
        """One of the tasks of a job is over, or the thread is through with it."""
        if not self._under_way.part_over(job):
            return
        late = not job.load and self._under_way.is_late(job)
        job.done = [False] * len(job.keys)
        spoiled = []
        for at in job.finished():
            # Now, after the copy: LMCache marks an object before it gives its memory away.
            if late or not self._is_held(job.objects[at]):
                spoiled.append(job.hashes[at])
            elif not job.load or self._is_sure(job, job.hashes[at]):
                job.done[at] = True
        if spoiled and not job.load:
            self._limited.warning(
                "%d objects lost their memory while they were stored; they are discarded",
                len(spoiled),
            )
            self._under_way.spoil(spoiled)
            self._discards.add(spoiled)
        if not job.load:
            self._doubts.remove(job.hashes[at] for at in job.chosen)
        self._note(job, sum(job.done))
        try:
            self._finished(job)
        finally:
            self._under_way.end(job)

    def _is_sure(self, load: Job, value: int) -> bool:
        # Doubts first: a spoiled hash leaves them only after it is in `spoiled` of the load.
        return value not in self._doubts and value not in load.spoiled

    def _note(self, job: Job, done: int) -> None:
        self.counters["loaded_blocks" if job.load else "stored_blocks"] += done
        failed = (len(job.keys) if job.load else len(job.chosen)) - done
        if not failed:
            return
        self.counters["failed_load_blocks" if job.load else "failed_store_blocks"] += failed
        if job.load:
            self._limited.warning(
                "%d of %d objects could not be loaded; they are computed", failed, len(job.keys)
            )

    # --- the thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            job = self._inbox.get(self._under_way.patience())
            if job is not None:
                self._try(self._place, job)
                self._try(self._over, job)
            if self._stopping:
                return  # `close` ends what is left
            self._give_up()
            del job  # its memory

    def _try(self, step: Callable[..., object], *arguments: Any) -> None:
        """The adapter goes on; what was asked for has failed."""
        try:
            step(*arguments)
        except Exception as error:
            self._limited.warning("LMCache's adapter: %s", f"{type(error).__name__}: {error}")

    def _place(self, job: Job) -> None:
        if job.load:
            # By now a hash that is found spoiled later is told to the job.
            job.chosen = [at for at in job.chosen if job.hashes[at] not in self._doubts]
        for start in range(0, len(job.chosen), TASK_BLOCKS):
            if self._stopping:
                return
            if self._under_way.is_late(job):
                self._limited.warning("a %s has waited too long", "load" if job.load else "store")
                return
            part = job.chosen[start : start + TASK_BLOCKS]
            regions = [region for at in part if (region := job.regions[at]) is not None]
            try:
                task = self.service().create_regions(
                    "read" if job.load else "write", [job.hashes[at] for at in part], regions
                )
            except LightMemError as error:  # no room, a stopped holder of the queue, closed
                what = "load" if job.load else "store"
                self._limited.warning(f"a {what} is refused: %s", str(error))
                if not job.load:
                    self._count_dropped(len(job.chosen) - start)
                return
            self._under_way.add(job, task)
            task.add_done_callback(partial(self._over, job))

    def _give_up(self) -> None:
        """Abort jobs that take too long: blocks that nobody has begun are not begun. The job is
        over when no worker holds any of its blocks."""
        for job in self._under_way.give_up():
            self._limited.warning("a %s takes too long", "load" if job.load else "store")
            for task in list(job.tasks):
                self._try(self.service().abort, task)
