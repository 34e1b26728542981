"""Reads of blocks that are not in the page cache: by system calls, straight into the KV memory.

A page fault makes the kernel read around itself (read_ahead_kb at a time), half of it before the
fault; `preadv` says how much is wanted, so that the device gets it in one request and
the page cache takes it in large pieces. Threads wait for the device, so that it has several blocks
of a batch to do at a time; they hold no lock of Python's while they do. From the page cache the
mapping is the faster way.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, cast

from light_mem.engine import page_cache
from light_mem.engine.copy import Stopped
from light_mem.engine.device_threads import DeviceThreads, give_up
from light_mem.engine.places import Bytes1D, Place
from light_mem.engine.read_ahead import Span

if TYPE_CHECKING:
    from concurrent.futures import Future

    from typing_extensions import Buffer

PIECE_BYTES = 4 << 20  # of one call: an abort waits for it, some milliseconds
_MAX_BUFFERS = 1024  # of one call: IOV_MAX of Linux
# To ask costs a microsecond or two. Blocks shorter than this are not all asked for: after so many
# in a row that were in the page cache, as many are taken to be so. Not after one: in a store that
# is read for the first time, now and then one was read ahead with its neighbour.
_ASK_ALWAYS_BYTES = 1 << 20
_IN_A_ROW = 8


class Arriving:
    """A block on its way from the device to its place."""

    def __init__(self, nbytes: int, future: Future[bool]) -> None:
        self.nbytes = nbytes
        self._future = future

    def finish(self) -> None:
        """Wait until all of it is there; raises Stopped, OSError."""
        if not self._future.result():
            raise Stopped

    def give_up(self) -> None:
        """Wait until nothing is written to the place any more."""
        give_up(self._future)


class ColdReads:
    """Knows which blocks are cold, and reads them. Not thread-safe."""

    def __init__(self) -> None:
        self._in_a_row = 0
        self._trusted = 0
        self._can_read = hasattr(os, "preadv")
        self._threads = DeviceThreads("lightmem-cold")

    def is_cold(self, address: int, nbytes: int) -> bool:
        """Whether the end of `nbytes` mapped at `address` is not in the page cache, or was not
        lately: the reading around a neighbour may have brought the beginning."""
        if self._trusted and nbytes < _ASK_ALWAYS_BYTES:
            self._trusted -= 1
            return False
        # Not by a read with RWF_NOWAIT: that would begin a read of its own.
        if self._can_read and not page_cache.holds(address + nbytes - 1, 1):
            self._in_a_row = 0
            return True
        self._in_a_row += 1
        if self._in_a_row >= _IN_A_ROW:
            self._trusted = _IN_A_ROW
        return False

    def begin(self, span: Span, place: Place, stopped: Callable[[], bool]) -> Arriving:
        """Begin to read a span, as long as the place, to `place`. `stopped` is asked by another
        thread, between two pieces."""
        return Arriving(span.nbytes, self._threads.submit(_read, span, place, stopped))

    def close(self) -> None:
        """End the threads; nothing may be on its way."""
        self._threads.close()


def _read(span: Span, place: Place, stopped: Callable[[], bool]) -> bool:
    at = span.at
    slices = place.slices()
    short = span.nbytes <= PIECE_BYTES and len(slices) <= _MAX_BUFFERS
    for buffers, nbytes in [(slices, span.nbytes)] if short else _calls(slices):
        if stopped():
            return False
        end = at + nbytes
        while at < end:
            count = os.preadv(span.descriptor, cast("list[Buffer]", buffers), at)
            if not count:
                raise OSError("a data file ends too early")
            at += count
            if at < end:  # an error in the middle, say: the next call tells which
                buffers = _after(buffers, count)
    return True


def _after(buffers: list[Bytes1D], count: int) -> list[Bytes1D]:
    """What is left of buffers whose first `count` bytes are full."""
    for n, buffer in enumerate(buffers):
        if count < len(buffer):
            return [buffer[count:], *buffers[n + 1 :]]
        count -= len(buffer)
    return []


def _calls(slices: list[Bytes1D]) -> Iterator[tuple[list[Bytes1D], int]]:
    """The slices in order, as the buffers of one call each, and how many bytes those are."""
    buffers: list[Bytes1D] = []
    nbytes = 0
    for whole in slices:
        for start in range(0, len(whole), PIECE_BYTES):
            piece = whole[start : start + PIECE_BYTES]
            if buffers and (nbytes + len(piece) > PIECE_BYTES or len(buffers) == _MAX_BUFFERS):
                yield buffers, nbytes
                buffers, nbytes = [], 0
            buffers.append(piece)
            nbytes += len(piece)
    if buffers:
        yield buffers, nbytes
