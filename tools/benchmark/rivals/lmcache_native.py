"""LMCache's C++ file system client, `fs_native`."""

from __future__ import annotations

import select
from typing import Any

from benchmark.plan import Plan
from benchmark.rivals.base import NotInstalledError, Pages, Rival, gather, page_aligned

_IN_FLIGHT_BYTES = 64 << 20


class LMCacheNative(Rival):
    """`LMCacheFSClient` with batches of 64 MB; the page copies are made here, in one thread."""

    name = "LMCache fs_native"
    package = "lmcache"
    how = "one process, a C++ thread a worker; a new file a block, under a temporary name first"
    lacks = "no checksum, no eviction by itself"
    one_process_each = False

    @classmethod
    def environment(cls, plan: Plan) -> dict[str, str]:
        return {"LMCACHE_TRACK_USAGE": "false", "LMCACHE_LOG_LEVEL": "ERROR"}

    def open(self) -> None:
        try:
            from lmcache.lmcache_fs import LMCacheFSClient
        except ImportError as err:
            raise NotInstalledError(str(err)) from err
        shape = self.setup.plan.shape
        self._client = LMCacheFSClient(str(self.directory), self.setup.workers, "", False, 0)
        self._batch = max(self.setup.workers, _IN_FLIGHT_BYTES // shape.block_bytes)
        # Two sets of buffers: one is copied while the client works on the other.
        memory = page_aligned(2 * self._batch * shape.block_bytes)
        self._buffers = memory.reshape(2, self._batch, shape.pages, shape.page_bytes)

    def hashes(self, generations: Pages, blocks: Pages) -> list[Any]:
        """In the client's form: model, rank, object group, hash."""
        return [f"bench@00000000@0@{name}" for name in super().hashes(generations, blocks)]

    def _wait(self, pending: int | None) -> None:
        while pending is not None:
            select.select([self._client.event_fd()], [], [], 60)
            for number, good, error, _ in self._client.drain_completions():
                if not good:
                    raise RuntimeError(f"fs_native: {error}")
                if number == pending:
                    pending = None

    def _views(self, half: int, count: int) -> list[memoryview]:
        return [memoryview(block.reshape(-1)) for block in self._buffers[half, :count]]

    def write(self, hashes: list[Any], pages: Pages) -> None:
        pending = None
        for turn, at in enumerate(range(0, len(hashes), self._batch)):
            names, half = hashes[at : at + self._batch], turn % 2
            for rows, block in zip(pages[at : at + len(names)], self._buffers[half], strict=False):
                gather(self.memory, rows, block)
            self._wait(pending)
            pending = int(self._client.submit_batch_set(names, self._views(half, len(names))))
        self._wait(pending)

    def read(self, hashes: list[Any], pages: Pages) -> None:
        starts = list(range(0, len(hashes), self._batch))
        pending = self._ask(hashes, starts[0], 0) if starts else None
        for turn, at in enumerate(starts):
            self._wait(pending)
            if turn + 1 < len(starts):
                pending = self._ask(hashes, starts[turn + 1], (turn + 1) % 2)
            for rows, block in zip(
                pages[at : at + self._batch], self._buffers[turn % 2], strict=False
            ):
                self.memory[rows] = block

    def _ask(self, hashes: list[Any], at: int, half: int) -> int:
        names = hashes[at : at + self._batch]
        return int(self._client.submit_batch_get(names, self._views(half, len(names))))

    def delete(self, hashes: list[Any]) -> None:
        for name in hashes:
            (self.directory / f"{name.replace('@', '@0x', 1)}.data").unlink()

    def close(self) -> None:
        self._client.close()
