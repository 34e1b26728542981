"""Reads past the page cache, into memory of the worker's own, and a copy from there.

So are read the blocks that are not in the page cache, and all of them with `page_cache="drop"`. A
device that is asked for 1 MiB at a time, eight times at once, into huge pages, gives what it can;
through the page cache the kernel makes each page of 4 KiB, fills it and copies it, which takes four
times the processor time (`read_ahead.py`): 2.5 to 2.9 instead of 1.9 to 2.1 GB/s in two workers
(blocks of 4 MB and 63 MB; AMD EPYC, 2 cores, a device that gives 3.0).
"""

from __future__ import annotations

from collections.abc import Sequence

import xxhash

from light_mem.engine.copy import Stopping
from light_mem.engine.places import Place, Regions, Rows
from light_mem.engine.read_ahead import PIECE_BYTES, ReadAhead, Span
from light_mem.engine.scatter import Scatterer


class DirectReads:
    """Reads of one process. Not thread-safe.

    The descriptors belong to the shards' files: `close` before they are closed.
    """

    def __init__(self, page_bytes: int) -> None:
        self._ahead = ReadAhead(page_bytes)

    def plan(self, spans: Sequence[Span], more: bool = False) -> None:
        """These are read next, in this order; any of them may be left out. `more`: after what is
        planned already."""
        if more:
            self._ahead.extend(spans)
        else:
            self._ahead.plan(spans)

    @property
    def have_landed(self) -> bool:
        """Whether all that is planned is there: the device is waited for no more."""
        return self._ahead.has_landed

    def read(
        self,
        span: Span,
        scatterer: Scatterer,
        place: Place,
        checksum: xxhash.xxh3_64 | None,
        stopped: Stopping,
    ) -> None:
        """Copy a span to `place`, as long as it; raises Stopped, OSError.

        The checksum is taken from private memory, so it is that of the very bytes copied.
        """
        if isinstance(place, Rows) and place.memory.shape[1] > PIECE_BYTES:
            # The same memory, cut anywhere: pages that are larger than a piece.
            place = Regions(place.memory.reshape(-1), place.extents())
        done = 0
        pieces = self._ahead.pieces(span)
        try:
            for piece in pieces:
                end = done + len(piece)
                part = place if len(piece) == span.nbytes else place.part(done, end)
                scatterer.scatter([(part, piece, checksum)], stopped)
                done = end
        finally:
            pieces.close()

    def close(self) -> None:
        """Wait for what is under way and end the threads; a read after that starts them again."""
        self._ahead.close()
