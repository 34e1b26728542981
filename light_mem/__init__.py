"""LightMem: a persistent, multi-process disk tier for the KV cache of LLM inference servers.

    service = LocalCacheService(file, storage_size, num_of_shard, kvcache, num_workers)
    service.run()
    task = service.create("write", ["hash1", "hash2"], [0, 1])

LocalCacheService opens a store and runs the workers; CacheClient is the same service from another
process of the server; CacheTask is one `create`, CacheBlock one of its blocks, State what became of
it; BlockView is a block looked at in place. `allocate_kvcache` makes the KV tensor. Errors are
LightMemErrors. docs/reference.md has them all. Where what is:

service.py   CacheService: tasks; stored_blocks.py: all that moves no bytes, look-ups, keeping,
             deleting; local_service.py and client.py: in the server's process, and in its others;
             service_settings.py: its arguments checked; service_close.py: the order of its end
session.py   one process's tasks in the shared task table; lane_room.py: its room there
task.py      CacheTask: states, waiting; states.py: State, CacheBlock; waiting.py: the thread that
             tells who waits
views.py     BlockView, a block looked at in place
blocks.py    arguments checked; layouts.py: where the blocks of a task lie in the tensor
demo/        `light-mem demo`
ranks.py     tensor-parallel ranks: keys, and lengths that all of them agree on
compat.py    PyLocalCacheService: the drop-in interface of the C++ LightMem;
             compat_arguments.py: its arguments checked
errors.py    the error tree; filesystem.py: what lies below a store; closing.py: `with`;
             descriptors.py: none takes a standard stream's place;
             lazy.py: names imported when they are used
integrations/ what plugs into servers: vLLM, SGLang, LMCache
engine/      moves bytes: shards, copies, workers
index/       finds them: format, table, locks, order of use, recovery
maintenance/ looks into stores, checks, mends and moves them; `light-mem`
             (cli.py, commands/) is its command
monitor/     watches the servers of a store from outside; metrics.py: for Prometheus
doctor/      checks the machine; startup.py, logs.py: the line at start, warnings at a bounded rate

Names are imported when they are first used: a worker imports parts of the package without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from light_mem.lazy import names

if TYPE_CHECKING:
    from light_mem.client import CacheClient
    from light_mem.compat import PyLocalCacheService, PyState, PyTask
    from light_mem.engine.base import StorageEngine
    from light_mem.engine.kvallocation import allocate_kvcache
    from light_mem.engine.local import LocalStorageEngine
    from light_mem.engine.queue import TaskQueue
    from light_mem.errors import (
        BlockNotStoredError,
        ExportExistsError,
        ForkedProcessError,
        InvalidArgumentError,
        KVCacheMemoryError,
        LeaseLimitError,
        LightMemError,
        LockTimeoutError,
        PageIndexError,
        PinLimitError,
        ServiceClosedError,
        SharedMemoryFullError,
        StoreBusyError,
        StoreDamagedError,
        StoreFormatError,
        StoreFullError,
        TaskExpiredError,
        TaskTableFullError,
        WorkerStartError,
    )
    from light_mem.local_service import LocalCacheService
    from light_mem.service import CacheService
    from light_mem.states import CacheBlock, State
    from light_mem.task import CacheTask
    from light_mem.views import BlockView

_HOMES = {  # of the names in __all__; the others are errors
    "BlockView": "views",
    "CacheBlock": "states",
    "CacheTask": "task",
    "State": "states",
    "CacheClient": "client",
    "CacheService": "service",
    "LocalCacheService": "local_service",
    "LocalStorageEngine": "engine.local",
    "StorageEngine": "engine.base",
    "TaskQueue": "engine.queue",
    "allocate_kvcache": "engine.kvallocation",
    "PyLocalCacheService": "compat",
    "PyState": "compat",
    "PyTask": "compat",
}

__version__ = "0.1.0"
__all__ = [  # noqa: RUF022 - by topic
    "LocalCacheService",
    "CacheService",
    "CacheClient",
    "CacheTask",
    "CacheBlock",
    "BlockView",
    "State",
    "allocate_kvcache",
    "StorageEngine",
    "LocalStorageEngine",
    "TaskQueue",
    "PyLocalCacheService",
    "PyTask",
    "PyState",
    "BlockNotStoredError",
    "ExportExistsError",
    "ForkedProcessError",
    "InvalidArgumentError",
    "KVCacheMemoryError",
    "LeaseLimitError",
    "LightMemError",
    "LockTimeoutError",
    "PageIndexError",
    "PinLimitError",
    "ServiceClosedError",
    "SharedMemoryFullError",
    "StoreBusyError",
    "StoreDamagedError",
    "StoreFormatError",
    "StoreFullError",
    "TaskExpiredError",
    "TaskTableFullError",
    "WorkerStartError",
]

__getattr__, __dir__ = names(__name__, __all__, _HOMES, "errors")
