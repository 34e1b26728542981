"""Discards: blocks that are not to stay, and what is not sure yet to stay.

Taking a block out wants the lock of its shard, which a stopped process may hold for as long as it
likes. So a thread of its own does it, and no store or load waits for that.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

from light_mem.errors import ServiceClosedError, WorkerStartError
from light_mem.index.locks import LOCK_TIMEOUT_SECONDS
from light_mem.logs import Limited

log = logging.getLogger("light_mem")

PAUSE_SECONDS = 1.0  # after a failed attempt; twice as long after each further one
MAX_PAUSE_SECONDS = 60.0
_WARN_SECONDS = 30.0


class Doubts:
    """Hashes whose stored blocks may have to go. A counted set: a hash is in doubt while it was
    added more often than removed. Any thread; `in` takes no lock."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self._guard = threading.Lock()

    def __contains__(self, value: int) -> bool:
        return value in self._counts

    def add(self, hashes: Iterable[int]) -> None:
        """One doubt more of each."""
        with self._guard:
            for h in hashes:
                self._counts[h] = self._counts.get(h, 0) + 1

    def remove(self, hashes: Iterable[int]) -> None:
        """One doubt less of each."""
        with self._guard:
            for h in hashes:
                left = self._counts[h] - 1
                if left:
                    self._counts[h] = left
                else:
                    del self._counts[h]


class Discards:
    """Takes blocks out of the store, again and again until it is done. Any thread.

    delete  takes hashes out of the store; may wait, and may fail
    doubts  a hash is in doubt from `add` until it is out; for good when that is given up
    """

    def __init__(self, delete: Callable[[list[int]], object], doubts: Doubts) -> None:
        self._delete = delete
        self._doubts = doubts
        self._guard = threading.Lock()
        self._changed = threading.Condition(self._guard)
        self._waiting: deque[list[int]] = deque()  # the first may be in hand
        self._closing = False
        self._end = math.inf  # no attempt begins after this
        self._limited = Limited(each=1, seconds=_WARN_SECONDS)
        self._thread = threading.Thread(
            target=self._run, name="lightmem-lmcache-discards", daemon=True
        )
        self._thread.start()

    def add(self, hashes: list[int]) -> None:
        """Have blocks taken out; returns at once. After `close`, they are only told of."""
        self._doubts.add(hashes)
        with self._changed:
            if not self._closing:
                self._waiting.append(hashes)
                self._changed.notify_all()
                return
        _not_done(len(hashes), "the adapter is closed")

    def close(self, timeout: float) -> None:
        """Try once what is left. No attempt begins after `timeout` seconds; the one in hand is
        waited for. What fails then is an error in the log."""
        with self._changed:
            self._closing = True
            self._end = time.monotonic() + timeout
            self._changed.notify_all()
        self._thread.join(timeout + 2 * LOCK_TIMEOUT_SECONDS)
        if self._thread.is_alive():
            log.error("LMCache's adapter still takes objects out of the store while it closes")

    def _run(self) -> None:
        pause = PAUSE_SECONDS
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                hashes, last = self._waiting[0], self._closing
            failure, for_good = self._attempt(hashes)
            again = bool(failure) and not for_good and not last
            with self._changed:
                self._waiting.popleft()
                if again:
                    self._waiting.append(hashes)
            if again:
                self._limited.warning("what is not to stay is still in the store: %s", failure)
                with self._changed:
                    self._changed.wait_for(lambda: self._closing, pause)
                pause = min(2 * pause, MAX_PAUSE_SECONDS)
            elif failure:
                _not_done(len(hashes), failure)
            else:
                pause = PAUSE_SECONDS

    def _attempt(self, hashes: list[int]) -> tuple[str, bool]:
        """Why it failed, "" when it did not, and whether another attempt would fail too."""
        if time.monotonic() > self._end:
            return "others took too long", True
        try:
            self._delete(hashes)
        except Exception as error:  # a stopped holder of a lock, the device
            for_good = isinstance(error, ServiceClosedError | WorkerStartError)
            # As text: an exception in a log record would keep its frames, and the memory.
            return f"{type(error).__name__}: {error}", for_good
        self._doubts.remove(hashes)
        return "", False


def _not_done(blocks: int, why: str) -> None:
    log.error(
        "%d objects could not be taken out of the store; what is stored of them may be other "
        "objects' bytes: %s",
        blocks,
        why,
    )
