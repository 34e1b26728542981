"""Reads of blocks that are not in the page cache: by system calls, straight into the KV memory.

A page fault makes the kernel read around itself (read_ahead_kb at a time), half of it before the
fault; `preadv` says how much is wanted, and calls in the order of the file have it read ahead in
large pieces while the last one is copied. What does not follow what was read before it is asked for
beforehand (`expect`), so that the device has several blocks to do at a time; what does follow is
not, for it would come in small pages, at half the speed. There are no threads that wait for the
device: they read a file out of order, which ends the reading ahead, and cost more processor time
than a block's copy (measured: 1.0 to 1.5 instead of 2.0 GB/s).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, cast

from light_mem.engine import page_cache
from light_mem.engine.copy import Stopped
from light_mem.engine.places import Bytes1D, Place
from light_mem.engine.read_ahead import Span

if TYPE_CHECKING:
    from typing_extensions import Buffer

PIECE_BYTES = 4 << 20  # of one call: an abort waits for it, some milliseconds
_MAX_BUFFERS = 1024  # of one call: IOV_MAX of Linux
# To ask costs a microsecond or two. Blocks shorter than this are not all asked for: after so many
# in a row that were in the page cache, as many are taken to be so. Not after one: in a store that
# is read for the first time, now and then one was read ahead with its neighbour.
_ASK_ALWAYS_BYTES = 1 << 20
_IN_A_ROW = 8
# After a cold run so many bytes are read like it, wherever they are: the kernel is reading ahead,
# so they may be on their way, and the mapping would wait for them by faults.
_LIKE_THE_LAST = 16 << 20
# What is asked for beforehand, where it is short: a long one keeps the device busy by itself.
_EXPECT_BYTES = 1 << 20


class ColdReads:
    """Knows which blocks are cold, and reads them. Not thread-safe."""

    def __init__(self) -> None:
        self._in_a_row = 0
        self._trusted = 0
        self._cold_bytes = 0  # still to be read like the last cold run
        self._can_read = hasattr(os, "preadv")
        self._can_expect = hasattr(os, "posix_fadvise")  # macOS has preadv alone

    @property
    def going_on(self) -> bool:
        """Whether what is read next is taken to be cold."""
        return self._cold_bytes > 0

    def is_cold(self, address: int, nbytes: int) -> bool:
        """Whether the end of `nbytes` mapped at `address` is not in the page cache, or was not
        lately: the reading around a neighbour may have brought the beginning."""
        if self._trusted and nbytes < _ASK_ALWAYS_BYTES:
            self._trusted -= 1
            return False
        # Not by a read with RWF_NOWAIT: that would begin a read of its own.
        if self._can_read and not page_cache.holds(address + nbytes - 1, 1):
            self._in_a_row = 0
            self._cold_bytes = _LIKE_THE_LAST
            return True
        if self._cold_bytes > 0:
            self._cold_bytes -= nbytes
            return True
        self._in_a_row += 1
        if self._in_a_row >= _IN_A_ROW:
            self._trusted = _IN_A_ROW
        return False

    def expect(self, span: Span) -> None:
        """Have the device begin with a span that is read soon, but not right after what lies
        before it in the file."""
        if self._can_expect and span.nbytes < _EXPECT_BYTES:
            os.posix_fadvise(*span, os.POSIX_FADV_WILLNEED)

    def read(self, span: Span, place: Place, stopped: Callable[[], bool]) -> None:
        """Read a span to `place`, as long as it. `stopped` is asked before each piece; raises
        Stopped, OSError."""
        at = span.at
        slices = place.slices()
        short = span.nbytes <= PIECE_BYTES and len(slices) <= _MAX_BUFFERS
        for buffers, nbytes in [(slices, span.nbytes)] if short else _calls(slices):
            if stopped():
                raise Stopped
            end = at + nbytes
            while at < end:
                count = os.preadv(span.descriptor, cast("list[Buffer]", buffers), at)
                if not count:
                    raise OSError("a data file ends too early")
                at += count
                if at < end:  # an error in the middle, say: the next call tells which
                    buffers = _after(buffers, count)


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
