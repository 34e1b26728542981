"""Copies between the KV memory and slots, with the checksum in the same pass.

The work goes in pieces that fit the caches, each copied and then checksummed from there, for a copy
reads memory ahead better than the checksum does. Two rules keep wrong bytes from being believed:

gather   the checksum is taken from the *source* (or a private copy of it) and never from the
         mapped slots: were another process to scribble over the slots, the block would not verify
scatter  copy first, then checksum the mapped slots: what is checksummed is as new as what was
         copied or newer, so a change of the slots during the copy shows in the checksum; or
         checksum a private copy, and copy that
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import xxhash

from light_mem.engine.pieces import (
    PIECE_BYTES,
    SMALL_PAGE_BYTES,
    has_short_regions,
    is_one_piece,
    is_scattered,
    pieces_of,
    straight_pieces,
)
from light_mem.engine.places import Bytes1D, Bytes2D, Place, Regions, RowNumbers, Rows
from light_mem.engine.sinks import Sink
from light_mem.index.keys import KEY_BYTES, key_bytes, put_key_bytes

_LINE = 64  # bytes of a cache line


class Stopped(Exception):
    """Internal: the copy was aborted between two pieces."""


def new_checksum(low: int, high: int) -> xxhash.xxh3_64:
    """A checksum that has seen the key; feed it the block's bytes in order."""
    return xxhash.xxh3_64(key_bytes(low, high))


class Copier:
    """Copies of one worker; holds its piece of scratch memory. Not thread-safe."""

    def __init__(self) -> None:
        room = np.empty(2 * _LINE + PIECE_BYTES, np.uint8)
        start = _LINE + -room.ctypes.data % _LINE
        self._scratch = room[start : start + PIECE_BYTES]
        # A whole block's key goes right before its bytes: one call then sums up both.
        self._key = room[start - KEY_BYTES : start].data
        self._keyed = room[start - KEY_BYTES : start + PIECE_BYTES].data
        self._memory: Bytes2D | None = None
        self._rows = -1  # of the piece at hand; -1: there is none for this memory
        self.forget()

    def _use_piece_of(self, memory: Bytes2D, rows: int) -> None:
        """Have a scratch piece of so many rows of the memory at hand: most blocks are alike."""
        self._use_memory(memory)
        if rows != self._rows:
            row_bytes = memory.shape[1]
            self._rows = rows
            self._piece = self._scratch[: rows * row_bytes]
            self._table = self._piece.reshape(rows, row_bytes)
            self._keyed_piece = self._keyed[: KEY_BYTES + rows * row_bytes]

    def _sum_of_piece(self, low: int, high: int) -> int:
        """The checksum of a whole block that lies in the scratch piece."""
        put_key_bytes(self._key, low, high)
        return xxhash.xxh3_64_intdigest(self._keyed_piece)

    def gather_whole(self, low: int, high: int, place: Rows, sink: Sink) -> int:
        """Copy a block that `is_one_piece` into `sink`; returns its checksum. Raises OSError of the
        sink.

        In as few steps as it goes: between the copies of two short blocks each step is slow, for
        the copies have pushed the interpreter out of the caches.
        """
        memory, rows = place
        self._use_piece_of(memory, len(rows))
        if not self._is_small:
            checksum = new_checksum(low, high)
            self._gather_rows(memory, rows, sink, 0, checksum)
            return checksum.intdigest()
        self._firsts[rows]
        memory.take(rows, 0, self._table, "clip")
        sink.put(0, self._piece)
        return self._sum_of_piece(low, high)

    def gather(
        self, place: Place, sink: Sink, checksum: xxhash.xxh3_64, stopped: Callable[[], bool]
    ) -> None:
        """Copy what lies at `place` into `sink`; raises Stopped, and OSError of the sink."""
        if is_one_piece(place):
            if stopped():
                raise Stopped
            self._gather_rows(place.memory, place.numbers, sink, 0, checksum)
            return
        if not is_scattered(place):
            gathered = self._gathered_pieces(place) if has_short_regions(place) else None
            for at, piece in gathered or straight_pieces(place):
                if stopped():
                    raise Stopped
                sink.put(at, piece)
                checksum.update(piece.data)
            return
        memory, rows = place
        row_bytes = memory.shape[1]
        for a, b in pieces_of(len(rows), max(1, PIECE_BYTES // row_bytes)):
            if stopped():
                raise Stopped
            self._gather_rows(memory, rows[a:b], sink, a * row_bytes, checksum)

    def _gathered_pieces(self, place: Regions) -> Iterator[tuple[int, Bytes1D]]:
        """`straight_pieces` of short regions, by way of the scratch piece as short rows: each is
        good until the next is asked for."""
        memory, scratch = place.memory.data, self._scratch.data
        at = filled = 0
        for offset, length in place.regions:
            end = offset + length
            while offset < end:
                count = min(end - offset, PIECE_BYTES - filled)
                scratch[filled : filled + count] = memory[offset : offset + count]
                offset += count
                filled += count
                if filled == PIECE_BYTES:
                    yield at, self._scratch
                    at += filled
                    filled = 0
        if filled:
            yield at, self._scratch[:filled]

    def _gather_rows(
        self, memory: Bytes2D, rows: RowNumbers, sink: Sink, at: int, checksum: xxhash.xxh3_64
    ) -> None:
        """Copy the rows of one piece."""
        self._use_memory(memory)
        if self._is_small:
            piece = self._scratch[: len(rows) * memory.shape[1]]
            self._firsts[rows]
            memory.take(rows, 0, piece.reshape(len(rows), -1), "clip")
            sink.put(at, piece)
            checksum.update(piece.data)
            return
        sink.put_rows(at, memory, rows)
        _update(checksum, memory, rows)

    def scatter_whole(
        self, low: int, high: int, place: Rows, source: Bytes1D, verify: bool
    ) -> int | None:
        """Copy a block that `is_one_piece` from `source`; returns the checksum, None unless
        `verify`. In as few steps as it goes, as `gather_whole`."""
        self._put(place.memory, place.numbers, source)
        if not verify:
            return None
        checksum = new_checksum(low, high)
        checksum.update(source.data)
        return checksum.intdigest()

    def scatter_checked(
        self,
        low: int,
        high: int,
        place: Rows,
        fill: Callable[[Bytes1D], bool],
        checksum: int | None,
    ) -> bool:
        """Have `fill` put a block that `has_small_rows` into private memory, and copy it to its
        rows if it says so and the sum is `checksum` (None: any); whether it was copied."""
        memory, rows = place
        self._use_piece_of(memory, len(rows))
        if not fill(self._piece):
            return False
        if checksum is not None and self._sum_of_piece(low, high) != checksum:
            return False
        self._put(memory, rows, self._piece)
        return True

    def scatter(
        self,
        source: Bytes1D,
        place: Place,
        checksum: xxhash.xxh3_64 | None,
        stopped: Callable[[], bool],
    ) -> None:
        """Copy `source`, as long as the place, to `place`; raises Stopped."""
        if is_one_piece(place):
            if stopped():
                raise Stopped
            self._put(place.memory, place.numbers, source)
            if checksum is not None:
                checksum.update(source.data)
            return
        if not is_scattered(place):
            self._scatter_straight(source, place, checksum, stopped)
            return
        memory, rows = place
        row_bytes = memory.shape[1]
        for a, b in pieces_of(len(rows), PIECE_BYTES // row_bytes):
            if stopped():
                raise Stopped
            piece = source[a * row_bytes : b * row_bytes]
            self._put(memory, rows[a:b], piece)
            if checksum is not None:
                checksum.update(piece.data)

    def _scatter_straight(
        self,
        source: Bytes1D,
        place: Place,
        checksum: xxhash.xxh3_64 | None,
        stopped: Callable[[], bool],
    ) -> None:
        summed = copied = 0
        for at, target in straight_pieces(place):
            if copied == summed and stopped():
                raise Stopped
            copied = at + len(target)
            target[:] = source[at:copied]
            # Short ones together: a call for each costs more than its bytes.
            if copied - summed >= PIECE_BYTES // 2:
                if checksum is not None:
                    checksum.update(source[summed:copied].data)
                summed = copied
        if checksum is not None:
            checksum.update(source[summed:copied].data)

    def _put(self, memory: Bytes2D, rows: RowNumbers, source: Bytes1D) -> None:
        """Copy `source` to rows of the memory."""
        self._use_memory(memory)
        if self._is_small:
            self._firsts[rows]
        self._elements.put(rows, source.view(self._element))

    def forget(self) -> None:
        """Let go of the memory that was copied from or to last."""
        self._use_memory(np.empty((0, 1), np.uint8))

    def _use_memory(self, memory: Bytes2D) -> None:
        """Have views of the memory at hand: most blocks are of the same."""
        if memory is self._memory:
            return
        self._memory = memory
        self._is_small = memory.shape[1] < SMALL_PAGE_BYTES
        # To be loaded before small rows are copied: the processor then looks up the addresses of
        # all of them, and fetches, side by side. While rows are copied it gets to one after the
        # other, and begins each with a wait: a fifth of the time of rows of 1 KiB, a tenth of those
        # of 4 KiB, nothing of those of 32 KiB.
        self._firsts = memory[:, 0]
        # An array of one element a row: `put` copies an element by one call, where an assignment
        # to rows walks an iterator (64 rows of 3,840 bytes: 7.5 against 10.8 us).
        self._element = np.dtype((np.void, memory.shape[1]))
        self._elements = memory.view(self._element).reshape(-1)
        self._rows = -1


def _update(checksum: xxhash.xxh3_64, memory: Bytes2D, rows: RowNumbers) -> None:
    for row in rows.tolist():
        checksum.update(memory[row].data)
