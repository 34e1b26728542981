"""The jobs that are under way: how many bytes they store, how long they take, when all are over."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection

from light_mem.integrations.lmcache.jobs import Job
from light_mem.task import CacheTask


class UnderWay:
    """Jobs from when they are queued until they are handed back. Any thread; only `wait_idle`
    waits."""

    def __init__(self, max_queued: int, timeouts: dict[bool, float]) -> None:
        """`max_queued`: bytes of stores at a time; `timeouts`: seconds that a job may take, by
        whether it is a load."""
        self.max_queued = max_queued
        self._timeouts = timeouts
        self._guard = threading.Lock()  # the fields below, and those of jobs
        self._idle = threading.Condition(self._guard)
        self._jobs: dict[int, Job] = {}
        self.queued_bytes = 0  # of stores
        self.closing = False

    def choose(self, store: Job) -> int:
        """Choose what of a store has room and is within reach, from the front; how much is dropped
        behind that."""
        dropped = 0
        with self._guard:
            room = self.max_queued - self.queued_bytes
            for at, region in enumerate(store.regions):
                if region is None:
                    continue
                if dropped or store.nbytes + region[1] > room:
                    dropped += 1
                    continue
                store.chosen.append(at)
                store.nbytes += region[1]
            self.queued_bytes += store.nbytes
        return dropped

    def begin(self, job: Job, queue: Callable[[Job], None]) -> bool:
        """A job is under way. It is queued unless there is nothing to do, or nothing is queued any
        more; whether it was."""
        with self._guard:
            self._jobs[job.number] = job
            wanted = bool(job.chosen) and not self.closing
            if wanted:
                queue(job)
        return wanted

    def add(self, job: Job, task: CacheTask) -> None:
        """One task more is to be over before the job is."""
        with self._guard:
            job.left += 1
            job.tasks.append(task)

    def part_over(self, job: Job) -> bool:
        """One of the tasks is over, or the thread is through with the job; whether all are."""
        with self._guard:
            job.left -= 1
            if job.left:
                return False
            if not job.load:
                self.queued_bytes -= job.nbytes
        return True

    def spoil(self, hashes: Collection[int]) -> None:
        """What is loaded under these hashes may be others' bytes: loads may have copied it by
        now."""
        with self._guard:
            for job in self._jobs.values():
                if job.load:
                    job.spoiled.update(hashes)

    def end(self, job: Job) -> None:
        """A job was handed back."""
        with self._idle:
            self._jobs.pop(job.number, None)
            self._idle.notify_all()

    def close(self) -> None:
        """Nothing is queued any more; what was goes on."""
        with self._guard:
            self.closing = True

    def wait_idle(self, timeout: float) -> bool:
        """Wait until no job is under way; False: some are after `timeout` seconds."""
        with self._idle:
            return self._idle.wait_for(lambda: not self._jobs, timeout)

    def stores(self) -> list[Job]:
        """The stores that are under way."""
        with self._guard:
            return [job for job in self._jobs.values() if not job.load]

    def tasks(self) -> list[CacheTask]:
        """The tasks of all jobs that are under way."""
        with self._guard:
            return [task for job in self._jobs.values() for task in job.tasks]

    def is_late(self, job: Job) -> bool:
        """Whether a job has taken too long."""
        return time.monotonic() - job.submitted > self._timeouts[job.load]

    def patience(self) -> float | None:
        """Seconds until a job has taken too long; None: none is under way that was not given up."""
        with self._guard:
            ends = [
                job.submitted + self._timeouts[job.load]
                for job in self._jobs.values()
                if not job.given_up
            ]
        return max(0.0, min(ends) - time.monotonic()) if ends else None

    def give_up(self) -> list[Job]:
        """Those that have taken too long by now; each once."""
        with self._guard:
            late = [job for job in self._jobs.values() if not job.given_up and self.is_late(job)]
            for job in late:
                job.given_up = True
        return late
