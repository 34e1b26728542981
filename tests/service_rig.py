"""A small service with its KV tensor, and pages whose bytes follow from the block's key."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

import light_mem
from light_mem import CacheTask, LocalCacheService, State
from light_mem.index.keys import HashValue
from tests.payload import block_bytes_of

WAIT = 20.0  # seconds; far more than any of these tasks takes
UNTOUCHED = 0xA5


class Rig:
    """A service and its tensor, uint8 [num_pages, page_bytes]."""

    def __init__(self, service: LocalCacheService, kv: torch.Tensor) -> None:
        self.service = service
        self.kv = kv
        self.page_bytes = int(kv.shape[1])

    def fill(self, key: object, pages: Sequence[int]) -> None:
        """Put the payload of `key` into these pages."""
        self.kv[list(pages)] = torch.from_numpy(block_bytes_of(key, len(pages), self.page_bytes))

    def blank(self, pages: Sequence[int]) -> None:
        """Put a pattern that is nobody's payload into these pages."""
        self.kv[list(pages)] = UNTOUCHED

    def is_blank(self, pages: Sequence[int]) -> bool:
        return bool((self.kv[list(pages)] == UNTOUCHED).all())

    def holds(self, key: object, pages: Sequence[int]) -> bool:
        """Whether these pages are the payload of `key`."""
        expected = block_bytes_of(key, len(pages), self.page_bytes)
        return bool(np.array_equal(self.kv[list(pages)].numpy(), expected))

    def write(self, hashes: Sequence[HashValue], pages: Sequence[int]) -> CacheTask:
        """Write one page a hash, each filled with its hash's payload; every block is Finished."""
        for key, page in zip(hashes, pages, strict=True):
            self.fill(key, [page])
        task = self.service.create("write", hashes, pages)
        assert task.wait(WAIT)
        assert task.state() == [State.Finished] * len(hashes)
        return task

    def read(self, hashes: Sequence[HashValue], pages: Sequence[int]) -> CacheTask:
        """Read one page a hash into blanked pages; returns the ready task."""
        self.blank(pages)
        task = self.service.create("read", hashes, pages)
        assert task.wait(WAIT)
        return task


@contextmanager
def rig(
    directory: Path,
    *,
    pages: int = 32,
    page_bytes: int = 4096,
    slots: int = 256,
    shards: int = 1,
    workers: int = 1,
    run: bool = True,
    **options: Any,
) -> Iterator[Rig]:
    """A running service on a store of `slots` pages in `directory`/store."""
    kv = light_mem.allocate_kvcache(pages, page_bytes)
    service = LocalCacheService(
        directory / "store", slots * page_bytes, shards, kv, workers, **options
    )
    with service:
        if run:
            service.run()
        yield Rig(service, kv)


def alive(pids: list[int]) -> list[int]:
    """Those that run; the dead that nobody waited for do not."""
    return [
        pid
        for pid in pids
        if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    ]
