"""Brings what was read past the page cache into it, when there is nothing else to do.

A block that is read once is often read again, and then the page cache gives it several times faster
than the device. But whoever waits for the first read should not wait for that. So the device reads
such a block twice, the second time while nobody waits. Where there is no such time, the second read
of a block goes through the page cache (`take`).
"""

from __future__ import annotations

import os
import time

import numpy as np

from light_mem.engine.places import Bytes1D
from light_mem.engine.read_ahead import Span

# Bytes loaded per step; new work waits for a step, so the size grows only while a step takes less
# than PIECE_SECONDS.
MIN_PIECE_BYTES, MAX_PIECE_BYTES = 128 << 10, 1 << 20
PIECE_SECONDS = 0.001
# A device that needs longer for the shortest piece has other things to do, and is left alone.
TOO_LONG_SECONDS = 0.02
# Limits of the backlog; beyond them the oldest reads are forgotten.
LIMIT_BYTES, LIMIT_SPANS = 1 << 30, 16384


class BringIn:
    """What one process has still to bring in. Not thread-safe.

    The descriptors belong to the shards' files: `clear` before they are closed.
    """

    def __init__(self, limit: int = LIMIT_BYTES) -> None:
        self._limit = limit
        self._spans: dict[tuple[int, int], Span] = {}  # by descriptor and start, oldest first
        self._nbytes = 0
        self._begun: Span | None = None  # what is left of one that is being brought in
        self._piece_bytes = MIN_PIECE_BYTES
        self._buffer: Bytes1D | None = None

    def __bool__(self) -> bool:
        return bool(self._begun or self._spans)

    def add(self, span: Span) -> None:
        """Bring a span in some time; its descriptor reads through the page cache."""
        self.take(span)
        self._spans[span[:2]] = span
        self._nbytes += span.nbytes
        while self._nbytes > self._limit or len(self._spans) > LIMIT_SPANS:
            self._pop_first()

    def take(self, span: Span) -> bool:
        """Remove the span that begins where this one does from those to be brought in. Returns
        whether there was one."""
        found = self._spans.pop(span[:2], None)
        if found is not None:
            self._nbytes -= found.nbytes
        return found is not None

    def next(self) -> bool:
        """Bring in one piece; whether there was one."""
        if not self:
            return False
        span, self._begun = self._begun or self._pop_first(), None
        wanted = min(span.nbytes, self._piece_bytes)
        started = time.monotonic()
        try:
            if self._buffer is None:
                self._buffer = np.empty(MAX_PIECE_BYTES, np.uint8)
            # Not by an advice, which does not wait: it would fill the device's queue for who comes
            # next. Not by touching a mapping: without the GIL the thread that watches for the
            # server's death runs on.
            count = os.preadv(span.descriptor, [self._buffer[:wanted].data], span.at)
        except (OSError, MemoryError):
            return True  # whoever reads the block next says what is wrong with it
        if 0 < count < span.nbytes:
            self._begun = Span(span.descriptor, span.at + count, span.nbytes - count)
        self._adapt(time.monotonic() - started)
        return True

    def clear(self) -> None:
        """Let go of the rest."""
        self._begun = None
        self._spans.clear()
        self._nbytes = 0

    def _pop_first(self) -> Span:
        span = self._spans.pop(next(iter(self._spans)))
        self._nbytes -= span.nbytes
        return span

    def _adapt(self, seconds: float) -> None:
        """Choose the next piece by what the last one took."""
        if seconds < PIECE_SECONDS:
            self._piece_bytes = min(MAX_PIECE_BYTES, 2 * self._piece_bytes)
        elif self._piece_bytes > MIN_PIECE_BYTES:
            self._piece_bytes //= 2
        elif seconds > TOO_LONG_SECONDS:
            self.clear()
