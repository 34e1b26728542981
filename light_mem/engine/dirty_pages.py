"""Which slots are written through the mapping: those whose pages are dirty in the page cache.

A store to a mapped page that is clean is a fault: the kernel protects what it has written to the
device, to notice the next store. Blocks of 60 MB by two writers: 10 to 11 GB/s while the pages are
dirty, 4.0 after; `pwrite`, which needs no fault, 5.3. A page that this process never touched is a
fault as well, dirty or not.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import sys

_PAGE = mmap.PAGESIZE
_CACHESTAT = 451  # cachestat(2), Linux 6.5: of all architectures but one, which has no 64-bit wheel

# The kernel looks for pages to write every 5 s (dirty_writeback_centisecs) and leaves none for
# longer than 30 s (dirty_expire_centisecs); sooner it writes where much memory is dirty.
SURELY_SECONDS = 0.5  # within them it is not asked: that costs 2 us, and more for a long block
GUESSED_SECONDS = 5.0  # ... and where it does not tell
AT_MOST_SECONDS = 30.0


class _Range(ctypes.Structure):
    _fields_ = [("at", ctypes.c_uint64), ("nbytes", ctypes.c_uint64)]


class _Counts(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint64)
        for name in ("cached", "dirty", "writeback", "evicted", "recently_evicted")
    ]


class DirtyPages:
    """Asks the kernel. Not thread-safe."""

    def __init__(self) -> None:
        self._call = _find_call()
        self._range, self._counts = _Range(), _Counts()

    def are_dirty(self, descriptor: int, at: int, nbytes: int, age: float) -> bool:
        """Whether nearly all pages of a range of a file are dirty, which this process last wrote
        through or into `age` seconds ago, and none is being written."""
        if age < SURELY_SECONDS:
            return True
        if age >= AT_MOST_SECONDS:
            return False
        call = self._call
        if call is None:
            return age < GUESSED_SECONDS
        self._range.at, self._range.nbytes = at, nbytes
        counts = self._counts
        if call(_CACHESTAT, descriptor, ctypes.byref(self._range), ctypes.byref(counts), 0) != 0:
            if ctypes.get_errno() in (errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP):
                self._call = None  # an older kernel, or a filter of system calls
            return age < GUESSED_SECONDS
        pages = (at + nbytes - 1) // _PAGE - at // _PAGE + 1
        return bool(counts.writeback == 0 and counts.dirty * 10 >= pages * 9)


def _find_call() -> ctypes._NamedFuncPointer | None:
    if sys.platform != "linux":
        return None
    # With the GIL: it takes microseconds.
    call = ctypes.PyDLL(None, use_errno=True).syscall
    call.restype = ctypes.c_long
    call.argtypes = (
        ctypes.c_long,
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_uint,
    )
    return call
