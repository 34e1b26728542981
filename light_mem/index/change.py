"""ShardChange: the lock of a shard held, its state at hand, and both given up again.

A class and no generator: a change of a shard is in the way of each batch, twice, and of each short
write, and a generator costs 1 us there, several after a copy.

A signal handler may raise between any two steps, so everything is acquired inside a `try`, and
cleanup asks what is held now rather than how far the code got. Not covered:

- an exception raised as the outermost `__exit__` is entered, before its `try`: everything stays
  held until the traceback is dropped (`__del__`), and if another thread drops it, the lock between
  threads stays held for good
- a second exception while the first is being handled
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from light_mem.index.locks import PathLock


class Within(Protocol):
    """What changes are made within: see `Fence`."""

    def enter(self, change: int) -> None:
        """A change begins."""

    def leave(self, change: int) -> None:
        """It has ended; nothing happens where it never began, or has been told of before."""


class ShardChange(AbstractContextManager[bool]):
    """See `ShardIndex.change`. To be entered once."""

    __slots__ = ("_begin", "_end", "_lock", "_me", "_timeout", "_within")

    def __init__(
        self,
        lock: PathLock,
        begin: Callable[[], bool],
        end: Callable[[bool], None],
        timeout: float,
        within: Within | None,
    ) -> None:
        """`begin`: with the lock in hand; its answer is what is yielded. `end`: before the lock is
        given back, with whether the change is whole; not called where `begin` raises."""
        self._lock, self._begin, self._end = lock, begin, end
        self._timeout, self._within = timeout, within
        self._me = 0  # its name to others: a reference would keep it from being dropped

    def __enter__(self) -> bool:
        me = self._me = id(self)
        try:
            self._lock.acquire(me, self._timeout)
            if self._within is not None:
                self._within.enter(me)
            return self._begin()
        except BaseException:
            self._let_go()
            raise

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            self._end(kind is None)
        finally:
            self._let_go()

    def _let_go(self) -> None:
        try:
            if self._within is not None:
                self._within.leave(self._me)
        finally:
            self._lock.release(self._me)
        self._me = 0  # last: what is cut short before is to be done again

    def give_up(self) -> None:
        """End the change as incomplete if it is still open. For callers whose `__enter__` or
        `__exit__` may have been interrupted."""
        if not self._me:
            return
        try:
            if self._lock.is_held(self._me):
                self._end(False)
        finally:
            self._let_go()

    def __del__(self) -> None:
        if getattr(self, "_me", 0):  # `__init__` may have been cut short, too
            self.give_up()
