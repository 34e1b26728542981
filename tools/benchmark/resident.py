"""How much of a file is in the page cache, by mincore(2)."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]


def resident(path: Path) -> float:
    """The share of the file's pages that are in the page cache; looking brings none in."""
    size = path.stat().st_size
    there = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), size) as mapping:
        view = np.frombuffer(mapping, np.uint8)
        address = view.ctypes.data
        del view
        if _libc.mincore(address, size, there.ctypes.data) != 0:
            raise OSError(ctypes.get_errno(), f"mincore of {path}")
    return float((there & 1).mean())


def write_out(path: Path, forget: bool) -> None:
    """Wait until the device has the file; `forget` drops its pages then."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(descriptor)
        if forget:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
