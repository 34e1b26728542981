"""The calls that LightLLM's disk cache worker makes, in its order, re-enacted for the tests.

The real one is run by tools/run_lightllm_worker.py where its source is at hand.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from light_mem import PyLocalCacheService, PyState
from tests.lightllm_memory import CpuCache

SHARDS = 8
MAX_WRITES = 8  # tasks that may be writing while something reads


class Caller:
    """Moves pages of a CpuCache to a disk store and back, polling every millisecond."""

    def __init__(self, cache: CpuCache, directory: Path, storage: int, workers: int) -> None:
        self.cache = cache
        self.throttled = 0
        self.service = PyLocalCacheService(
            kvcache_tensor=cache.bytes,
            file=str(directory / "cache_file"),
            storage_size=storage,
            num_shard=SHARDS,
            num_worker=workers,
        )

    def persist(self, hashs: list[int], pages: list[int]) -> None:
        """Write a prompt and let go of each page as soon as its bytes are safe."""
        if all(self.service.query(hashs)):
            self._let_go(pages)
            return
        while self.service.active_threads("r") and self.service.active_threads("w") >= MAX_WRITES:
            self.throttled += 1
            time.sleep(0.001)
        task = self.service.create(
            hash_128s=hashs, kv_page_indexer=torch.tensor(pages, dtype=torch.int32), mode="w"
        )
        if task.page_already_list:
            self._let_go(task.page_already_list)
        poll(task.data_safe)
        self._let_go(sorted(set(pages) - set(task.page_already_list)))

    def loadable(self, hashs: list[int], start: int) -> int:
        """How many pages from `start` on are stored without a gap."""
        found = self.service.query(hashs)
        n = self.service._n
        for block in range(start // n, len(found)):
            if not found[block]:
                return max(0, block * n - start)
        return len(hashs) - start

    def load(self, hashs: list[int], pages: list[int], start: int = 0) -> bool:
        """Read a prompt from the block of `start` on; whether every block came."""
        task = self.service.create(
            hash_128s=hashs,
            kv_page_indexer=torch.tensor(pages, dtype=torch.int32),
            mode="r",
            start_pos=start,
        )
        poll(task.ready)
        return all(state == PyState.Finished for state in task.state())

    def _let_go(self, pages: Sequence[int]) -> None:
        if pages:
            self.cache.lock.acquire_sleep1ms()
            self.cache.deref_pages(page_list=pages)
            self.cache.lock.release()

    def close(self) -> None:
        self.service.close()


def poll(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "a task hangs"
        time.sleep(0.001)
