"""A shard's data file, read block by block, each compared with its checksum.

Imports neither numpy nor anything that does: the processes that read small blocks start with it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import xxhash

PIECE_BYTES = 1 << 20  # stays in a core's cache between the read and the checksum


class Extents(NamedTuple):
    """One block and where its bytes lie: (offset, length) in the data file, in their order."""

    slot: int
    key: bytes
    checksum: int
    pieces: list[tuple[int, int]]


class DataFile:
    """A shard's data file, read only; one reader a thread."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._buffer = memoryview(bytearray(PIECE_BYTES))

    def read(self, at: int, size: int) -> memoryview:
        """At most PIECE_BYTES from `at` on, fewer at the end of the file; good until the next
        read. Raises OSError."""
        done = 0
        while done < size:
            count = os.preadv(self._descriptor, [self._buffer[done:size]], at + done)
            if not count:
                break
            done += count
        return self._buffer[:done]

    def problem(self, block: Extents) -> str:
        """Why the block's bytes are not those that were written; "" when they are."""
        return self._digest(block, lambda chunk: None)

    def load(self, block: Extents) -> tuple[bytes, str]:
        """The block's bytes, and why they are not those that were written; "" when they are."""
        data = bytearray()
        problem = self._digest(block, data.extend)
        return bytes(data), problem

    def _digest(self, block: Extents, take: Callable[[memoryview], None]) -> str:
        checksum = xxhash.xxh3_64(block.key)
        length = 0
        try:
            for at, size in block.pieces:
                for part in range(0, size, PIECE_BYTES):
                    chunk = self.read(at + part, min(PIECE_BYTES, size - part))
                    checksum.update(chunk)
                    take(chunk)
                    length += len(chunk)
        except OSError as error:
            return f"cannot be read: {error.strerror}"
        wanted = sum(size for _, size in block.pieces)
        if length < wanted:
            return f"the file ends {wanted - length} bytes before its end"
        return "" if checksum.intdigest() == block.checksum else "its bytes do not fit its checksum"

    def fileno(self) -> int:
        """The descriptor."""
        return self._descriptor

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._descriptor)
