"""Many blocks of one data file compared with their checksums, with little Python a block.

A block's checksum is over its key and then its bytes, and one call of xxh3 wants both in one
place. So a buffer holds frames, each room for a key and a block; one system call scatters a batch
of neighbours into them, two slice assignments put all their keys there, and `map` does the rest:
no line of Python runs for a block, which is what small blocks cost.

Imports neither numpy nor anything that does, see `scan_child.py`.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable
from typing import NamedTuple

from xxhash import xxh3_64_digest as digest

from light_mem.maintenance.data_file import DataFile, Extents

BATCH_BYTES = 256 << 10  # read at once: more would leave a core's cache before its checksum
MAX_BUFFERS = 64  # of so many sizes of blocks
_IOV_MAX = os.sysconf("SC_IOV_MAX") if "SC_IOV_MAX" in os.sysconf_names else 16
_WORD, _KEY = 8, 16

Told = Callable[[int], None]  # bytes done since it was called last


class Stretch(NamedTuple):
    """Blocks of one size, each following the last in the file."""

    first: int  # number in the batch
    blocks: int
    offset: int  # of the first one's bytes in the file
    size: int  # of each, bytes


class Batch(NamedTuple):
    """Blocks, by number: the halves of their keys, their checksums, and where they lie."""

    low: bytes  # 8 bytes a block
    high: bytes  # the same
    sums: bytes  # the same, big-endian: as xxh3 gives digests
    stretches: bytes  # four int64 a Stretch

    def each_stretch(self) -> list[Stretch]:
        """The stretches, by place."""
        numbers = array("q", self.stretches).tolist()
        return [Stretch(*numbers[at : at + 4]) for at in range(0, len(numbers), 4)]

    def key(self, n: int) -> bytes:
        """The key of the n-th block."""
        at = slice(_WORD * n, _WORD * n + _WORD)
        return self.low[at] + self.high[at]


class _Frames:
    """A buffer of frames for blocks of one size, and views into it, made once."""

    def __init__(self, size: int) -> None:
        words = 2 + -(-size // _WORD)  # a key is put in by words
        stride = words * _WORD
        self.count = max(1, min(_IOV_MAX, BATCH_BYTES // stride))
        whole = memoryview(bytearray(stride * self.count))
        self._words = whole.cast("Q")
        self._stride = words
        starts = range(0, len(whole), stride)
        self._data = [whole[at + _KEY : at + _KEY + size] for at in starts]
        self._framed = [whole[at : at + _KEY + size] for at in starts]
        self._size = size

    def digests(self, descriptor: int, at: int, low: memoryview, high: memoryview) -> bytes | None:
        """The checksums of blocks from `at` on, one a key; None if not all can be read."""
        count = len(low)
        try:
            found = os.preadv(descriptor, self._data[:count], at)
        except OSError:
            return None
        if found != count * self._size:
            return None
        end = count * self._stride
        self._words[0 : end : self._stride] = low
        self._words[1 : end : self._stride] = high
        return b"".join(map(digest, self._framed[:count]))


class Scanner:
    """Scans data files; keeps its buffers. One thread."""

    def __init__(self) -> None:
        self._frames: dict[int, _Frames] = {}

    def scan(
        self, file: DataFile, batch: Batch, told: Told, stopped: Callable[[], bool]
    ) -> list[int]:
        """The blocks that do not fit, by number, and those that cannot be read; fewer once
        `stopped`."""
        failed: list[int] = []
        low, high = memoryview(batch.low).cast("Q"), memoryview(batch.high).cast("Q")
        for stretch in batch.each_stretch():
            if stretch.size > BATCH_BYTES:
                failed += self._large(file, batch, stretch, told, stopped)
                continue
            frames = self._frames_for(stretch.size)
            end = stretch.first + stretch.blocks
            for at in range(stretch.first, end, frames.count):
                if stopped():
                    return failed
                to = min(at + frames.count, end)
                place = stretch.offset + (at - stretch.first) * stretch.size
                sums = batch.sums[_WORD * at : _WORD * to]
                found = frames.digests(file.fileno(), place, low[at:to], high[at:to])
                if found is None:
                    failed += range(at, to)
                elif found != sums:
                    words = range(0, len(sums), _WORD)
                    failed += [
                        at + word // _WORD
                        for word in words
                        if found[word : word + _WORD] != sums[word : word + _WORD]
                    ]
                told((to - at) * stretch.size)
        return failed

    def _frames_for(self, size: int) -> _Frames:
        if size not in self._frames:
            if len(self._frames) == MAX_BUFFERS:
                self._frames.clear()
            self._frames[size] = _Frames(size)
        return self._frames[size]

    @staticmethod
    def _large(
        file: DataFile, batch: Batch, stretch: Stretch, told: Told, stopped: Callable[[], bool]
    ) -> list[int]:
        failed = []
        for n in range(stretch.first, stretch.first + stretch.blocks):
            if stopped():
                break
            at = stretch.offset + (n - stretch.first) * stretch.size
            checksum = int.from_bytes(batch.sums[_WORD * n : _WORD * n + _WORD], "big")
            if file.problem(Extents(0, batch.key(n), checksum, [(at, stretch.size)])):
                failed.append(n)
            told(stretch.size)
        return failed
