"""Memory to memory: what any store could reach at most."""

from __future__ import annotations

from typing import Any

from benchmark.rivals import BASE
from benchmark.rivals.base import Pages, Rival, gather, page_aligned


class Baseline(Rival):
    """Gathers pages into private memory, and scatters them back."""

    name = BASE
    how = "a process a worker; every block has its own place in private memory"
    lacks = "stores nothing"
    persistent = False
    in_place = True

    def open(self) -> None:
        plan = self.setup.plan
        mine = len(range(self.setup.share, plan.blocks, self.setup.shares))
        shape = (plan.blocks, plan.shape.pages, plan.shape.page_bytes)
        private = page_aligned(mine * plan.shape.block_bytes)
        self._private = private.reshape(mine, *shape[1:])

    def _place(self, name: str) -> Any:
        return self._private[int(name[16:], 16) // self.setup.shares]

    def write(self, hashes: list[Any], pages: Pages) -> None:
        for name, rows in zip(hashes, pages, strict=True):
            gather(self.memory, rows, self._place(name))

    def read(self, hashes: list[Any], pages: Pages) -> None:
        for name, rows in zip(hashes, pages, strict=True):
            self.memory[rows] = self._place(name)

    def close(self) -> None:
        pass
