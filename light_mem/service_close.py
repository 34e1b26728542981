"""The order in which a LocalCacheService closes, however it ends."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from light_mem.engine.in_server import InServer
from light_mem.engine.kvmemory import MemorySource, close_source
from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.pool import WorkerPool
from light_mem.engine.process import fork_token
from light_mem.session import Session


def close_service(
    pool: WorkerPool,
    session: Session,
    engine: LocalStorageEngine,
    source: MemorySource,
    in_server: Sequence[InServer],
    token: int,
) -> None:
    """Close what a service is made of; `token`: the `fork_token` of its process. A finalizer: it
    must not hold the service itself."""
    if token != fork_token():
        return  # a forked child: the workers and the locks are its parent's
    with ExitStack() as steps:  # the last comes first, and none is left out when one fails
        steps.callback(engine.close)
        steps.callback(close_source, source)
        steps.callback(session.table.close)
        steps.callback(session.close)
        steps.callback(pool.stop)
        for mover in in_server:
            steps.callback(mover.close)
