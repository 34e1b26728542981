"""A piece of private memory, by way of which small rows and short regions are copied."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import xxhash

from light_mem.engine.pieces import PIECE_BYTES
from light_mem.engine.places import Bytes1D, Bytes2D
from light_mem.index.keys import KEY_BYTES

_LINE = 64  # bytes of a cache line


class ScratchTable(NamedTuple):
    """Scratch memory that a block of small rows, or a piece of one, is gathered in."""

    rows: Bytes2D
    piece: Bytes1D  # the same
    key: memoryview
    keyed: memoryview  # the key and the piece


class Scratch:
    """Of one thread at a time."""

    def __init__(self) -> None:
        room = np.empty(2 * _LINE + PIECE_BYTES, np.uint8)
        start = _LINE + -room.ctypes.data % _LINE
        self.bytes: Bytes1D = room[start : start + PIECE_BYTES]
        # A whole block's key goes right before its bytes: one call then sums up both.
        self.key = room[start - KEY_BYTES : start].data
        self._keyed = room[start - KEY_BYTES : start + PIECE_BYTES].data

    def keyed(self, nbytes: int) -> memoryview:
        """The key, and so many bytes."""
        return self._keyed[: KEY_BYTES + nbytes]

    def sum_up(self, key: bytes, nbytes: int) -> int:
        """The checksum of a whole block whose bytes lie here."""
        self.key[:] = key
        return xxhash.xxh3_64_intdigest(self.keyed(nbytes))

    def table(self, rows: int, row_bytes: int) -> ScratchTable:
        """So many rows of it."""
        nbytes = rows * row_bytes
        piece = self.bytes[:nbytes]
        return ScratchTable(piece.reshape(rows, row_bytes), piece, self.key, self.keyed(nbytes))
