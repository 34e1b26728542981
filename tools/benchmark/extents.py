"""Which parts of a file are on the device: preallocated room that nobody has written is not, and a
read of it is zeros from nowhere, faster than any device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def written(path: Path) -> list[tuple[int, int]]:
    """Ranges `[begin, end)` of the file that were written, by lseek(2); all of it where the file
    system does not tell. Of a file that is not dirty in the page cache."""
    size = path.stat().st_size
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return list(_ranges(descriptor, size)) if hasattr(os, "SEEK_DATA") else [(0, size)]
    finally:
        os.close(descriptor)


def _ranges(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    end = 0
    while end < size:
        try:
            begin = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError:  # ENXIO: nothing but holes from here on
            return
        end = os.lseek(descriptor, begin, os.SEEK_HOLE)
        yield begin, end


def pieces(path: Path, nbytes: int) -> list[tuple[int, int]]:
    """What was written, in pieces of at most `nbytes`: offset and length."""
    return [
        (at, min(nbytes, end - at))
        for begin, end in written(path)
        for at in range(begin, end, nbytes)
    ]
