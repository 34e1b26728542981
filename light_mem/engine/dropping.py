"""`page_cache="drop"`: what a worker has moved does not stay in the page cache.

Without it a store that is larger than memory pushes everything else out of the page cache, and its
writes run until the kernel stops the writer to wait for the device. With it:

write  by `pwrite`; the device begins at once, and the worker waits for what it wrote
       WINDOW_BYTES ago, then drops that. So a worker has some WINDOW_BYTES dirty at most, and the
       device is never idle while blocks come
read   by `preadv` into scratch memory, WINDOW_BYTES read ahead over the blocks of a batch; each
       block's pages are dropped when they are in the KV memory

Nothing goes through a mapping: a page that any process has mapped cannot be dropped. Nothing here
needs to survive a kill: what a dead worker would have dropped the kernel drops when it needs room.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import xxhash

from light_mem.engine import page_cache
from light_mem.engine.copy import PIECE_BYTES, Copier
from light_mem.engine.places import Bytes1D, Place, Regions, Rows

WINDOW_BYTES = 32 << 20


class Span(NamedTuple):
    """Bytes `[at, at + nbytes)` of a data file."""

    descriptor: int
    at: int
    nbytes: int


class Dropper:
    """Moves the bytes of one process past the page cache. Not thread-safe.

    Its descriptors belong to the shards' files: `finish` before they are closed.
    """

    def __init__(self, window: int = WINDOW_BYTES) -> None:
        self._window = window
        self._written: deque[Span] = deque()
        self._written_bytes = 0
        self._scratch = np.empty(0, np.uint8)
        # What the batch in hand reads, and where each span ends if they are laid end to end.
        self._planned: list[Span] = []
        self._starts: dict[tuple[int, int], int] = {}
        self._ends: list[int] = []
        self._ahead = 0

    # --- writing ---------------------------------------------------------------------------------

    def wrote(self, span: Span) -> None:
        """A span was written by `pwrite`: the device begins with it now. Raises OSError."""
        page_cache.start_write_out(*span)
        self._written.append(span)
        self._written_bytes += span.nbytes

    def keep_up(self) -> None:
        """Wait for and drop what was written before the last WINDOW_BYTES; raises OSError."""
        while self._written_bytes > self._window and self.drop_next():
            pass

    def drop_next(self) -> bool:
        """Wait for and drop the oldest span; whether there was one. Raises OSError."""
        if not self._written:
            return False
        span = self._written.popleft()
        self._written_bytes -= span.nbytes
        page_cache.finish_write_out(*span)
        page_cache.drop(*span)
        return True

    def finish(self) -> None:
        """Wait for and drop all that was written; raises OSError, of the last that failed."""
        failed: OSError | None = None
        while self._written:
            try:
                self.drop_next()
            except OSError as error:
                failed = error
        if failed is not None:
            raise failed

    # --- reading ---------------------------------------------------------------------------------

    def plan(self, spans: Sequence[Span]) -> None:
        """These are read next, in this order, as far as nothing speaks against it."""
        self._planned = list(spans)
        self._ends = np.cumsum([span.nbytes for span in spans], dtype=np.int64).tolist()
        self._starts = {
            (span.descriptor, span.at): end - span.nbytes
            for span, end in zip(self._planned, self._ends, strict=True)
        }
        self._ahead = 0

    def read(
        self,
        span: Span,
        copier: Copier,
        place: Place,
        checksum: xxhash.xxh3_64 | None,
        stopped: Callable[[], bool],
    ) -> None:
        """Copy a span to `place`, as long as it, and drop it; raises Stopped, OSError.

        The checksum is taken from private memory, so it is that of the very bytes copied.
        """
        base = self._starts.get((span.descriptor, span.at))
        piece_bytes = PIECE_BYTES
        if isinstance(place, Rows):
            row_bytes = int(place.memory.shape[1])
            if row_bytes > PIECE_BYTES:
                place = _as_regions(place)
            else:
                piece_bytes -= PIECE_BYTES % row_bytes
        try:
            for done in range(0, span.nbytes, piece_bytes):
                if base is not None:
                    self._read_ahead(base + done + self._window)
                count = min(piece_bytes, span.nbytes - done)
                piece = self._load(span.descriptor, span.at + done, count)
                whole = count == span.nbytes
                part = place if whole else place.part(done, done + count)
                copier.scatter(piece, part, checksum, stopped)
        finally:
            page_cache.drop(*span)

    def _read_ahead(self, until: int) -> None:
        """Ask for what is planned up to byte `until` and was not asked for."""
        while self._ahead < until and self._planned and self._ahead < self._ends[-1]:
            n = bisect_right(self._ends, self._ahead)
            span, inside = self._planned[n], self._planned[n].nbytes - self._ends[n] + self._ahead
            count = min(span.nbytes - inside, max(PIECE_BYTES, until - self._ahead))
            page_cache.read_ahead(span.descriptor, span.at + inside, count)
            self._ahead += count

    def _load(self, descriptor: int, at: int, nbytes: int) -> Bytes1D:
        if len(self._scratch) < nbytes:
            self._scratch = np.empty(max(nbytes, PIECE_BYTES), np.uint8)
        piece = self._scratch[:nbytes]
        done = 0
        while done < nbytes:
            count = os.preadv(descriptor, [piece[done:].data], at + done)
            if not count:
                raise OSError(f"the data file ends {nbytes - done} bytes too early")
            done += count
        return piece


def _as_regions(rows: Rows) -> Regions:
    """The same memory, cut anywhere: pages that are larger than a piece."""
    row_bytes = int(rows.memory.shape[1])
    regions = [(row * row_bytes, row_bytes) for row in rows.numbers.tolist()]
    return Regions(rows.memory.reshape(-1), regions)
