"""LMCache's local disk backend, the Python one."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np

from benchmark.plan import Plan
from benchmark.rivals.base import NotInstalledError, Pages, Rival, gather

_IN_FLIGHT_BYTES = 64 << 20


class LMCacheDisk(Rival):
    """`LocalDiskBackend` on a `HostMemoryAllocator` as staging memory.

    The copies between pages and staging memory, which a GPU connector does in LMCache, are made
    here, in the caller's thread.
    """

    name = "LMCache disk"
    package = "lmcache"
    how = "one process, a disk thread a worker; a new file a block, evicting"
    lacks = "no checksum; its index is in memory only, a restart begins empty"
    one_process_each = False
    evicts = True
    persistent = False

    @classmethod
    def environment(cls, plan: Plan) -> dict[str, str]:
        return {"LMCACHE_TRACK_USAGE": "false", "LMCACHE_LOG_LEVEL": "ERROR"}

    def open(self) -> None:
        try:
            import torch
            from lmcache.utils import CacheEngineKey
            from lmcache.v1.config import LMCacheEngineConfig
            from lmcache.v1.memory_allocators.host_memory_allocator import HostMemoryAllocator
            from lmcache.v1.memory_management import MemoryFormat
            from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend
            from lmcache.v1.storage_backend.local_disk_backend import LocalDiskBackend
        except ImportError as err:
            raise NotInstalledError(str(err)) from err
        plan = self.setup.plan
        block = plan.shape.block_bytes
        self._batch = max(self.setup.workers, _IN_FLIGHT_BYTES // block)
        pool = (2 * self._batch + 2) * (block + 4096)
        config = LMCacheEngineConfig.from_defaults(
            local_cpu=False,
            max_local_cpu_size=pool / 2**30,
            local_disk=str(self.directory),
            max_local_disk_size=(plan.blocks + 1) * (block + 4096) / 2**30,
            extra_config={"disk_io_threads": self.setup.workers},
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._cpu = LocalCPUBackend(config, memory_allocator=HostMemoryAllocator(pool))
        self._disk = LocalDiskBackend(config, self._loop, self._cpu, "cpu")
        self._size, self._dtype = torch.Size([block]), torch.uint8
        self._format = MemoryFormat.BINARY_BUFFER
        self._key = lambda name: CacheEngineKey("bench", 1, 0, int(name, 16), torch.uint8)

    def write(self, hashes: list[Any], pages: Pages) -> None:
        free = threading.Semaphore(self._batch)
        shape = self.setup.plan.shape
        for name, rows in zip(hashes, pages, strict=True):
            free.acquire()
            staged = self._cpu.allocate(self._size, self._dtype, self._format)
            into = staged.tensor.numpy().view(np.uint8).reshape(shape.pages, shape.page_bytes)
            gather(self.memory, rows, into)
            key = self._key(name)
            self._disk.submit_put_task(key, staged, lambda _: free.release())
            staged.ref_count_down()
        for _ in range(self._batch):
            free.acquire()

    def read(self, hashes: list[Any], pages: Pages) -> None:
        for at in range(0, len(hashes), self._batch):
            names, into = hashes[at : at + self._batch], pages[at : at + self._batch]
            staged = self._disk.batched_get_blocking([self._key(name) for name in names])
            for memory, rows in zip(staged, into, strict=True):
                if memory is None:
                    raise RuntimeError("LMCache lost a block")
                self.memory[rows] = memory.tensor.numpy().view(np.uint8).reshape(len(rows), -1)
                memory.ref_count_down()

    def delete(self, hashes: list[Any]) -> None:
        for name in hashes:
            key = self._key(name)
            size = self._disk.dict[key].size
            self._disk.remove(key)
            self._disk.current_cache_size -= size

    def close(self) -> None:
        self._disk.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
