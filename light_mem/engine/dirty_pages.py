"""Whether a range of a file lies in dirty pages, so that stores to its mapping need no fault.

A store to a mapped page that is clean is a fault: the kernel protects what it has written to the
device, from every process that maps it, to notice the next store. Blocks of 60 MB by two writers:
10 to 11 GB/s while the pages are dirty, 4.0 after; `pwrite`, which needs no fault, 5.3.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import sys

_PAGE = mmap.PAGESIZE
_CACHESTAT = 451  # cachestat(2), Linux 6.5; the same number everywhere but on Alpha

# The kernel looks for pages to write every 5 s (dirty_writeback_centisecs) and leaves none for
# longer than 30 s (dirty_expire_centisecs); sooner it writes where much memory is dirty.
SURELY_SECONDS = 0.5  # within them it is not asked: that costs 2 us, and more for a long block
GUESSED_SECONDS = 5.0  # taken to be dirty where the kernel does not tell
AT_MOST_SECONDS = 30.0


class _Range(ctypes.Structure):
    _fields_ = [("at", ctypes.c_uint64), ("nbytes", ctypes.c_uint64)]


class _Counts(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint64)
        for name in ("cached", "dirty", "writeback", "evicted", "recently_evicted")
    ]


class DirtyPages:
    """Of one file, as one process maps it. Not thread-safe."""

    def __init__(self) -> None:
        self._call = _find_call()
        self._range, self._counts = _Range(), _Counts()
        # When the kernel was last seen to have written something out: what was written before is
        # protected, also where others have made it dirty since.
        self._protected = 0.0

    def need_no_fault(
        self, descriptor: int, at: int, nbytes: int, written: float, now: float
    ) -> bool:
        """Whether a store to this range finds the pages dirty and, if this process stored to them
        before, still writable.

        written   when this process last wrote it, s (monotonic), by a call where it is negative;
                  0: never
        """
        last = abs(written)
        age = now - last
        if not last or age >= AT_MOST_SECONDS:
            return False
        if last < self._protected:
            return False
        if age < SURELY_SECONDS:
            return True
        dirty = self._are_dirty(descriptor, at, nbytes)
        if dirty is None:
            return age < GUESSED_SECONDS
        if not dirty:
            self._protected = now
        return dirty

    def _are_dirty(self, descriptor: int, at: int, nbytes: int) -> bool | None:
        """Whether nearly all pages of a range are dirty, and none is being written; None: the
        kernel does not tell."""
        call = self._call
        if call is None:
            return None
        self._range.at, self._range.nbytes = at, nbytes
        counts = self._counts
        if call(_CACHESTAT, descriptor, ctypes.byref(self._range), ctypes.byref(counts), 0) != 0:
            if ctypes.get_errno() in (errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP):
                self._call = None  # an older kernel, or a filter of system calls
            return None
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
