"""PageStore: the pages of one host pool, in and out of LightMem, for threads that may wait.

SGLang calls from threads of its own (one queries, one loads, one stores) and wants an answer a
page. A call waits for a bounded time: what is not done then is given up and counts as missing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from light_mem.errors import LightMemError, LockTimeoutError, ServiceClosedError
from light_mem.integrations.namespace import Namespace
from light_mem.integrations.sglang.pool import HostPool
from light_mem.logs import Limited
from light_mem.service import CacheService
from light_mem.states import State
from light_mem.task import CacheTask

log = logging.getLogger("light_mem")

_WARN_SECONDS = 30.0  # between two warnings of one kind


class PageStore:
    """The pages of one pool, by SGLang's keys. Any thread; no method raises because of the store:
    what it cannot do is a miss, with a warning at a bounded rate.

    pool           its geometry; its memory is let go of by `close`
    namespace      what its keys mean
    services       a running service for each buffer of the pool; closed with this
    load_timeout   seconds after which a load gives up the pages that nobody has begun
    store_timeout  the same for a store
    """

    def __init__(
        self,
        pool: HostPool,
        namespace: Namespace,
        services: Sequence[CacheService],
        *,
        load_timeout: float,
        store_timeout: float,
    ) -> None:
        self.page_bytes = pool.page_bytes
        self.namespace = namespace
        self._pool: HostPool | None = pool
        self._services = tuple(services)
        self._timeouts = {"read": load_timeout, "write": store_timeout}
        self._limited = Limited(each=1, seconds=_WARN_SECONDS)
        self._closing = threading.RLock()  # a signal's handler may close what its thread closes

    # --- look-ups --------------------------------------------------------------------------------

    def match_prefix(self, keys: Sequence[str]) -> int:
        """How many leading pages are stored; all, for a pool without memory."""
        services, pool = self._services, self._pool  # in this order: see `close`
        length = len(keys) if pool else 0
        hashes = self._hashes(keys)
        try:
            for service in services:
                length = service.match_prefix(hashes[:length])
        except LightMemError as error:  # closed, or without workers
            self._limited.warning("look-ups fail: %s", str(error))
            return 0
        return length

    def stored(self, keys: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Whether each page is stored, bool [keys]."""
        services, pool = self._services, self._pool
        found = np.full(len(keys), pool is not None)
        hashes = self._hashes(keys)
        try:
            for service in services:
                found &= np.array(service.query(hashes), bool)
        except LightMemError as error:
            self._limited.warning("look-ups fail: %s", str(error))
            found[:] = False
        return found

    # --- pages -----------------------------------------------------------------------------------

    def load(self, keys: Sequence[str], indices: torch.Tensor) -> list[bool]:
        """Read pages into the pool at SGLang's host indices; True for each that holds its bytes.

        When this returns nothing writes to any of these pages any more.
        """
        return self._move("read", keys, indices)

    def store(self, keys: Sequence[str], indices: torch.Tensor) -> list[bool]:
        """Write pages from the pool; True for each that is stored now.

        When this returns nothing reads any of these pages any more.
        """
        return self._move("write", keys, indices)

    def _move(self, mode: str, keys: Sequence[str], indices: torch.Tensor) -> list[bool]:
        services, pool = self._services, self._pool
        if not len(keys) or not services:
            return [pool is not None] * len(keys)
        done = np.full(len(keys), pool is not None)
        deadline = time.monotonic() + self._timeouts[mode]
        hashes = self._hashes(keys)
        tasks: list[CacheTask] = []
        try:
            places = pool.regions(indices, len(keys)) if pool else []
            for service, regions in zip(services, places, strict=False):
                tasks.append(service.create_regions(mode, hashes, regions))  # type: ignore[arg-type] # an array
        except LightMemError as error:  # no room, closed, indices that are none
            self._limited.warning(f"a {mode} of pages is refused: %s", str(error))
            done[:] = False
        finally:
            for service, task in zip(services, tasks, strict=False):
                self._finish(service, task, deadline)
        for task in tasks:
            done &= np.array([state is State.Finished for state in task.state()], bool)
        return [bool(fine) for fine in done]

    def _finish(self, service: CacheService, task: CacheTask, deadline: float) -> None:
        """Return when no worker touches the pages of the task any more."""
        try:
            if task.wait(max(0.0, deadline - time.monotonic())):
                return
            self._limited.warning(
                f"a {task.mode} of %d pages takes longer than %g s: the rest is given up",
                len(task),
                self._timeouts[task.mode],
            )
            service.abort(task)
        except LockTimeoutError:
            # SGLang will use the pages for something else, and a worker that is stopped now could
            # go on then. Closing ends it, and the backend with it.
            log.error("a worker does not let go of pages of SGLang: LightMem stops")
            self.close()
        except LightMemError as error:  # closed meanwhile: nobody works any more once it is
            self._limited.warning(f"a {task.mode} of pages ends early: %s", str(error))
            self.close()

    # --- the rest --------------------------------------------------------------------------------

    def describe(self) -> str:
        """One line for the log: pages, sizes, room, workers, namespace."""
        sizes = f"{self.page_bytes} bytes a page"
        stores = ", ".join(_describe(service) for service in self._services)
        return f"{sizes}: {stores or 'it has no memory'}; namespace {self.namespace.name}"

    def clear(self) -> int:
        """Take everything out of the store, other servers' pages too; how many blocks there were.
        Raises LightMemError."""
        if self._pool is None:
            raise ServiceClosedError("the store is closed")
        return sum(service.clear() for service in self._services)

    def close(self) -> None:
        """End the workers and let go of the memory; returns when that is so. Again: nothing."""
        with self._closing:
            # First the pool: who still sees services but no pool answers no; the other way round a
            # closed store would look like a pool without memory, which has every page.
            self._pool = None
            for service in self._services:
                service.close()
            self._services = ()

    def _hashes(self, keys: Sequence[str]) -> list[int]:
        return self.namespace.hashes(key.encode() for key in keys)


def _describe(service: CacheService) -> str:
    found = service.stats(ages=False)
    return f"{found['blocks']} blocks stored, room for {found['slots']}"
