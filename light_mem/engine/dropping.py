"""`page_cache="drop"`: what a worker has moved does not stay in the page cache.

Without it a store that is larger than memory pushes everything else out of the page cache, and its
writes run until the kernel stops the writer to wait for the device. With it:

write  past the page cache (`direct_writes.py`). What cannot go so, short blocks, pages shared by
       two blocks, all of it where the file system has no O_DIRECT, goes by `pwrite`: the device
       begins at once, and the worker waits for what it wrote WINDOW_BYTES ago, then drops that. So
       a worker has some WINDOW_BYTES dirty at most, and the device is never idle while blocks come
read   past the page cache into memory of the worker's own, ahead over the blocks of a batch; pages
       that a block has in the page cache all the same are dropped when it was read (`DeviceReads`)

Nothing goes through a mapping: a page that any process has mapped cannot be dropped. Nothing here
needs to survive a kill: what a dead worker would have dropped the kernel drops when it needs room.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from light_mem.engine import page_cache
from light_mem.engine.direct_writes import Cut, DirectWrites
from light_mem.engine.read_ahead import Span
from light_mem.engine.sinks import FileSink, OpenFile, Sink

WINDOW_BYTES = 32 << 20


class Dropper:
    """Writes out and drops what one process has written. Not thread-safe.

    Its descriptors belong to the shards' files: `finish` before they are closed.
    """

    def __init__(self, window: int = WINDOW_BYTES) -> None:
        self._window = window
        self._written: deque[Span] = deque()
        self._written_bytes = 0
        self._direct = DirectWrites()

    @contextmanager
    def sink(self, span: Span, direct: int) -> Iterator[Sink]:
        """Where a block's bytes for `span` are put, in order; raises OSError. They are there after
        `land` of the cut that `cut` returns.

        `direct`: a descriptor of the file for O_DIRECT, -1: there is none.
        """
        if direct < 0:
            try:
                yield FileSink(OpenFile(span.descriptor), span.at)
            finally:
                self.wrote(span)
            return
        # If a block stops midway, the next block's span does not continue it, and so starts a new
        # sink.
        yield self._direct.sink(span, direct)

    def cut(self) -> Cut:
        """What was put since the last cut."""
        return self._direct.cut()

    def land(self, cut: Cut) -> None:
        """Return when a cut is written, as far as the device tells; raises OSError, of the first
        that failed. Whatever comes, none of it is under way then."""
        self._direct.land(cut)
        for piece, span in cut.edges:
            FileSink(OpenFile(span.descriptor), span.at).put(0, piece)
            self.wrote(span)
        for span in cut.cached:
            self.wrote(span)

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
        """Wait for and drop all that was written, and end the threads; raises OSError, of the last
        that failed."""
        failed: OSError | None = None
        while self._written:
            try:
                self.drop_next()
            except OSError as error:
                failed = error
        self._direct.close()
        if failed is not None:
            raise failed
