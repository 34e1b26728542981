"""Copies between KV pages and mapped slots, with the checksum in the same pass.

The work goes in pieces that fit the second-level cache, so that the checksum finds the piece
there. Two orders keep wrong bytes from ever being believed:

gather   the checksum is taken from the *source* (or a private copy of it) and never from the
         mapped slots: were another process to scribble over the slots, the block would not verify
scatter  copy first, then checksum the mapped slots: what is checksummed is as new as what was
         copied or newer, so a change of the slots during the copy shows in the checksum
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import xxhash

from light_mem.engine.base import Bytes2D
from light_mem.index.keys import key_bytes

PIECE_BYTES = 512 * 1024  # half of the 1 MiB second-level cache of current server cores
# Below this a call a page costs more than a second copy of the piece inside the cache; measured
# crossing between 8 and 16 KiB.
SMALL_PAGE_BYTES = 12 * 1024

Rows = npt.NDArray[np.intp]


class Stopped(Exception):
    """Internal: the copy was aborted between two pieces."""


def new_checksum(low: int, high: int) -> xxhash.xxh3_64:
    """A checksum that has seen the key; feed it the block's bytes in order."""
    return xxhash.xxh3_64(key_bytes(low, high))


class Copier:
    """Copies of one worker; holds its piece of scratch memory. Not thread-safe."""

    def __init__(self) -> None:
        self._scratch = np.empty(PIECE_BYTES, np.uint8)

    def gather(
        self,
        memory: Bytes2D,
        rows: Rows,
        out: Bytes2D,
        checksum: xxhash.xxh3_64,
        stopped: Callable[[], bool],
    ) -> None:
        """Copy rows of `memory` into `out` [len(rows), row_bytes]; raises Stopped."""
        row_bytes = memory.shape[1]
        straight = _contiguous(rows)
        if straight is not None:
            source = memory[straight : straight + len(rows)].reshape(-1)
            flat = out.reshape(-1)
            for a, b in _pieces(len(flat), PIECE_BYTES):
                if stopped():
                    raise Stopped
                checksum.update(source[a:b].data)
                flat[a:b] = source[a:b]
        elif row_bytes < SMALL_PAGE_BYTES:
            for a, b in _pieces(len(rows), max(1, PIECE_BYTES // row_bytes)):
                if stopped():
                    raise Stopped
                piece = self._scratch[: (b - a) * row_bytes].reshape(b - a, row_bytes)
                # mode="clip" writes straight to `out`; "raise" would go through a buffer. The
                # rows were checked when the task was made.
                np.take(memory, rows[a:b], axis=0, out=piece, mode="clip")
                checksum.update(piece.data)
                out[a:b] = piece
        elif row_bytes <= PIECE_BYTES:
            for a, b in _pieces(len(rows), PIECE_BYTES // row_bytes):
                if stopped():
                    raise Stopped
                for row in rows[a:b].tolist():
                    checksum.update(memory[row].data)
                np.take(memory, rows[a:b], axis=0, out=out[a:b], mode="clip")
        else:
            for at, row in enumerate(rows.tolist()):
                self.gather(memory, _single(row), out[at : at + 1], checksum, stopped)

    def gather_to_file(
        self,
        memory: Bytes2D,
        rows: Rows,
        descriptor: int,
        at: int,
        checksum: xxhash.xxh3_64,
        stopped: Callable[[], bool],
    ) -> None:
        """`gather` into a file at byte `at`, by system calls; raises Stopped, OSError.

        For parts of a file that this process has not mapped yet: there a store to the mapping
        costs a page fault every 4 KiB, four times the copy on a fresh file.
        """
        row_bytes = memory.shape[1]
        straight = _contiguous(rows)
        if straight is not None:
            source = memory[straight : straight + len(rows)].reshape(-1)
            for a, b in _pieces(len(source), PIECE_BYTES):
                if stopped():
                    raise Stopped
                piece = source[a:b].data
                checksum.update(piece)
                _write(descriptor, [piece], at + a)
        elif row_bytes < SMALL_PAGE_BYTES:
            for a, b in _pieces(len(rows), max(1, PIECE_BYTES // row_bytes)):
                if stopped():
                    raise Stopped
                scratch = self._scratch[: (b - a) * row_bytes]
                np.take(
                    memory, rows[a:b], axis=0, out=scratch.reshape(b - a, row_bytes), mode="clip"
                )
                checksum.update(scratch.data)
                _write(descriptor, [scratch.data], at + a * row_bytes)
        elif row_bytes <= PIECE_BYTES:
            for a, b in _pieces(len(rows), PIECE_BYTES // row_bytes):
                if stopped():
                    raise Stopped
                pages = [memory[row].data for row in rows[a:b].tolist()]
                for page in pages:
                    checksum.update(page)
                _write(descriptor, pages, at + a * row_bytes)
        else:
            for n, row in enumerate(rows.tolist()):
                place = at + n * row_bytes
                self.gather_to_file(memory, _single(row), descriptor, place, checksum, stopped)

    def scatter(
        self,
        source: Bytes2D,
        memory: Bytes2D,
        rows: Rows,
        checksum: xxhash.xxh3_64 | None,
        stopped: Callable[[], bool],
    ) -> None:
        """Copy `source` [len(rows), row_bytes] to rows of `memory`; raises Stopped."""
        row_bytes = memory.shape[1]
        straight = _contiguous(rows)
        if straight is not None:
            target = memory[straight : straight + len(rows)].reshape(-1)
            flat = source.reshape(-1)
            for a, b in _pieces(len(flat), PIECE_BYTES):
                if stopped():
                    raise Stopped
                target[a:b] = flat[a:b]
                if checksum is not None:
                    checksum.update(flat[a:b].data)
        elif row_bytes <= PIECE_BYTES:
            for a, b in _pieces(len(rows), PIECE_BYTES // row_bytes):
                if stopped():
                    raise Stopped
                memory[rows[a:b]] = source[a:b]
                if checksum is not None:
                    checksum.update(source[a:b].data)
        else:
            for at, row in enumerate(rows.tolist()):
                self.scatter(source[at : at + 1], memory, _single(row), checksum, stopped)


def _write(descriptor: int, pieces: list[memoryview], at: int) -> None:
    wanted = sum(map(len, pieces))
    done = os.pwritev(descriptor, pieces, at)
    if done < wanted:  # a signal, or the end of the room: the rest says which
        rest = memoryview(b"".join(pieces))[done:]
        while rest:
            written = os.pwrite(descriptor, rest, at + done)
            rest, done = rest[written:], done + written


def _single(row: int) -> Rows:
    return np.array([row], np.intp)


def _contiguous(rows: Rows) -> int | None:
    """The first row when the rows follow each other, else None."""
    first = int(rows[0])
    if len(rows) == 1:
        return first
    if int(rows[-1]) - first == len(rows) - 1 and bool((np.diff(rows) == 1).all()):
        return first
    return None


def _pieces(total: int, size: int) -> Iterator[tuple[int, int]]:
    for at in range(0, total, size):
        yield at, min(total, at + size)
