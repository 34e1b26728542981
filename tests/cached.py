"""Which pages of a file are in the page cache: mincore(2)."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tests.conftest import wait_until

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]


def cached(path: Path) -> npt.NDArray[np.bool_]:
    """A bool a page of the kernel; looking brings nothing in."""
    size = path.stat().st_size
    pages = -(-size // mmap.PAGESIZE)
    there = np.zeros(pages, np.uint8)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), size) as mapping:
        view = np.frombuffer(mapping, np.uint8)
        address = view.ctypes.data
        del view
        if _libc.mincore(address, size, there.ctypes.data) != 0:
            raise OSError(ctypes.get_errno(), "mincore")
    return (there & 1).astype(bool)


def forget(path: Path) -> None:
    """Write a file out and drop its pages."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def forget_all(path: Path) -> None:
    """`forget`, until no page is left: the kernel may have one in hand for a moment."""

    def gone() -> bool:
        forget(path)
        return not cached(path).any()

    wait_until(gone)


def can_forget(directory: Path) -> bool:
    """Whether the file system has a cache to drop pages from; tmpfs is one itself."""
    path = directory / "probe"
    path.write_bytes(bytes(8 * mmap.PAGESIZE))
    forget(path)
    gone = not cached(path).any()
    path.unlink()
    return gone
