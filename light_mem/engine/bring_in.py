"""Brings what was read past the page cache into it, when there is nothing else to do.

A block that is read once is often read again, and then the page cache gives it several times faster
than the device. But whoever waits for the first read should not wait for that. So the device reads
such a block twice, the second time while nobody waits.
"""

from __future__ import annotations

import os
from collections import deque

import numpy as np

from light_mem.engine.read_ahead import Span

PIECE_BYTES = 1 << 20  # at a time: about a millisecond, for which new work waits
# What was read last; of what a worker had no time for, older blocks are let go.
LIMIT_BYTES = 1 << 30


class BringIn:
    """What one process has still to bring in. Not thread-safe.

    The descriptors belong to the shards' files: `clear` before they are closed.
    """

    def __init__(self, limit: int = LIMIT_BYTES) -> None:
        self._limit = limit
        self._spans: deque[Span] = deque()
        self._nbytes = 0

    def add(self, span: Span) -> None:
        """Bring a span in some time; its descriptor reads through the page cache."""
        self._spans.append(span)
        self._nbytes += span.nbytes
        while self._nbytes > self._limit:
            self._nbytes -= self._spans.popleft().nbytes

    def next(self) -> bool:
        """Bring in one piece; whether there was one."""
        if not self._spans:
            return False
        span = self._spans.popleft()
        wanted = min(span.nbytes, PIECE_BYTES)
        try:
            # Not by an advice, which does not wait: it would fill the device's queue for who comes
            # next. Not by touching a mapping: without the GIL the thread that watches for the
            # server's death runs on.
            count = os.preadv(span.descriptor, [np.empty(wanted, np.uint8).data], span.at)
        except OSError:
            count = 0  # whoever reads the block next says what is wrong with it
        self._nbytes -= span.nbytes
        left = Span(span.descriptor, span.at + count, span.nbytes - count)
        if count and left.nbytes:
            self._spans.appendleft(left)
            self._nbytes += left.nbytes
        return True

    def clear(self) -> None:
        """Let go of the rest."""
        self._spans.clear()
        self._nbytes = 0
