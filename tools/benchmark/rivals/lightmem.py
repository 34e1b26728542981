"""This project."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from benchmark.rivals.base import Pages
from benchmark.rivals.service import Service

_BATCH = 16384  # blocks a task
# From so many blocks a shard on, hashes are as they come, and a shard has room for more than its
# mean. Fewer fall so unevenly that a store with room for a pass would be several times as large,
# and its writes would go round all of that: there the hashes are chosen so that shards fill evenly.
_ORDINARY = 64


class LightMem(Service):
    """One server process, as many workers as asked for, checksums verified."""

    name = "LightMem"
    package = "light-mem"
    how = "a server process and its worker processes; overwrites slots in place, evicting"
    lacks = ""
    page_cache = "keep"
    even = True  # few blocks have hashes that fill the shards evenly

    def open(self) -> None:
        import torch

        import light_mem

        plan, options = self.setup.plan, self.setup.options
        self._shards = options.get("shards", 4)
        # Any server may have blocks of any shard.
        self._shard_of = np.random.default_rng(7).permutation(plan.blocks) % self._shards
        mean = plan.blocks / self._shards
        self._even = options.get("even", self.even and mean < _ORDINARY)
        # A pass evicts the one before. A shard must hold a full block of 64 pages.
        full = min(64, max(1, (64 << 20) // plan.shape.page_bytes)) * plan.shape.page_bytes
        slots = self._slots(plan.blocks, mean)
        size = slots * plan.shape.block_bytes
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

    def _slots(self, blocks: int, mean: float) -> int:
        """Room of the store, in blocks."""
        if self._even:
            return blocks + self._shards
        # Five standard deviations: the most blocks that a shard will have of any pass.
        return self._shards * math.ceil(mean + 5 * math.sqrt(mean) + 4)

    def hashes(self, generations: Pages, blocks: Pages) -> list[Any]:
        """As everybody's, or ints chosen so that the shards fill evenly."""
        if not self._even:
            return super().hashes(generations, blocks)
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


class UnevenLightMem(LightMem):
    """Ordinary hashes at every size, and the room that the C++ LightMem is given for them."""

    name = "LightMem, uneven"
    how = "as LightMem, hashes as they come at every size, and room for twice the blocks"
    even = False

    def _slots(self, blocks: int, mean: float) -> int:
        return 2 * blocks + 4 * self._shards
