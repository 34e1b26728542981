"""Writes past the page cache, from memory of the worker's own: `page_cache="drop"`.

Through the page cache the kernel makes a page for each 4 KiB, copies, and writes out from there:
several times the processor time of a write by O_DIRECT from huge pages, and the device waits for
it. Here a block is copied into buffers, as it would be into slots, and threads write them while the
next ones are filled. What was put is divided into *cuts*, of blocks that are published together:
one lands while the next one is put, so that the device is not idle between them.

O_DIRECT writes whole pages of the kernel. Of the first and last one, which blocks share with their
neighbours, each writes its part through the page cache: the *edges*.

Order that binds: the edges come when nothing is under way, for the kernel cannot take pages out of
its cache that are written to meanwhile, and it has pages longer than 4 KiB. A block is described
and found only after that, and its slots are nobody else's before. A killed process keeps its locks
until the kernel is through with its requests.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from light_mem.engine.device_threads import DeviceThreads
from light_mem.engine.maps import private_buffers
from light_mem.engine.pieces import PIECE_BYTES
from light_mem.engine.places import Bytes1D, Bytes2D, RowNumbers
from light_mem.engine.read_ahead import ALIGN, DEPTH, Span
from light_mem.engine.sinks import Store, StoreRows

if TYPE_CHECKING:
    from concurrent.futures import Future

# Two pieces of a copy, and what is left of a page from before.
_BUFFER_BYTES = 2 * PIECE_BYTES + ALIGN
# Shorter spans go through the page cache: a request costs the device about 100 us whatever its
# length, and the kernel writes out many of them together.
LEAST_BYTES = 64 * 1024

Edge = tuple[bytes, Span]  # what is written through the page cache, and where


class Cut:
    """What was put between two calls of `DirectWrites.cut`."""

    def __init__(self) -> None:
        self.edges: list[Edge] = []  # to be written through the page cache when it has landed
        self.cached: list[Span] = []  # what went through it, for the file system refused
        self.failed: BaseException | None = None  # what failed first
        self.under_way = 0  # requests


class _Request(NamedTuple):
    buffer: Bytes1D
    span: Span  # with the descriptor for the page cache
    written: Future[bool]  # whether past the page cache
    cut: Cut


class DirectWrites:
    """Buffers of one process, and what is under way. Not thread-safe."""

    def __init__(self) -> None:
        self._threads = DeviceThreads("lightmem-write")
        self._free: list[Bytes1D] = []
        self._under_way: deque[_Request] = deque()
        self._run: DirectSink | None = None
        self._cut = Cut()

    def sink(self, span: Span, direct: int) -> DirectSink:
        """Where the bytes for `span` are put, `direct` the descriptor for O_DIRECT; what follows
        the one before goes with it. Raises OSError."""
        if self._run is None or self._run.next != span[:2]:
            self._end_run()
            self._run = DirectSink(self, span, direct)
        return self._run

    def buffer(self) -> Bytes1D:
        """A buffer to fill; waits for one if all are under way. Raises OSError."""
        if not self._free and not self._under_way:
            self._free = private_buffers(DEPTH, _BUFFER_BYTES)
        if not self._free:
            self._take_back()
        return self._free.pop()

    def give_back(self, buffer: Bytes1D) -> None:
        """A buffer that is not written."""
        self._free.append(buffer)

    def send(self, buffer: Bytes1D, first: int, end: int, span: Span, direct: int) -> None:
        """Write bytes `[first, end)` of a buffer to a span; the buffer is ours again."""
        written = self._threads.submit(_store, buffer[first:end], span, direct)
        self._under_way.append(_Request(buffer, span, written, self._cut))
        self._cut.under_way += 1

    def put_edge(self, piece: Bytes1D, span: Span) -> None:
        """Keep a copy of bytes that are to go through the page cache."""
        self._cut.edges.append((piece.tobytes(), span))

    def cut(self) -> Cut:
        """All that was put since the last cut; what is put from now on is another cut's."""
        try:
            self._end_run()
        except OSError as error:
            self._cut.failed = self._cut.failed or error
        cut, self._cut = self._cut, Cut()
        return cut

    def land(self, cut: Cut) -> None:
        """Wait until the cut is on the device, except its edges. If it has edges, wait until no
        request of any cut is under way.

        Raises the first OSError of this cut; its edges must then be discarded. Nothing of the cut
        is under way afterwards, whatever happens.
        """
        while cut.under_way or (cut.edges and self._under_way):
            self._take_back()
        failed, cut.failed = cut.failed, None
        if failed is not None:
            try:
                raise failed
            finally:
                del failed  # in a cycle, the memory that was copied from would stay

    def close(self) -> None:
        """Wait for what is under way, whatever becomes of it, and end the threads."""
        self._threads.close()

    def _end_run(self) -> None:
        """Hand all that was put to the device; raises OSError."""
        run, self._run = self._run, None
        if run is not None:
            run.end()

    def _take_back(self) -> None:
        buffer, span, written, cut = self._under_way.popleft()
        error = written.exception()  # waits, also where another one has failed
        cut.under_way -= 1
        if error is not None:
            cut.failed = cut.failed or error
        elif not written.result():
            cut.cached.append(span)
        self._free.append(buffer)


class DirectSink:
    """Slots of a file that are filled in order and past the page cache, of one block or of several
    that follow each other; a `sinks.Sink`. Not thread-safe."""

    by_calls = False

    def __init__(self, writes: DirectWrites, span: Span, direct: int) -> None:
        """They begin where `span` does; see `DirectWrites.sink`."""
        self._writes = writes
        self._cached, self._direct = span.descriptor, direct
        self._at = span.at - span.at % ALIGN  # in the file, of the buffer's first byte
        self._begin = self._filled = span.at - self._at  # what is ours in the buffer
        self._is_long = False
        self._buffer = writes.buffer()

    @property
    def next(self) -> tuple[int, int]:
        """The descriptor, and where in the file goes what is put next."""
        return self._cached, self._at + self._filled

    def storing(self, at: int, nbytes: int) -> Store:
        return self._put, None

    def storing_rows(self, at: int, memory: Bytes2D, rows: RowNumbers) -> StoreRows:
        return self._put_rows, (memory, rows)

    def _put(self, _: None, piece: Bytes1D) -> None:
        self._room(len(piece))[:] = piece

    def _put_rows(self, memory: Bytes2D, rows: RowNumbers) -> None:
        room = self._room(len(rows) * memory.shape[1])
        memory.take(rows, 0, room.reshape(len(rows), -1), "clip")

    def end(self) -> None:
        """All was put: hand the rest to the device. Raises OSError."""
        try:
            if self._is_long or self._filled - self._begin >= LEAST_BYTES:
                self._send()
            if self._filled > self._begin:
                self._put_edge(self._begin, self._filled)
        finally:
            self._writes.give_back(self._buffer)

    def _room(self, nbytes: int) -> Bytes1D:
        """Where the next `nbytes`, a piece of a copy at most, go."""
        if self._filled + nbytes > len(self._buffer):
            self._send()
        filled = self._filled
        self._filled += nbytes
        return self._buffer[filled : self._filled]

    def _send(self) -> None:
        """Hand over the whole pages of the buffer; go on in another with what is left."""
        begin, filled = self._begin, self._filled
        if begin % ALIGN:
            first = min(begin + -begin % ALIGN, filled)
            self._put_edge(begin, first)
            begin = self._begin = first
        end = filled - filled % ALIGN
        if end <= begin:
            return
        full = self._buffer
        self._buffer = self._writes.buffer()
        left = filled - end
        self._buffer[:left] = full[end:filled]
        self._is_long = True
        span = Span(self._cached, self._at + begin, end - begin)
        self._writes.send(full, begin, end, span, self._direct)
        self._at += end
        self._begin, self._filled = 0, left

    def _put_edge(self, begin: int, end: int) -> None:
        span = Span(self._cached, self._at + begin, end - begin)
        self._writes.put_edge(self._buffer[begin:end], span)


def _store(data: Bytes1D, span: Span, direct: int) -> bool:
    """Write to a span past the page cache; False: through it, for the file system refuses."""
    done = 0
    past_cache = True
    while done < span.nbytes:
        rest, at = data[done:].data, span.at + done
        try:
            count = os.pwrite(direct if past_cache else span.descriptor, rest, at)
        except OSError as error:
            if not past_cache or error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            past_cache = False
            continue
        if count < span.nbytes - done:  # go on at a place that O_DIRECT can write to
            count -= count % ALIGN
            if not count:
                raise OSError(errno.EIO, f"a write stops at byte {at}")
        done += count
    return past_cache
