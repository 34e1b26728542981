"""Memory to memory: what any store could reach at most."""

from __future__ import annotations

from typing import Any

from benchmark.plan import Plan
from benchmark.rivals import BASE, UNTUNED
from benchmark.rivals.base import Pages, Rival, gather, page_aligned
from light_mem.engine.program import COPY_TUNABLES


class Baseline(Rival):
    """Gathers pages into private memory, and scatters them back.

    With the same stores around the processor's caches as LightMem's workers have: without them it
    would be no upper bound.
    """

    name = BASE
    how = "a process a worker; every block has its own place in private memory; tuned copies"
    lacks = "stores nothing"
    persistent = False
    in_place = True

    @classmethod
    def environment(cls, plan: Plan) -> dict[str, str]:
        return {"GLIBC_TUNABLES": COPY_TUNABLES}

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


class UntunedBaseline(Baseline):
    """The same with glibc as it copies by itself."""

    name = UNTUNED
    how = "the same, with the C library's copies as Python starts with them"

    @classmethod
    def environment(cls, plan: Plan) -> dict[str, str]:
        return {"GLIBC_TUNABLES": ""}
