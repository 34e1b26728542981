"""Reads of blocks that are not in the page cache: by system calls, straight into the KV memory.

A page fault makes the kernel read around itself, 128 KiB at a time (read_ahead_kb), half of it
before the fault; `preadv` says how much is wanted, so that the device gets it in one request and
the page cache takes it in large pieces. From the page cache the mapping is the faster way.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, cast

import xxhash

from light_mem.engine import page_cache
from light_mem.engine.copy import Stopped
from light_mem.engine.places import Bytes1D, Place
from light_mem.engine.read_ahead import Span

if TYPE_CHECKING:
    from typing_extensions import Buffer

PIECE_BYTES = 4 << 20  # of one call: an abort waits for it, some milliseconds
_MAX_BUFFERS = 1024  # of one call: IOV_MAX of Linux
# To ask costs a microsecond or two. Blocks shorter than this are not all asked for: after so many in
# a row that were in the page cache, as many are taken to be so. Not after one: in a store that is
# read for the first time, now and then one was read ahead with its neighbour.
_ASK_ALWAYS_BYTES = 1 << 20
_IN_A_ROW = 8


class ColdReads:
    """Knows which blocks are cold, and reads them. Not thread-safe."""

    def __init__(self) -> None:
        self._in_a_row = 0
        self._trusted = 0
        self._can_read = hasattr(os, "preadv")

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

    def read(
        self,
        span: Span,
        place: Place,
        checksum: xxhash.xxh3_64 | None,
        stopped: Callable[[], bool],
    ) -> None:
        """Read a span, as long as the place, to `place`; raises Stopped, OSError.

        The checksum is of what has arrived, so others who write to the place spoil it.
        """
        at = span.at
        for buffers, nbytes in _calls(place.slices()):
            if stopped():
                raise Stopped
            if os.preadv(span.descriptor, cast("list[Buffer]", buffers), at) != nbytes:
                raise OSError(errno.EIO, "a data file ends too early")
            if checksum is not None:
                for buffer in buffers:
                    checksum.update(buffer.data)
            at += nbytes


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
