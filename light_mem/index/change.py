"""ShardChange: the lock of a shard held, its state at hand, and both given up again.

A class and no generator: a change of a shard is in the way of each batch, twice, and of each short
write, and a generator costs 1 us there, several after a copy.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from light_mem.index.locks import PathLock


class ShardChange(AbstractContextManager[bool]):
    """See `ShardIndex.change`. To be entered once."""

    __slots__ = ("_begin", "_end", "_lock", "_timeout", "_within")

    def __init__(
        self,
        lock: PathLock,
        begin: Callable[[], bool],
        end: Callable[[bool], None],
        timeout: float,
        within: AbstractContextManager[None] | None,
    ) -> None:
        """`begin`: with the lock in hand; its answer is what is yielded. `end`: before the lock is
        given back, with whether the change is whole; not called where `begin` raises."""
        self._lock, self._begin, self._end = lock, begin, end
        self._timeout, self._within = timeout, within

    def __enter__(self) -> bool:
        self._lock.acquire(self._timeout)
        try:
            if self._within is None:
                return self._begin()
            self._within.__enter__()
            try:
                return self._begin()
            except BaseException:
                self._within.__exit__(*sys.exc_info())
                raise
        except BaseException:
            self._lock.release()
            raise

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        try:
            self._end(kind is None)
        finally:
            try:
                if self._within is not None:
                    self._within.__exit__(kind, *rest)
            finally:
                self._lock.release()
