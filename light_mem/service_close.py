"""The order in which a LocalCacheService closes, however it ends."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from light_mem.closing import Ending
from light_mem.engine.in_server import InServer
from light_mem.engine.kvmemory import MemorySource, close_source
from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.pool import WorkerPool
from light_mem.engine.process import fork_token
from light_mem.session import Session


class ServiceEnding(Ending):
    """Closes what a service is made of. A finalizer too: it must not hold the service itself."""

    def __init__(
        self,
        pool: WorkerPool,
        session: Session,
        engine: LocalStorageEngine,
        source: MemorySource,
        in_server: Sequence[InServer],
    ) -> None:
        self._token = fork_token()
        super().__init__(
            *(mover.close for mover in in_server),
            pool.stop,
            session.close,
            session.table.close,
            partial(close_source, source),
            engine.close,
        )

    def __call__(self) -> None:
        if self._token == fork_token():  # in a forked child the workers and locks are its parent's
            super().__call__()
