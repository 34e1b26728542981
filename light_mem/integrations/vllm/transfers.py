"""TierTransfers: jobs between vLLM's primary tier and the store, without blocking the scheduler.

The scheduler's thread looks keys up, queues jobs and picks up results: it reads the index, appends
to a queue and takes from another. All else is done by the threads of background.py.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import numpy.typing as npt

from light_mem.errors import LightMemError
from light_mem.integrations.namespace import Namespace
from light_mem.integrations.vllm.background import Background
from light_mem.integrations.vllm.jobs import Finished, Job, Touch
from light_mem.service import CacheService

log = logging.getLogger("light_mem")

MAX_WAITING_TOUCHES = 256
MAX_UNLOADABLE = 4096  # requests


def _as_it_is(finished: Finished) -> Finished:
    return finished


class TierTransfers:
    """The logic of the tier, free of vLLM's types.

    Calls come from one thread at a time, the scheduler's. Only `drain` and `close` wait.

    service       a running service whose pages are the rows of the primary tier
    max_queued    blocks of stores that may be under way; what a store has beyond is dropped
    load_timeout  seconds after which a load gives up the blocks that nobody has begun
    tell          makes of a Finished what `finished` returns; called in another thread
    """

    def __init__(
        self,
        service: CacheService,
        namespace: Namespace,
        *,
        max_queued: int,
        load_timeout: float,
        tell: Callable[[Finished], Any] = _as_it_is,
    ) -> None:
        self._service: CacheService | None = service
        self._namespace = namespace
        self._max_queued = max_queued
        self._background = Background(service, namespace, load_timeout, tell)
        self._inbox = self._background.inbox
        self._results = self._background.results
        self._submitted = 0  # blocks of stores, in all
        self._unloadable: dict[str, set[bytes]] = {}  # by request

    @property
    def counters(self) -> Counter[str]:
        """Blocks by the names of the tier's metrics."""
        return self._background.counters

    def lookup(self, key: bytes, request: str) -> bool:
        """Whether the key is stored. No lock. A key that this request could not load counts as
        missing to it, else it would try again for ever."""
        service = self._service
        if service is None:
            return False
        if self._unloadable and key in self._unloadable.get(request, ()):
            return False
        try:
            found: bool = service.query(self._namespace.hash(key))
        except LightMemError as error:  # closed, or without workers
            self._background.limited.warning("look-ups fail: %s", str(error))
            return False
        return found

    def store(
        self, job_id: int, keys: Collection[bytes], rows: npt.NDArray[np.int64], request: str
    ) -> None:
        """Queue a store. Blocks for which the queue has no room are dropped and counted."""
        job = Job(job_id, False, list(keys), np.asarray(rows), request)
        room = max(0, self._max_queued - self.queued())
        if len(job.keys) > room:
            job.dropped = len(job.keys) - room
            job.keys, job.rows = job.keys[:room], job.rows[:room]
            self._background.limited.warning(
                "%d blocks of a store of %d are dropped: at most %d may be under way",
                job.dropped,
                job.dropped + room,
                self._max_queued,
            )
        self._submitted += len(job.keys)
        self._submit(job, urgent=2 * len(job.keys) > room)

    def load(
        self, job_id: int, keys: Collection[bytes], rows: npt.NDArray[np.int64], request: str
    ) -> None:
        """Queue a load. The primary tier bounds how many there are: each block has its own row."""
        self._submit(Job(job_id, True, list(keys), np.asarray(rows), request), urgent=True)

    def finished(self) -> list[Any]:
        """What `tell` made of the jobs that are over since the last call, each once."""
        over = []
        results = self._results
        while results:
            result = results.popleft()
            if result.missing:
                self._note_missing(result.request, result.missing)
            over.append(result.told)
        return over

    def touch(self, keys: Collection[bytes]) -> None:
        """Count the keys as used, soon; left out when the thread is behind."""
        if self._inbox.waiting() < MAX_WAITING_TOUCHES and not self._background.stopping:
            self._inbox.put(Touch(list(keys)))

    def forget(self, request: str) -> None:
        """The request is over."""
        self._unloadable.pop(request, None)

    def drain(self, timeout: float | None = None) -> bool:
        """Wait until no job touches the primary tier; their results come with the next poll.

        False: not within `timeout` seconds.
        """
        return self._background.drain(timeout)

    def queued(self) -> int:
        """Blocks of stores that are under way."""
        return self._submitted - self._background.settled

    def close(self, timeout: float) -> None:
        """Finish what is under way for at most `timeout` seconds, then give up the rest, and let
        go of the service, its workers and the memory. Calling it again does nothing."""
        if self._service is None:
            return
        if not self._background.drain(timeout):
            log.warning("the vLLM tier closes with jobs under way: they are given up")
        self._service = None
        self._background.close()

    def _submit(self, job: Job, urgent: bool) -> None:
        if self._service is None:
            self._background.finish(job)  # without tasks: over, without success
        else:
            self._inbox.put(job, urgent)

    def _note_missing(self, request: str, missing: Collection[bytes]) -> None:
        self._unloadable.setdefault(request, set()).update(missing)
        if len(self._unloadable) > MAX_UNLOADABLE:  # loads that ended after their request
            del self._unloadable[next(iter(self._unloadable))]
