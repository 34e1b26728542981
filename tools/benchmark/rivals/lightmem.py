"""This project."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmark.rivals.base import Pages
from benchmark.rivals.service import Service

_BATCH = 16384  # blocks a task


class LightMem(Service):
    """One server process, as many workers as asked for, checksums verified."""

    name = "LightMem"
    package = "light-mem"
    how = "a server process and its worker processes; overwrites slots in place, evicting"
    lacks = ""
    page_cache = "keep"

    def open(self) -> None:
        import torch

        import light_mem

        plan, options = self.setup.plan, self.setup.options
        self._shards = options.get("shards", 4)
        # Any server may have blocks of any shard.
        self._shard_of = np.random.default_rng(7).permutation(plan.blocks) % self._shards
        # A pass evicts the one before. A shard must hold a full block of 64 pages.
        full = min(64, max(1, (64 << 20) // plan.shape.page_bytes)) * plan.shape.page_bytes
        size = (plan.blocks + self._shards) * plan.shape.block_bytes
        self.service = light_mem.LocalCacheService(
            self.directory / "store",
            max(options.get("storage", size), self._shards * full),
            self._shards,
            torch.from_numpy(self.memory),
            max(1, self.setup.workers // self.setup.shares),
            verify=options.get("verify", True),
            page_cache=self.page_cache,
        )
        self.service.run()

    def hashes(self, generations: Pages, blocks: Pages) -> list[Any]:
        """Ints, chosen so that the shards fill evenly: few large blocks would not."""
        from light_mem.index import keys

        first = (generations.astype(np.uint64) << np.uint64(40)) + (
            blocks.astype(np.uint64) << np.uint64(12)
        )
        # Enough candidates that one of them is surely of the shard wanted.
        tried = first[:, None] + np.arange(min(4096, 24 * self._shards), dtype=np.uint64)
        both = np.stack([tried.ravel(), np.zeros(tried.size, np.uint64)], axis=1)
        shards = keys.shards_of(keys.mix(both), self._shards).reshape(tried.shape)
        fits = shards == self._shard_of[blocks][:, None]
        return list(tried[np.arange(len(first)), fits.argmax(axis=1)].tolist())

    def create(self, mode: str, hashes: list[Any], pages: Pages) -> list[Any]:
        return [
            self.service.create(mode, hashes[at : at + _BATCH], pages[at : at + _BATCH].ravel())
            for at in range(0, len(hashes), _BATCH)
        ]

    def finish(self, tasks: list[Any]) -> None:
        import light_mem

        for task in tasks:
            while self.spin and not task.ready():
                pass
            if not task.wait(600):
                raise RuntimeError("a task was not ready within ten minutes")
            aborted = sum(s != light_mem.State.Finished for s in task.state())
            if aborted:
                raise RuntimeError(f"{aborted} of {len(task.state())} blocks were aborted")

    def keep(self, hashes: list[Any]) -> None:
        self.service.pin(hashes)

    def delete(self, hashes: list[Any]) -> None:
        self.service.delete(hashes)

    def check(self) -> dict[str, Any]:
        report = self.service.check()
        return {"blocks": report.blocks, "bytes": report.nbytes, "damaged": len(report.damaged)}

    def close(self) -> None:
        self.service.close()


class DroppingLightMem(LightMem):
    """Blocks go to the device past the page cache, and are on it when a write is done."""

    name = "LightMem, drop"
    how = 'as LightMem, with page_cache="drop": writes are on the device when they are done'
    lacks = "blocks in the page cache"
    page_cache = "drop"
