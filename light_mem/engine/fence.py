"""Makes sure that an engine changes nothing after it has left its store.

The last process to leave marks the index clean. A thread that was waiting for a shard's lock must
not change the shard after that, nor take a lease: the owner's record may be another process's by
then. So each change runs between `enter` and `leave`, with the shard's lock held; `shut` first
refuses new changes, then waits for those that had begun.

There is no lock in here, because a finalizer may run in the middle of any step, in the same thread.
"""

from __future__ import annotations

import threading
import time

from light_mem.errors import ServiceClosedError
from light_mem.index.locks import POLL_SECONDS


class Fence:
    """Any thread."""

    def __init__(self) -> None:
        self._holders: dict[int, int] = {}  # by change: its thread
        self.is_shut = False

    def enter(self, change: int) -> None:
        """Be changing something; raises ServiceClosedError once it is shut. `leave` must follow,
        also where this raises: a signal handler may do so when the change is in already."""
        # The order binds: whoever shuts sets the mark and then looks for holders.
        self._holders[change] = threading.get_ident()
        if self.is_shut:
            self.check()

    def leave(self, change: int) -> None:
        """A change has ended, if it was in."""
        self._holders.pop(change, None)

    @property
    def is_held(self) -> bool:
        """Whether anything is being changed."""
        return bool(self._holders)

    def check(self) -> None:
        """Raises ServiceClosedError once it is shut."""
        if self.is_shut:
            raise ServiceClosedError("the store was left meanwhile")

    def shut(self, timeout: float) -> bool:
        """Let no change begin any more; returns whether those that had begun have ended, within
        `timeout` seconds. A change of this very thread, in which a finalizer runs, never would."""
        self.is_shut = True
        me = threading.get_ident()
        deadline = time.monotonic() + timeout
        while self._holders:
            if me in list(self._holders.values()) or time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True
