"""Reads a list of spans in order, several pieces at a time, past the page cache.

By O_DIRECT where the file system has it: a read through the page cache costs four to five times
the CPU (measured: 0.5 to 0.65 seconds a GB against 0.1), which is what bounds a fast device. What
is dirty in the page cache the kernel writes out first, so both ways give the same bytes. Threads
wait for the device; they hold no lock of Python's while they do.
"""

from __future__ import annotations

import mmap
import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from light_mem.engine.device_threads import DeviceThreads, give_up
from light_mem.engine.maps import private_buffers
from light_mem.engine.places import Bytes1D
from light_mem.engine.slot_calls import cut_short

if TYPE_CHECKING:
    from concurrent.futures import Future

PIECE_BYTES = 1 << 20
DEPTH = 8  # requests under way or waiting to be taken
ALIGN = 4096  # of memory, offset and length: what any device's O_DIRECT wants


class Span(NamedTuple):
    """Bytes `[at, at + nbytes)` of a file."""

    descriptor: int
    at: int
    nbytes: int


class _Request:
    """Pieces that follow each other in a file, read together."""

    def __init__(self, parts: Sequence[Span], buffer: Bytes1D) -> None:
        self.parts = deque(parts)  # those that may be asked for yet
        self.buffer = buffer
        self.span = Span(parts[0].descriptor, parts[0].at, sum(part.nbytes for part in parts))
        self.data: Future[Bytes1D]

    def take(self) -> Bytes1D:
        """The bytes of the first part that is left; raises OSError."""
        part = self.parts[0]
        try:
            whole = self.data.result()
        except Exception:
            if part == self.span:
                raise
            return _load(part, self.buffer)  # an error in one part must not fail the others
        at = part.at - self.span.at
        return whole[at : at + part.nbytes]


class ReadAhead:
    """The pieces of one reader, in memory of its own. Not thread-safe.

    unit  a piece of a span is a multiple of it, the last one aside; up to PIECE_BYTES
    """

    def __init__(self, unit: int) -> None:
        self._piece_bytes = PIECE_BYTES - PIECE_BYTES % unit if unit <= PIECE_BYTES else PIECE_BYTES
        self._threads = DeviceThreads("lightmem-read")
        self._free: list[Bytes1D] = []
        self._under_way: deque[_Request] = deque()
        self._planned: deque[Span] = deque()  # in order, those that may be asked for yet
        self._next: deque[list[Span]] = deque()  # requests

    def plan(self, spans: Sequence[Span]) -> None:
        """Read these next, in this order. Whoever takes their pieces may skip any of them, or
        leave one before its end."""
        self._forget()
        self.extend(spans)

    def extend(self, spans: Sequence[Span]) -> None:
        """As `plan`, after what is planned already."""
        self._planned += spans
        self._next += self._requests(spans)
        self._begin()

    def pieces(self, span: Span) -> Generator[Bytes1D, None, None]:
        """The bytes of a span, piece by piece, each good until the next is asked for, or `plan` or
        `close` is called.

        One that was not planned is read all the same. Raises OSError.
        """
        if not span.nbytes:
            return
        if span not in self._planned:
            self.plan([span])
        while self._planned.popleft() != span:
            pass  # left out
        for wanted in self._cut(span):
            request = self._find(wanted)
            try:
                yield request.take()
            finally:
                # Else it was planned anew meanwhile, or somebody else has gone on.
                first = self._under_way[0] if self._under_way else None
                if first is request and request.parts[0] == wanted:
                    request.parts.popleft()
                    if not request.parts:
                        self._done_with_first()

    @property
    def has_landed(self) -> bool:
        """Whether all that is planned is there: the device is waited for no more."""
        return not self._next and all(request.data.done() for request in self._under_way)

    def close(self) -> None:
        """Wait for what is under way and end the threads."""
        self._forget()
        self._threads.close()

    def _cut(self, span: Span) -> Iterator[Span]:
        for done in range(0, span.nbytes, self._piece_bytes):
            yield Span(span.descriptor, span.at + done, min(self._piece_bytes, span.nbytes - done))

    def _requests(self, spans: Sequence[Span]) -> Iterator[list[Span]]:
        """The pieces of spans, those together that follow each other and are short."""
        parts: list[Span] = []
        nbytes = 0
        for piece in (piece for span in spans for piece in self._cut(span)):
            if parts and (
                nbytes + piece.nbytes > self._piece_bytes
                or piece[:2] != (parts[0].descriptor, parts[0].at + nbytes)
            ):
                yield parts
                parts, nbytes = [], 0
            parts.append(piece)
            nbytes += piece.nbytes
        if parts:
            yield parts

    def _find(self, wanted: Span) -> _Request:
        """The first request, with this piece as the first that is left of it."""
        while True:
            if not self._under_way:  # before what is under way: asked for twice, or out of order
                self.plan([wanted])
            request = self._under_way[0]
            while request.parts and request.parts[0] != wanted:
                request.parts.popleft()
            if request.parts:
                return request
            self._done_with_first()

    def _done_with_first(self) -> None:
        self._drop(self._under_way.popleft())
        self._begin()

    def _begin(self) -> None:
        while self._next and len(self._under_way) < DEPTH:
            if not self._free:
                # For all requests under way, with what is read around a piece.
                self._free = private_buffers(DEPTH, self._piece_bytes + 2 * ALIGN)
            request = _Request(self._next.popleft(), self._free.pop())
            request.data = self._threads.submit(_load, request.span, request.buffer)
            self._under_way.append(request)

    def _forget(self) -> None:
        self._planned.clear()
        self._next.clear()
        while self._under_way:
            self._drop(self._under_way.popleft())

    def _drop(self, request: _Request) -> None:
        give_up(request.data)
        self._free.append(request.buffer)


def open_direct(path: str | os.PathLike[str], like: int, flags: int = os.O_RDONLY) -> int:
    """A descriptor past the page cache, of the file that `like` has open and `path` named then.

    -1 where the path names another one by now, where the file system has no O_DIRECT,
    or a device has larger blocks than we read."""
    try:
        descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_DIRECT)
    except (AttributeError, OSError):
        return -1
    try:
        if not os.path.sameopenfile(descriptor, like):
            raise OSError("the store was moved away")
        os.preadv(descriptor, [mmap.mmap(-1, ALIGN)], ALIGN)
    except OSError:
        os.close(descriptor)
        return -1
    return descriptor


def _load(span: Span, buffer: Bytes1D) -> Bytes1D:
    """The bytes of a span; what O_DIRECT must read with them lies around them in the buffer."""
    first = span.at - span.at % ALIGN
    skipped = span.at - first
    wanted = skipped + span.nbytes
    length = wanted + -wanted % ALIGN
    done = 0
    while done < wanted:
        count = os.preadv(span.descriptor, [buffer[done:length].data], first + done)
        if done + count < wanted:  # go on at a place that O_DIRECT can read from
            whole = count - count % ALIGN
            if not whole:
                raise cut_short(wanted - done - count)
            count = whole
        done += count
    return buffer[skipped:wanted]
