"""When a dead worker's place is filled again.

A worker that did something is replaced at once. One that dies again and again before it has done
anything (a broken disk, no memory left, a library that crashes) would be started ten times a
second forever, so the pause before its replacement grows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

FREE = 2  # useless deaths in a row without a pause: the kernel may have killed for want of memory
FIRST_SECONDS = 0.2  # the first pause; each further one is twice as long
MOST_SECONDS = 10.0  # ... up to this: the cause may be repaired while a server waits
LONG_SECONDS = 60.0  # a worker that lived this long was not broken
WANT_SECONDS = 5.0  # how long a lack of memory or descriptors may last while no worker is well


class Restarts:
    """Which workers are to be started, and when. One thread."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._born: dict[int, float] = {}
        self._useless: dict[int, int] = {}  # deaths in a row without having done anything
        self._due: dict[int, float] = {}
        # Those whose last start failed: since when no other was well, inf: one was.
        self._wanting: dict[int, float] = {}

    def started(self, number: int) -> None:
        """A worker was started."""
        self._born[number] = self._now()
        self._wanting.pop(number, None)

    def failed(self, number: int, alone: bool) -> float | None:
        """A worker could not be started; returns in how many seconds it is tried again, None: no
        more. `alone`: no other one is well."""
        now = self._now()
        since = min(self._wanting.get(number, now), now) if alone else math.inf
        if now - since >= WANT_SECONDS:
            return None
        self._wanting[number] = since
        return self.died(number, was_of_use=False)

    def failed_last(self, number: int) -> bool:
        """Whether the last try to start it was in vain."""
        return number in self._wanting

    def died(self, number: int, was_of_use: bool) -> float:
        """A worker died and is to be replaced; returns in how many seconds.

        `was_of_use`: it did blocks, or died over one.
        """
        now = self._now()
        # `pop`: a long life counts once, not again when starting a replacement fails.
        if was_of_use or now - self._born.pop(number, now) >= LONG_SECONDS:
            self._useless[number] = 0
        else:
            self._useless[number] = self._useless.get(number, 0) + 1
        more = self._useless[number] - FREE
        pause = min(FIRST_SECONDS * 2.0 ** min(more - 1, 32), MOST_SECONDS) if more > 0 else 0.0
        self._due[number] = now + pause
        return pause

    def take(self) -> list[int]:
        """Workers to be started now, each told once."""
        now = self._now()
        due = [number for number, at in self._due.items() if at <= now]
        for number in due:
            del self._due[number]
        return due

    def wait(self, most: float) -> float:
        """Seconds until the next is due, but no more than `most`."""
        return max(0.0, min([most, *(at - self._now() for at in self._due.values())]))
