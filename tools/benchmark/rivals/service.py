"""What the services have in common: LightMem and the C++ LightMem, which are given tasks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from benchmark.rivals.base import Pages, Rival

T = TypeVar("T")


class Service(Rival):
    """One process that has workers, and a queue of tasks.

    A service is given the next pass while it is at the last one, as others' processes go on without
    waiting for each other.
    """

    one_process_each = False
    evicts = True
    in_place = True
    spin = False  # ask without a pause whether a task is done: for latencies

    @abstractmethod
    def create(self, mode: str, hashes: list[Any], pages: Pages) -> list[Any]:
        """Queue these blocks, `write` or `read`; the tasks."""

    @abstractmethod
    def finish(self, tasks: list[Any]) -> None:
        """Wait for them."""

    def write(self, hashes: list[Any], pages: Pages) -> None:
        self.finish(self.create("write", hashes, pages))

    def read(self, hashes: list[Any], pages: Pages) -> None:
        self.finish(self.create("read", hashes, pages))

    def write_passes(self, passes: Iterable[list[Any]], pages: Pages) -> None:
        under_way(2, (self.create("write", hashes, pages) for hashes in passes), self.finish)

    def read_passes(self, hashes: list[Any], pages: Pages, passes: int) -> None:
        under_way(2, (self.create("read", hashes, pages) for _ in range(passes)), self.finish)

    def mixed(self, old: list[Any], into: Pages, new: list[Any], pages: Pages) -> None:
        tasks = []
        for mode, hashes, rows in (("read", old, into), ("write", new, pages)):
            tasks += self.create(mode, hashes, rows) if hashes else []
        self.finish(tasks)


def under_way(most: int, created: Iterable[T], finish: Callable[[T], None]) -> None:
    """Have so many queued at a time: the next is created before the oldest is waited for."""
    queued: list[T] = []
    for new in created:
        queued.append(new)
        if len(queued) >= most:
            finish(queued.pop(0))
    for last in queued:
        finish(last)
